"""Text-conditional DiT of PixArt-alpha (Chen et al. 2023): adaLN-single and cross-attention, predicting the velocity."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from flowdit.fsdp import gather
from flowdit.models.config import PixArtConfig
from flowdit.models.guidance_head import GuidanceHead, build_guidance_head, required
from flowdit.models.layers import MLP, Linear, TimeEmbedding, normal_linear, time_embedding, xavier_linear, zero_linear
from flowdit.models.observe import observe
from flowdit.models.trunk import (
    Block,
    BlockInputs,
    Output,
    Route,
    TrunkSettings,
    build_blocks,
    embed_patches,
    project_velocity,
    run_blocks,
)
from flowdit.sharding import REPLICATED, STACKED, ParameterSpec


class TextCondition(NamedTuple):
    """The condition of one image.

    `features` are the text encoder's, of any float dtype; `mask` is True at real tokens. Where `dropped`, or where the
    mask is False everywhere, there is no caption: the null condition of classifier-free guidance.
    `size` is height and width of the image in pixels, needed with micro-conditioning only.
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


class PixArt(eqx.Module):
    """DiT over one latent of any size, conditioned on the flow time and a text.

    `null_caption` stands for the features of a dropped caption: one vector for every token, or one for each token (the
    original PixArt-alpha), and then texts must have as many tokens. `blocks` holds all blocks, every array with a leading
    depth axis.
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
    settings: TrunkSettings = eqx.field(static=True)
    guidance_head: GuidanceHead | None = None

    @property
    def text_dim(self) -> int:
        return self.null_caption.shape[-1]

    def __call__(
        self, x_t: Float[Array, "channels height width"], t: Float[Array, ""], condition: TextCondition
    ) -> Float[Array, "channels height width"]:
        """Velocity at `x_t`, flow time `t` in [0, 1] (0 data, 1 noise). Runs in the dtype of the parameters, returns float32.

        Raises `ValueError` if the model is conditioned on the image size and the condition has none.
        """
        return self.run(x_t, t, condition).velocity

    def run(
        self,
        x_t: Float[Array, "channels height width"],
        t: Float[Array, ""],
        condition: TextCondition,
        *,
        depths: Iterable[int] = (),
        weak: bool = False,
        route: Route | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Output:
        """Velocity, the tokens after the blocks `depths`, and with `weak` the velocity of the guidance head.

        See `run_blocks` for `depths`, `route` and `key`. Raises `ValueError` for `weak` without a guidance head.
        """
        head = required(self.guidance_head) if weak else None
        depths = tuple(depths)
        embedding = self._embed_time_and_size(t, condition)
        observe("condition", embedding)
        modulation = gather(self.time_block)(jax.nn.silu(embedding)).reshape(6, -1)
        text = self.caption_proj(self._caption(condition))
        observe("caption_proj", text)
        x, angles = embed_patches(x_t, self.patch_embed, self.settings, self.blocks.attention.head_dim)
        hidden = run_blocks(
            self.blocks,
            x,
            BlockInputs(modulation, angles, text, condition.mask),
            remat=self.settings.remat,
            scan=self.settings.scan_blocks,
            depths=depths if head is None else [*depths, head.depth],
            route=route,
            key=key,
        )
        modulation = self.final_table + embedding[None]
        velocity = project_velocity(hidden.x, modulation, self.final_linear, self.settings, x_t.shape)
        asked = {depth: hidden.depths[depth] for depth in depths}
        if head is None:
            return Output(velocity, asked)
        return Output(velocity, asked, head(hidden.depths[head.depth], embedding, self.settings, x_t.shape))

    def parameter_specs(self) -> dict[str, ParameterSpec | str]:
        return {"null_caption": REPLICATED, "blocks": STACKED, "final_table": REPLICATED}

    def _embed_time_and_size(self, t: Array, condition: TextCondition) -> Float[Array, " dim"]:
        if self.size_embed is None:
            return self.time_embed(t)
        if condition.size is None:
            raise ValueError("TextCondition.size: must be given with model.micro_conditioning=true, got None")
        return self.time_embed(t) + self.size_embed(condition.size)

    def _caption(self, condition: TextCondition) -> Float[Array, "tokens text_dim"]:
        """The text features or the null caption. If that is one vector, the mask has no effect."""
        is_null = condition.dropped | ~condition.mask.any()
        # Texts may be padded to less than the null caption's length; their masks end before.
        null = self.null_caption.reshape(-1, self.text_dim)[: condition.features.shape[0]]
        return jnp.where(is_null, null, condition.features.astype(null.dtype))


def build_pixart(config: PixArtConfig, channels: int, text_dim: int, *, key: PRNGKeyArray) -> PixArt:
    """A freshly initialised float32 model of latents with `channels` channels, initialised as in PixArt-alpha.

    Xavier linears; normal(0.02) time, size and caption MLPs and t block; tables and null caption normal over the root
    of their width; zero cross-attention outputs and final layer.
    """
    dim, patch_dim = config.hidden_dim, config.patch_size**2 * channels
    keys = iter(jax.random.split(key, 9))
    return PixArt(
        patch_embed=xavier_linear(patch_dim, dim, key=next(keys)),
        time_embed=time_embedding(dim, freq_shift=config.time_freq_shift, scale=config.time_scale, key=next(keys)),
        size_embed=_size_embedding(dim, key=next(keys)) if config.micro_conditioning else None,
        caption_proj=MLP(normal_linear(text_dim, dim, key=next(keys)), normal_linear(dim, dim, key=next(keys))),
        null_caption=_null_caption(config.null_tokens, text_dim, key=next(keys)),
        time_block=normal_linear(dim, 6 * dim, key=next(keys), axes=("embed", "modulation"), parts=6),
        blocks=build_blocks(config, has_text=True, key=next(keys)),
        final_table=jax.random.normal(next(keys), (2, dim)) / dim**0.5,
        final_linear=zero_linear(dim, patch_dim),
        settings=TrunkSettings.of(config),
        guidance_head=build_guidance_head(config, channels, has_text=True),
    )


def _null_caption(tokens: int, text_dim: int, *, key: PRNGKeyArray) -> Float[Array, "*null_tokens text_dim"]:
    shape = (text_dim,) if tokens == 1 else (tokens, text_dim)
    return jax.random.normal(key, shape) / text_dim**0.5


def _size_embedding(dim: int, *, key: PRNGKeyArray) -> SizeEmbedding:
    side_key, aspect_key = jax.random.split(key)
    side, aspect = (time_embedding(dim // 3, scale=1.0, key=k) for k in (side_key, aspect_key))
    return SizeEmbedding(side, aspect)
