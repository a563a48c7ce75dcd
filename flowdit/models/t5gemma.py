"""The frozen encoder of T5Gemma, read from its Hugging Face files without torch; the decoder is never read.

Attributes have the names of the state dict and weights its (out, in) layout, so a parameter's path in the tree is its
key in the files. Only the layers differ: they are stacked along a leading depth axis and scanned, which compiles one
layer instead of 26. Everything acts on one text, (length, width); callers `vmap`.

Source: Zhang et al., "Encoder-Decoder Gemma" (arXiv:2504.06225), Gemma 2 (arXiv:2408.00118) for the layers, and
transformers' `models/t5gemma/modeling_t5gemma.py`, the reference of the tests.
"""

import re
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from flowdit import hashing, sharding
from flowdit.fsdp import gather
from flowdit.models import pretrained
from flowdit.models.positions import rotate
from flowdit.models.t5gemma_config import T5GemmaConfig
from flowdit.sharding import STACKED, ParameterSpec

WEIGHTS_STEM = "model"
# Keys of a full model start with "model.encoder." or "encoder.", keys of a bare encoder have no prefix. Those of the
# decoder and the language model head do not match.
ENCODER_KEY = re.compile(r"(?:(?:model\.)?encoder\.)?((?:embed_tokens|layers|norm)\..+)")


class RMSNorm(eqx.Module):
    """Root-mean-square norm with the scale stored as its difference from 1, computed in float32."""

    weight: Float[Array, " width"]
    eps: float = eqx.field(static=True)

    def __call__(self, x: Float[Array, "length width"]) -> Float[Array, "length width"]:
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + self.eps)
        return (normed * (1 + self.weight.astype(jnp.float32))[None]).astype(x.dtype)


class Linear(eqx.Module):
    """`x @ weight.T`, without bias."""

    weight: Float[Array, "out in"]
    axes: tuple[str, str] = eqx.field(static=True)

    def __call__(self, x: Float[Array, "length in"]) -> Float[Array, "length out"]:
        return x @ self.weight.T

    def parameter_specs(self) -> dict[str, ParameterSpec]:
        return {"weight": ParameterSpec(self.axes, decay=True)}


class Embedding(eqx.Module):
    """An embedding table of the vocabulary."""

    weight: Float[Array, "vocabulary width"]

    def __call__(self, ids: Int[Array, " length"]) -> Float[Array, "length width"]:
        return self.weight[ids]

    def parameter_specs(self) -> dict[str, ParameterSpec]:
        return {"weight": ParameterSpec((None, "embed"))}


