"""Class-conditional DiT with adaLN-Zero (Peebles & Xie 2023), predicting the flow-matching velocity."""

from __future__ import annotations

from collections.abc import Iterable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from flowdit.models.config import DiTConfig
from flowdit.models.guidance_head import GuidanceHead, build_guidance_head, required
from flowdit.models.layers import Linear, TimeEmbedding, time_embedding, xavier_linear, zero_linear
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


class DiT(eqx.Module):
    """DiT over one latent of any size, conditioned on the flow time and a class.

    The class table has `num_classes + 1` rows; the last is the null class of classifier-free guidance.
    `blocks` holds all blocks, every array with a leading depth axis.
    """

    patch_embed: Linear
    time_embed: TimeEmbedding
    class_table: Float[Array, "classes dim"]
    blocks: Block
    final_ada_ln: Linear
    final_linear: Linear
    settings: TrunkSettings = eqx.field(static=True)
    guidance_head: GuidanceHead | None = None

    @property
    def null_label(self) -> int:
        return self.class_table.shape[0] - 1

    def __call__(
        self, x_t: Float[Array, "channels height width"], t: Float[Array, ""], label: Int[Array, ""]
    ) -> Float[Array, "channels height width"]:
        """Velocity at `x_t`, flow time `t` in [0, 1] (0 data, 1 noise). Runs in the dtype of the parameters, returns float32."""
        return self.run(x_t, t, label).velocity

    def run(
        self,
        x_t: Float[Array, "channels height width"],
        t: Float[Array, ""],
        label: Int[Array, ""],
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
        condition = self.time_embed(t) + self.class_table[label]
        observe("condition", condition)
        x, angles = embed_patches(x_t, self.patch_embed, self.settings, self.blocks.attention.head_dim)
        hidden = run_blocks(
            self.blocks,
            x,
            BlockInputs(condition, angles),
            remat=self.settings.remat,
            scan=self.settings.scan_blocks,
            depths=depths if head is None else [*depths, head.depth],
            route=route,
            key=key,
        )
        modulation = jnp.split(self.final_ada_ln(jax.nn.silu(condition)), 2)
        velocity = project_velocity(hidden.x, modulation, self.final_linear, self.settings, x_t.shape)
        asked = {depth: hidden.depths[depth] for depth in depths}
        if head is None:
            return Output(velocity, asked)
        return Output(velocity, asked, head(hidden.depths[head.depth], condition, self.settings, x_t.shape))

    def parameter_specs(self) -> dict[str, ParameterSpec | str]:
        return {"class_table": REPLICATED, "blocks": STACKED}


def build_dit(config: DiTConfig, channels: int, num_classes: int, *, key: PRNGKeyArray) -> DiT:
    """A freshly initialised float32 model of latents with `channels` channels.

    Xavier linears, normal(0.02) class table and time MLP, zero adaLN outputs and final layer.
    """
    dim, patch_dim = config.hidden_dim, config.patch_size**2 * channels
    patch_key, time_key, class_key, block_key = jax.random.split(key, 4)
    return DiT(
        patch_embed=xavier_linear(patch_dim, dim, key=patch_key),
        time_embed=time_embedding(dim, freq_shift=config.time_freq_shift, scale=config.time_scale, key=time_key),
        class_table=0.02 * jax.random.normal(class_key, (num_classes + 1, dim)),
        blocks=build_blocks(config, has_text=False, key=block_key),
        final_ada_ln=zero_linear(dim, 2 * dim),
        final_linear=zero_linear(dim, patch_dim),
        settings=TrunkSettings.of(config),
        guidance_head=build_guidance_head(config, channels, has_text=False),
    )
