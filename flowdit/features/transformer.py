"""Frozen transformers of Hugging Face folders: the encoder of CLIP and DINOv2, and the vision transformer around it.

Attributes have the names of CLIP's state dict and weights its (out, in) layout; DINOv2's names are translated to them.
Layers are stacked along a leading axis and scanned. Everything acts on one example; callers `vmap`.

Source: Radford et al. 2021 (CLIP, arXiv:2103.00020), Oquab et al. 2023 (DINOv2, arXiv:2304.07193), Darcet et al. 2023
(registers, arXiv:2309.16588), and transformers' `modeling_clip.py` and `modeling_dinov2.py`, the references of the tests.
"""

from collections.abc import Callable
from typing import Annotated, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from pydantic import Field
from pydantic.dataclasses import dataclass

from flowdit.json_input import STRICT_PART, Count, Positive
from flowdit.models.layers import layer_norm

Activation = Literal["gelu", "quick_gelu", "swiglu"]
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


@dataclass(frozen=True, config=STRICT_PART)
class EncoderConfig:
    """Sizes of an encoder, with the names of a `config.json`. `has_layer_scale` as in DINOv2."""

    hidden_size: Count
    num_hidden_layers: Count
    num_attention_heads: Count
    intermediate_size: Count
    hidden_act: Activation = "quick_gelu"
    layer_norm_eps: Positive = 1e-5
    has_layer_scale: bool = False
    is_causal: bool = False