class SelfAttention(eqx.Module):
    """Grouped-query attention: several query heads share a key and value head. Logits are soft-capped by a tanh."""

    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    o_proj: Linear
    config: T5GemmaConfig = eqx.field(static=True)

    def __init__(self, config: T5GemmaConfig):
        query_dim, kv_dim = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = _linear(config.hidden_size, query_dim, ("heads", "embed"))
        self.k_proj = _linear(config.hidden_size, kv_dim, ("heads", "embed"))
        self.v_proj = _linear(config.hidden_size, kv_dim, ("heads", "embed"))
        self.o_proj = _linear(query_dim, config.hidden_size, ("embed", "heads"))
        self.config = config

    def __call__(
        self, x: Float[Array, "length width"], allowed: Bool[Array, "length length"], angles: Float[Array, "length _"]
    ) -> Float[Array, "length width"]:
        """`allowed[i, j]`: token i may attend to token j. `angles`: see `rotary_angles`."""
        query, key, value = (
            proj(x).reshape(x.shape[0], -1, self.config.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = rotate(query, angles), rotate(key, angles)
        # Query heads that share a key head are adjacent.
        query = query.reshape(x.shape[0], self.config.num_key_value_heads, -1, self.config.head_dim)
        logits = self._cap(jnp.einsum("qhgd,khd->hgqk", query, key, preferred_element_type=jnp.float32))
        # A large negative number instead of infinity: rows without an allowed key have uniform weights instead of NaN.
        logits = jnp.where(allowed[None, None], logits, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(logits).astype(x.dtype)
        mixed = jnp.einsum("hgqk,khd->qhgd", weights, value)
        return self.o_proj(mixed.reshape(x.shape[0], -1))

    def _cap(self, logits: Float[Array, "kv_heads groups query key"]) -> Float[Array, "kv_heads groups query key"]:
        scaled, cap = logits * self.config.query_pre_attn_scalar**-0.5, self.config.attn_logit_softcapping
        return scaled if cap is None else cap * jnp.tanh(scaled / cap)


class GeGLU(eqx.Module):
    """`down(gelu(gate(x)) * up(x))` with the tanh approximation (Shazeer, arXiv:2002.05202)."""

    gate_proj: Linear
    up_proj: Linear
    down_proj: Linear

    def __init__(self, config: T5GemmaConfig):
        self.gate_proj = _linear(config.hidden_size, config.intermediate_size, ("mlp", "embed"))
        self.up_proj = _linear(config.hidden_size, config.intermediate_size, ("mlp", "embed"))
        self.down_proj = _linear(config.intermediate_size, config.hidden_size, ("embed", "mlp"))

    def __call__(self, x: Float[Array, "length width"]) -> Float[Array, "length width"]:
        gate = jax.nn.gelu(self.gate_proj(x).astype(jnp.float32), approximate=True)
        return self.down_proj(gate.astype(x.dtype) * self.up_proj(x))


class EncoderLayer(eqx.Module):
    """Attention and feed-forward network, each with a norm before it and a norm before the residual sum."""

    self_attn: SelfAttention
    mlp: GeGLU
    pre_self_attn_layernorm: RMSNorm
    post_self_attn_layernorm: RMSNorm
    pre_feedforward_layernorm: RMSNorm
    post_feedforward_layernorm: RMSNorm

    def __init__(self, config: T5GemmaConfig):
        self.self_attn = SelfAttention(config)
        self.mlp = GeGLU(config)
        self.pre_self_attn_layernorm = _norm(config)
        self.post_self_attn_layernorm = _norm(config)
        self.pre_feedforward_layernorm = _norm(config)
        self.post_feedforward_layernorm = _norm(config)

    def __call__(
        self, x: Float[Array, "length width"], allowed: Bool[Array, "length length"], angles: Float[Array, "length _"]
    ) -> Float[Array, "length width"]:
        attended = self.self_attn(self.pre_self_attn_layernorm(x), allowed, angles)
        x = x + self.post_self_attn_layernorm(attended)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class T5GemmaEncoder(eqx.Module):
    """From token ids to features. `load_t5gemma` reads one; the constructor only defines the shapes."""

    embed_tokens: Embedding
    layers: EncoderLayer
    norm: RMSNorm
    config: T5GemmaConfig = eqx.field(static=True)
    fingerprint: str = eqx.field(static=True)

    def __init__(self, config: T5GemmaConfig, fingerprint: str = ""):
        self.embed_tokens = Embedding(jnp.zeros((config.vocab_size, config.hidden_size)))
        self.layers = eqx.filter_vmap(lambda: EncoderLayer(config), axis_size=config.num_hidden_layers)()
        self.norm = _norm(config)
        self.config = config
        self.fingerprint = fingerprint

    def parameter_specs(self) -> dict[str, ParameterSpec | str]:
        return {"layers": STACKED}

    def __call__(self, ids: Int[Array, " length"], mask: Bool[Array, " length"]) -> Float[Array, "length width"]:
        """The last hidden state of one text padded on the right, in the dtype of the parameters.

        `mask` is True at tokens of the text. The result at other tokens is meaningless.
        """
        positions = jnp.arange(ids.shape[0])
        # The window extends to both sides and includes its end, as in transformers.
        near = jnp.abs(positions[:, None] - positions[None]) <= self.config.sliding_window
        angles = rotary_angles(positions, self.config.head_dim, self.config.rope_theta)
        x = self.embed_tokens(ids)
        x = x * jnp.asarray(self.config.hidden_size**0.5, x.dtype)

        def apply(x, layer_and_kind):
            layer, is_sliding = layer_and_kind
            return gather(layer)(x, mask[None] & (near | ~is_sliding), angles), None

        x, _ = jax.lax.scan(apply, x, (self.layers, jnp.asarray(self.config.is_sliding)))
        return self.norm(x)


def rotary_angles(positions: Int[Array, " length"], head_dim: int, theta: float) -> Float[Array, "length half"]:
    """Rotation angle of each pair of channels at each position, in radians (RoPE, Su et al., arXiv:2104.09864)."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return positions.astype(jnp.float32)[:, None] * jnp.asarray(1 / np.float32(theta) ** exponents)[None]


def _linear(in_dim: int, out_dim: int, axes: tuple[str, str]) -> Linear:
    """`axes` are the logical axes of outputs and inputs."""
    return Linear(jnp.zeros((out_dim, in_dim)), axes)


def _norm(config: T5GemmaConfig) -> RMSNorm:
    return RMSNorm(jnp.zeros(config.hidden_size), config.rms_norm_eps)


def load_t5gemma(folder: Path, dtype: DTypeLike, mesh: Mesh | None = None) -> T5GemmaEncoder:
    """Read the encoder of a T5Gemma checkpoint, its parameters cast to `dtype`.

    Args:
        folder: with `config.json` and `model.safetensors` or its shards, of a full model or of an encoder only.
        dtype: of the parameters and of the computation: bfloat16 or float32.
        mesh: if given, the parameters are laid out on it as `sharding.parameter_shardings` says.

    Raises:
        ValueError: another architecture, damaged files, or tensors that do not match the configuration (the first of
            them are listed).
    """
    raw = pretrained.read_json(folder / "config.json")
    files = pretrained.find_weights(folder, WEIGHTS_STEM, _is_encoder_key)
    config = _read_config(folder, raw, files)
    stored = pretrained.read_tensors(files, _is_encoder_key)
    tensors = {ENCODER_KEY.sub(r"\1", key): tensor for key, tensor in stored.items()}
    del stored  # to free the single layers while they are stacked
    fingerprint = hashing.fingerprint(f"{config} {hashing.tensors_fingerprint(tensors)}")
    shapes = eqx.filter_eval_shape(T5GemmaEncoder, config, fingerprint)
    pretrained.check_tensors(
        pretrained.with_single_layers(shapes, "layers", config.num_hidden_layers), tensors, source=folder
    )
    pretrained.stack_layers(tensors, "layers", config.num_hidden_layers)
    shardings = None if mesh is None else sharding.parameter_shardings(mesh, shapes)
    return pretrained.fill(shapes, tensors, dtype, source=folder, shardings=shardings)


def _is_encoder_key(key: str) -> bool:
    return ENCODER_KEY.fullmatch(key) is not None


def _read_config(folder: Path, raw: dict[str, Any], files: list[Path]) -> T5GemmaConfig:
    shapes = pretrained.read_shapes(files, _is_encoder_key)
    try:
        return T5GemmaConfig.from_huggingface(
            raw, {ENCODER_KEY.sub(r"\1", key): shape for key, shape in shapes.items()}
        )
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
