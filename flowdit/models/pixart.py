"""Text-conditional DiT of PixArt-alpha (Chen et al. 2023): adaLN-single and cross-attention, predicting the velocity."""

from __future__ import annotations

from typing import NamedTuple, cast

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from flowdit.models.layers import (
    MLP,
    CrossAttention,
    Linear,
    SelfAttention,
    TimeEmbedding,
    cross_attention,
    layer_norm,
    mlp,
    modulate,
    normal_linear,
    self_attention,
    time_embedding,
    xavier_linear,
    zero_linear,
)
from flowdit.models.transformer import ModelConfig, embed_patches, project_velocity, scan_blocks
from flowdit.sharding import gather


class TextCondition(NamedTuple):
    """What one image is to show.

    `features` are the text encoder's, of any float dtype; `mask` is True at real tokens. Where `dropped`, or where the
    mask is False everywhere, there is no caption: the null condition of classifier-free guidance.
    `size` is height and width in pixels, needed with micro-conditioning only.
    """

    features: Float[Array, "tokens text_dim"]
    mask: Bool[Array, " tokens"]
    dropped: Bool[Array, ""]
    size: Float[Array, "2"] | None = None


class SizeEmbedding(eqx.Module):
    """Height, width and aspect ratio (height / width), a third of the channels each (PixArt-alpha at 1024 pixels)."""

    side: TimeEmbedding
    aspect: TimeEmbedding

    def __call__(self, size: Float[Array, "2"]) -> Float[Array, " dim"]:
        height, width = size
        return jnp.concatenate([self.side(height), self.side(width), self.aspect(height / width)])


class Block(eqx.Module):
    """Self-attention and MLP, modulated and gated; between them cross-attention to the text, without norm or gate.

    `table` is added to the modulation that all blocks share (adaLN-single, section 2.3). Both are in the order shift,
    scale, gate of the attention, then of the MLP.
    """

    attention: SelfAttention
    cross_attention: CrossAttention
    mlp: MLP
    table: Float[Array, "6 dim"]
    mlp_norm_eps: float = eqx.field(static=True, default=1e-6)

    def __call__(
        self,
        x: Float[Array, "tokens dim"],
        modulation: Float[Array, "6 dim"],
        text: Float[Array, "text_tokens dim"],
        mask: Bool[Array, " text_tokens"],
    ) -> Float[Array, "tokens dim"]:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.table + modulation
        x = x + gate_a[None] * self.attention(modulate(layer_norm(x), shift_a, scale_a))
        x = x + self.cross_attention(x, text, mask)
        return x + gate_m[None] * self.mlp(modulate(layer_norm(x, self.mlp_norm_eps), shift_m, scale_m))


class PixArt(eqx.Module):
    """DiT over one latent, conditioned on the flow time and a text.

    `null_caption` stands for the features of a dropped caption: one vector for every token, or one for each token (the
    original PixArt-alpha), and then texts must have as many tokens. `blocks` holds every block with a
    leading depth axis.
    """

    patch_embed: Linear
    time_embed: TimeEmbedding
    size_embed: SizeEmbedding | None
    caption_proj: MLP
    null_caption: Float[Array, "*null_tokens text_dim"]
    time_block: Linear
    blocks: Block
    final_table: Float[Array, "2 dim"]
    final_linear: Linear
    latent_shape: tuple[int, int, int] = eqx.field(static=True)
    patch_size: int = eqx.field(static=True)
    remat: str = eqx.field(static=True, default="none")
    interpolation_scale: float = eqx.field(static=True, default=1.0)

    @property
    def text_dim(self) -> int:
        return self.null_caption.shape[-1]

    def __call__(
        self, x_t: Float[Array, "channels height width"], t: Float[Array, ""], condition: TextCondition
    ) -> Float[Array, "channels height width"]:
        """Velocity at `x_t`, flow time `t` in [0, 1] (0 data, 1 noise). Runs in the dtype of the parameters, returns float32.

        Raises `ValueError` if the condition lacks a size that the model was built to see.
        """
        embedding = self._embed_time_and_size(t, condition)
        modulation = gather(self.time_block, "time_block")(jax.nn.silu(embedding)).reshape(6, -1)
        text = self.caption_proj(self._caption(condition))
        x = embed_patches(x_t, self.patch_embed, self.patch_size, self.interpolation_scale)
        x = scan_blocks(self.blocks, x, modulation, text, condition.mask, remat=self.remat)
        shift, scale = self.final_table + embedding[None]
        return project_velocity(x, shift, scale, self.final_linear, self.patch_size, self.latent_shape)

    def _embed_time_and_size(self, t: Array, condition: TextCondition) -> Float[Array, " dim"]:
        if self.size_embed is None:
            return self.time_embed(t)
        if condition.size is None:
            raise ValueError("TextCondition.size: must be given with model.micro_conditioning=true, got None")
        return self.time_embed(t) + self.size_embed(condition.size)

    def _caption(self, condition: TextCondition) -> Float[Array, "tokens text_dim"]:
        """The text features or the null caption. Where that is one vector, the mask is immaterial to it."""
        is_null = condition.dropped | ~condition.mask.any()
        # Texts may be padded to less than the null caption's length; their masks end before.
        null = self.null_caption.reshape(-1, self.text_dim)[: condition.features.shape[0]]
        return jnp.where(is_null, null, condition.features.astype(null.dtype))


