"""Tiny random T5Gemma checkpoints with a tokenizer, in Hugging Face's format but written without torch."""

import json
from pathlib import Path

import numpy as np
import safetensors.numpy
from tokenizers import Tokenizer, decoders, models, normalizers, processors

SPECIAL_TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>"]
# Every feature matters: heads that share keys, heads wider than width / heads, a low cap, a window of two tokens.
ENCODER = {
    "model_type": "t5_gemma_module",
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "query_pre_attn_scalar": 20,
    "attn_logit_softcapping": 3.0,
    "sliding_window": 2,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}


def build_tokenizer() -> Tokenizer:
    """A BPE tokenizer like Gemma's: "▁" for spaces, bytes for unknown words, <bos> before the text."""
    pieces = [*SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghijklmnopqrstuvwxyz"]
    merges = [("r", "e"), ("re", "d"), ("▁", "red"), ("a", "p"), ("▁", "a")]
    vocab = {piece: i for i, piece in enumerate([*pieces, *(a + b for a, b in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 2)])
    # As in Gemma's file; readers must pad on the right and truncate on request.
    tokenizer.enable_padding(direction="left", pad_token="<pad>")
    tokenizer.enable_truncation(4)
    return tokenizer


def write_t5gemma(
    folder: Path, *, seed: int = 0, prefix: str = "model.encoder.", num_shards: int = 1, **settings
) -> Path:
    """A folder with `config.json`, `tokenizer.json` and weights: random encoder and decoder tensors.

    Of several shards the last holds the decoder's tensors and the others the encoder's. `settings` override those of
    `ENCODER`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    encoder = ENCODER | settings
    config = {"model_type": "t5gemma", "is_encoder_decoder": True, "encoder": encoder, "decoder": encoder}
    (folder / "config.json").write_text(json.dumps(config if prefix else encoder))
    build_tokenizer().save(str(folder / "tokenizer.json"))
    tensors = {prefix + name: tensor for name, tensor in random_tensors(encoder, seed).items()}
    decoder = (
        {f"{prefix.replace('encoder', 'decoder')}embed_tokens.weight": np.ones((5, 3), np.float32)} if prefix else {}
    )
    decoder |= {"lm_head.out_proj.weight": np.ones((5, 3), np.float32)} if prefix else {}
    if num_shards == 1:
        safetensors.numpy.save_file(tensors | decoder, folder / "model.safetensors", {"format": "pt"})
    else:
        _write_shards(folder, [*_split(tensors, num_shards - 1), decoder])
    return folder


def random_tensors(encoder: dict, seed: int) -> dict[str, np.ndarray]:
    """The encoder's tensors by key, in float32: norms that are not 1, queries and keys large enough for the cap."""
    generator = np.random.default_rng(seed)
    width = encoder["hidden_size"]
    inner = encoder["intermediate_size"]
    head_dim = encoder["head_dim"]
    query_dim, kv_dim = (head_dim * encoder[f"num_{kind}_heads"] for kind in ("attention", "key_value"))
    matrices = {
        "self_attn.q_proj": (query_dim, width),
        "self_attn.k_proj": (kv_dim, width),
        "self_attn.v_proj": (kv_dim, width),
        "self_attn.o_proj": (width, query_dim),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    shapes = {"embed_tokens.weight": (encoder["vocab_size"], width), "norm.weight": (width,)}
    for i in range(encoder["num_hidden_layers"]):
        shapes |= {f"layers.{i}.{name}.weight": shape for name, shape in matrices.items()}
        shapes |= {
            f"layers.{i}.{place}_layernorm.weight": (width,)
            for place in ("pre_self_attn", "post_self_attn", "pre_feedforward", "post_feedforward")
        }

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        scale = 0.2 if len(shape) == 1 or "embed" in name else shape[1] ** -0.5
        scale *= 2 if "q_proj" in name or "k_proj" in name else 1
        return (scale * generator.standard_normal(shape)).astype(np.float32)

    return {name: draw(name, shape) for name, shape in shapes.items()}


def _split(tensors: dict[str, np.ndarray], parts: int) -> list[dict[str, np.ndarray]]:
    return [dict(list(tensors.items())[i::parts]) for i in range(parts)]


def _write_shards(folder: Path, shards: list[dict[str, np.ndarray]]) -> None:
    weight_map = {}
    for i, tensors in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        safetensors.numpy.save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