@dataclass(frozen=True, config=STRICT_PART)
class VisionConfig:
    """Sizes of a vision transformer. `height` and `width` are those of its input, in pixels."""

    encoder: EncoderConfig
    patch_size: Count
    height: Count
    width: Count
    num_registers: Annotated[int, Field(ge=0)] = 0
    has_patch_bias: bool = False
    has_pre_norm: bool = False

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along height and width; pixels after the last whole patch are not used."""
        return self.height // self.patch_size, self.width // self.patch_size


class Linear(eqx.Module):
    """`x @ weight.T + bias`."""

    weight: Float[Array, "out in"]
    bias: Float[Array, " out"] | None

    def __init__(self, in_dim: int, out_dim: int, has_bias: bool = True):
        self.weight = jnp.zeros((out_dim, in_dim))
        self.bias = jnp.zeros(out_dim) if has_bias else None

    def __call__(self, x: Float[Array, "tokens in"]) -> Float[Array, "tokens out"]:
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias[None]


class LayerNorm(eqx.Module):
    """A layer norm with scale and shift."""

    weight: Float[Array, " dim"]
    bias: Float[Array, " dim"]
    eps: float = eqx.field(static=True)

    def __init__(self, config: EncoderConfig):
        self.weight = jnp.zeros(config.hidden_size)
        self.bias = jnp.zeros(config.hidden_size)
        self.eps = config.layer_norm_eps

    def __call__(self, x: Float[Array, "tokens dim"]) -> Float[Array, "tokens dim"]:
        return layer_norm(x, self.eps) * self.weight[None] + self.bias[None]


class Attention(eqx.Module):
    """Multi-head self-attention."""

    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    out_proj: Linear
    num_heads: int = eqx.field(static=True)
    is_causal: bool = eqx.field(static=True)

    def __init__(self, config: EncoderConfig):
        dim = config.hidden_size
        self.q_proj = Linear(dim, dim)
        self.k_proj = Linear(dim, dim)
        self.v_proj = Linear(dim, dim)
        self.out_proj = Linear(dim, dim)
        self.num_heads = config.num_attention_heads
        self.is_causal = config.is_causal

    def __call__(self, x: Float[Array, "tokens dim"]) -> Float[Array, "tokens dim"]:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (project(x).reshape(x.shape[0], self.num_heads, -1) for project in projections)
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=self.is_causal)
        return self.out_proj(mixed.reshape(x.shape))


class FeedForward(eqx.Module):
    """Two linear layers with an activation; for `swiglu` the outputs of the first are gate and value."""

    fc1: Linear
    fc2: Linear
    activation: Activation = eqx.field(static=True)

    def __init__(self, config: EncoderConfig):
        dim, inner = config.hidden_size, config.intermediate_size
        self.fc1 = Linear(dim, 2 * inner if config.hidden_act == "swiglu" else inner)
        self.fc2 = Linear(inner, dim)
        self.activation = config.hidden_act

    def __call__(self, x: Float[Array, "tokens dim"]) -> Float[Array, "tokens dim"]:
        inner = self.fc1(x)
        if self.activation == "swiglu":
            gate, value = jnp.split(inner, 2, axis=-1)
            return self.fc2(jax.nn.silu(gate) * value)
        return self.fc2(ACTIVATIONS[self.activation](inner))


class EncoderLayer(eqx.Module):
    """Attention and feed-forward network, each after a norm and beside a skip connection."""

    layer_norm1: LayerNorm
    self_attn: Attention
    layer_norm2: LayerNorm
    mlp: FeedForward
    layer_scale1: Float[Array, " dim"] | None
    layer_scale2: Float[Array, " dim"] | None

    def __init__(self, config: EncoderConfig):
        self.layer_norm1 = LayerNorm(config)
        self.self_attn = Attention(config)
        self.layer_norm2 = LayerNorm(config)
        self.mlp = FeedForward(config)
        self.layer_scale1 = jnp.zeros(config.hidden_size) if config.has_layer_scale else None
        self.layer_scale2 = jnp.zeros(config.hidden_size) if config.has_layer_scale else None

    def __call__(self, x: Float[Array, "tokens dim"]) -> Float[Array, "tokens dim"]:
        x = x + _scaled(self.layer_scale1, self.self_attn(self.layer_norm1(x)))
        return x + _scaled(self.layer_scale2, self.mlp(self.layer_norm2(x)))


def _scaled(scale: Float[Array, " dim"] | None, x: Float[Array, "tokens dim"]) -> Float[Array, "tokens dim"]:
    return x if scale is None else x * scale[None]


def stacked_layers(config: EncoderConfig) -> EncoderLayer:
    """The layers of an encoder, stacked along a leading axis."""
    return eqx.filter_vmap(lambda: EncoderLayer(config), axis_size=config.num_hidden_layers)()


def run_layers(layers: EncoderLayer, x: Float[Array, "tokens dim"]) -> Float[Array, "tokens dim"]:
    """Apply stacked layers one after the other."""
    return jax.lax.scan(lambda x, layer: (layer(x), None), x, layers)[0]


class VisionTransformer(eqx.Module):
    """From a normalised image to the class token after the last norm."""

    patch_embedding: Linear
    class_embedding: Float[Array, " dim"]
    position_embedding: Float[Array, "positions dim"]
    register_tokens: Float[Array, "registers dim"] | None
    pre_layrnorm: LayerNorm | None
    layers: EncoderLayer
    post_layernorm: LayerNorm
    config: VisionConfig = eqx.field(static=True)

    def __init__(self, config: VisionConfig):
        encoder, (rows, columns) = config.encoder, config.grid
        dim = encoder.hidden_size
        self.patch_embedding = Linear(3 * config.patch_size**2, dim, config.has_patch_bias)
        self.class_embedding = jnp.zeros(dim)
        self.position_embedding = jnp.zeros((1 + rows * columns, dim))
        self.register_tokens = jnp.zeros((config.num_registers, dim)) if config.num_registers else None
        self.pre_layrnorm = LayerNorm(encoder) if config.has_pre_norm else None
        self.layers = stacked_layers(encoder)
        self.post_layernorm = LayerNorm(encoder)
        self.config = config

    def __call__(self, image: Float[Array, "height width 3"]) -> Float[Array, " dim"]:
        return self.post_layernorm(self._run(image)[:1])[0]

    def patches(self, image: Float[Array, "height width 3"], has_norm: bool) -> Float[Array, "rows columns dim"]:
        """The tokens of the patches after the layers, and after the last norm too if it is one for them (`has_norm`)."""
        tokens = self._run(image)[1 + self.config.num_registers :]
        return (self.post_layernorm(tokens) if has_norm else tokens).reshape(*self.config.grid, -1)

    def _run(self, image: Float[Array, "height width 3"]) -> Float[Array, "tokens dim"]:
        tokens = jnp.concatenate([self.class_embedding[None], self.patch_embedding(self._patches(image))])
        tokens = tokens + self.position_embedding
        if self.register_tokens is not None:
            tokens = jnp.concatenate([tokens[:1], self.register_tokens, tokens[1:]])
        if self.pre_layrnorm is not None:
            tokens = self.pre_layrnorm(tokens)
        return run_layers(self.layers, tokens)

    def _patches(self, image: Float[Array, "height width 3"]) -> Float[Array, "patches values"]:
        """Row-major patches, each flattened as (channel, row, column), which is the order of a PyTorch convolution."""
        (rows, columns), side = self.config.grid, self.config.patch_size
        whole = image[: rows * side, : columns * side].reshape(rows, side, columns, side, 3)
        return whole.transpose(0, 2, 4, 1, 3).reshape(rows * columns, -1)