def build_pixart(
    config: ModelConfig, latent_shape: tuple[int, int, int], text_dim: int, *, key: PRNGKeyArray
) -> PixArt:
    """A freshly initialised float32 model, as PixArt-alpha does it.

    Xavier linears; normal(0.02) time, size and caption MLPs and t block; tables and null caption normal over the root
    of their width; zero cross-attention outputs and final layer.
    """
    dim, patch_dim = config.hidden_dim, config.patch_size**2 * latent_shape[0]
    keys = iter(jax.random.split(key, 9))
    build_block = lambda key: _block(config, key=key)
    return PixArt(
        patch_embed=xavier_linear(patch_dim, dim, key=next(keys)),
        time_embed=time_embedding(dim, freq_shift=config.time_freq_shift, scale=config.time_scale, key=next(keys)),
        size_embed=_size_embedding(dim, key=next(keys)) if config.micro_conditioning else None,
        caption_proj=MLP(normal_linear(text_dim, dim, key=next(keys)), normal_linear(dim, dim, key=next(keys))),
        null_caption=_null_caption(config.null_tokens, text_dim, key=next(keys)),
        time_block=normal_linear(dim, 6 * dim, key=next(keys)),
        blocks=cast(Block, eqx.filter_vmap(build_block)(jax.random.split(next(keys), config.depth))),
        final_table=jax.random.normal(next(keys), (2, dim)) / dim**0.5,
        final_linear=zero_linear(dim, patch_dim),
        latent_shape=latent_shape,
        patch_size=config.patch_size,
        remat=config.remat,
        interpolation_scale=config.interpolation_scale,
    )


def _block(config: ModelConfig, *, key: PRNGKeyArray) -> Block:
    dim = config.hidden_dim
    attention_key, cross_key, mlp_key, table_key = jax.random.split(key, 4)
    return Block(
        attention=self_attention(dim, config.num_heads, config.qk_norm, key=attention_key),
        cross_attention=cross_attention(dim, config.num_heads, config.qk_norm, key=cross_key),
        mlp=mlp(dim, int(dim * config.mlp_ratio), key=mlp_key),
        table=jax.random.normal(table_key, (6, dim)) / dim**0.5,
        mlp_norm_eps=config.mlp_norm_eps,
    )


def _null_caption(tokens: int, text_dim: int, *, key: PRNGKeyArray) -> Float[Array, "*null_tokens text_dim"]:
    shape = (text_dim,) if tokens == 1 else (tokens, text_dim)
    return jax.random.normal(key, shape) / text_dim**0.5


def _size_embedding(dim: int, *, key: PRNGKeyArray) -> SizeEmbedding:
    side_key, aspect_key = jax.random.split(key)
    side, aspect = (time_embedding(dim // 3, scale=1.0, key=k) for k in (side_key, aspect_key))
    return SizeEmbedding(side, aspect)
