"""Tiny folders of CLIP and DINOv2 with random weights, in the layout of the Hugging Face hub."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WIDTH, HEADS = 32, 4
DEPTH = 3
WORDS = ["<start>", "<end>", *(f"w{i}" for i in range(60))]
PREPROCESSING = {
    "size": {"shortest_edge": 36},
    "crop_size": {"height": 32, "width": 32},
    "resample": 3,
    "image_mean": [0.48, 0.45, 0.4],
    "image_std": [0.27, 0.26, 0.28],
}
CLIP = {
    "model_type": "clip",
    "projection_dim": 24,
    "text_config": {
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": HEADS,
        "vocab_size": len(WORDS),
        "max_position_embeddings": 20,
        "eos_token_id": 1,
        "bos_token_id": 0,
        "projection_dim": 24,
    },
    "vision_config": {
        "hidden_size": WIDTH,
        "intermediate_size": 40,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": HEADS,
        "image_size": 32,
        "patch_size": 8,
        "projection_dim": 24,
    },
}
DINOV2 = {
    "model_type": "dinov2",
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS,
    "mlp_ratio": 4,
    "image_size": 35,
    "patch_size": 7,
}
Shapes = dict[str, tuple[int, ...]]


def layer_shapes(prefix: str, names: dict[str, tuple[int, ...]], depth: int = DEPTH) -> Shapes:
    shapes = {}
    for i in range(depth):
        for name, shape in names.items():
            shapes[f"{prefix}.{i}.{name}.weight"] = shape
            shapes[f"{prefix}.{i}.{name}.bias"] = shape[:1]
    return shapes


def clip_layers(prefix: str, inner: int) -> Shapes:
    names: Shapes = {f"self_attn.{name}_proj": (WIDTH, WIDTH) for name in "qkv"}
    names |= {"self_attn.out_proj": (WIDTH, WIDTH), "mlp.fc1": (inner, WIDTH), "mlp.fc2": (WIDTH, inner)}
    return layer_shapes(prefix, names | {"layer_norm1": (WIDTH,), "layer_norm2": (WIDTH,)})


def clip_shapes() -> Shapes:
    norms = ("vision_model.pre_layrnorm", "vision_model.post_layernorm", "text_model.final_layer_norm")
    return {
        **clip_layers("vision_model.encoder.layers", 40),
        **clip_layers("text_model.encoder.layers", 48),
        **{f"{name}.{part}": (WIDTH,) for name in norms for part in ("weight", "bias")},
        "vision_model.embeddings.class_embedding": (WIDTH,),
        "vision_model.embeddings.patch_embedding.weight": (WIDTH, 3, 8, 8),
        "vision_model.embeddings.position_embedding.weight": (17, WIDTH),
        "visual_projection.weight": (24, WIDTH),
        "text_model.embeddings.token_embedding.weight": (len(WORDS), WIDTH),
        "text_model.embeddings.position_embedding.weight": (20, WIDTH),
        "text_projection.weight": (24, WIDTH),
        "logit_scale": (),
    }


def dinov2_shapes(config: dict[str, Any]) -> Shapes:
    names: Shapes = {f"attention.attention.{name}": (WIDTH, WIDTH) for name in ("query", "key", "value")}
    names |= {"attention.output.dense": (WIDTH, WIDTH), "norm1": (WIDTH,), "norm2": (WIDTH,)}
    if config.get("use_swiglu_ffn"):
        names |= {"mlp.weights_in": (176, WIDTH), "mlp.weights_out": (WIDTH, 88)}
    else:
        names |= {"mlp.fc1": (128, WIDTH), "mlp.fc2": (WIDTH, 128)}
    side = config["patch_size"]
    shapes: Shapes = {
        **layer_shapes("encoder.layer", names),
        **{f"encoder.layer.{i}.layer_scale{j}.lambda1": (WIDTH,) for i in range(DEPTH) for j in (1, 2)},
        "embeddings.cls_token": (1, 1, WIDTH),
        "embeddings.mask_token": (1, WIDTH),
        "embeddings.position_embeddings": (1, 1 + (config["image_size"] // side) ** 2, WIDTH),
        "embeddings.patch_embeddings.projection.weight": (WIDTH, 3, side, side),
        "embeddings.patch_embeddings.projection.bias": (WIDTH,),
        "layernorm.weight": (WIDTH,),
        "layernorm.bias": (WIDTH,),
    }
    if "registers" in config["model_type"]:
        shapes["embeddings.register_tokens"] = (1, config["num_register_tokens"], WIDTH)
    return shapes


def random_tensors(shapes: Shapes) -> dict[str, np.ndarray]:
    """Normal values; scales of norms and layers are around 1, and matrices keep the size of what they multiply."""
    rng, tensors = np.random.default_rng(0), {}
    for name, shape in shapes.items():
        is_scale = len(shape) == 1 and ("norm" in name or "lambda" in name) and not name.endswith("bias")
        deviation = 1 / np.sqrt(np.prod(shape[1:])) if len(shape) > 1 and "embedding" not in name else 0.3
        tensors[name] = np.asarray(is_scale + deviation * rng.standard_normal(shape), np.float32)
    return tensors


def write_folder(folder: Path, config: dict[str, Any], shapes: Shapes, **preprocessing: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSING | preprocessing))
    safetensors.numpy.save_file(random_tensors(shapes), folder / "model.safetensors")
    return folder


def write_clip(folder: Path, **preprocessing: Any) -> Path:
    write_folder(folder, CLIP, clip_shapes(), **preprocessing)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [("<start>", 0), ("<end>", 1)]
    tokenizer.post_processor = processors.TemplateProcessing("<start> $A <end>", None, special)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def write_dinov2(folder: Path, preprocessing: dict[str, Any] | None = None, **config: Any) -> Path:
    settings = DINOV2 | config
    return write_folder(folder, settings, dinov2_shapes(settings), **(preprocessing or {}))
