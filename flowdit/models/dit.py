"""Class-conditional DiT with adaLN-Zero (Peebles & Xie 2023), predicting the flow-matching velocity."""

from __future__ import annotations

from typing import cast

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from flowdit.models.layers import (
    MLP,
    Linear,
    SelfAttention,
    TimeEmbedding,
    layer_norm,
    mlp,
    modulate,
    self_attention,
    time_embedding,
    xavier_linear,
    zero_linear,
)
from flowdit.models.transformer import ModelConfig, embed_patches, project_velocity, scan_blocks


class Block(eqx.Module):
    """Pre-norm attention and MLP, each modulated and gated by its own adaLN-Zero projection."""

    attention: SelfAttention
    mlp: MLP
    ada_ln: Linear
    mlp_norm_eps: float = eqx.field(static=True, default=1e-6)

    def __call__(self, x: Float[Array, "tokens dim"], condition: Float[Array, " dim"]) -> Float[Array, "tokens dim"]:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = jnp.split(self.ada_ln(jax.nn.silu(condition)), 6)
        x = x + gate_a[None] * self.attention(modulate(layer_norm(x), shift_a, scale_a))
        return x + gate_m[None] * self.mlp(modulate(layer_norm(x, self.mlp_norm_eps), shift_m, scale_m))


class DiT(eqx.Module):
    """DiT over one latent, conditioned on the flow time and a class.

    The class table has `num_classes + 1` rows; the last is the null class of classifier-free guidance.
    `blocks` holds every block with a leading depth axis: they are scanned, so compile time does not grow with depth.
    """

    patch_embed: Linear
    time_embed: TimeEmbedding
    class_table: Float[Array, "classes dim"]
    blocks: Block
    final_ada_ln: Linear
    final_linear: Linear
    latent_shape: tuple[int, int, int] = eqx.field(static=True)
    patch_size: int = eqx.field(static=True)
    remat: str = eqx.field(static=True, default="none")
    interpolation_scale: float = eqx.field(static=True, default=1.0)

    @property
    def null_label(self) -> int:
        return self.class_table.shape[0] - 1

    def __call__(
        self, x_t: Float[Array, "channels height width"], t: Float[Array, ""], label: Int[Array, ""]
    ) -> Float[Array, "channels height width"]:
        """Velocity at `x_t`, flow time `t` in [0, 1] (0 data, 1 noise). Runs in the dtype of the parameters, returns float32."""
        condition = self.time_embed(t) + self.class_table[label]
        x = embed_patches(x_t, self.patch_embed, self.patch_size, self.interpolation_scale)
        x = scan_blocks(self.blocks, x, condition, remat=self.remat)
        shift, scale = jnp.split(self.final_ada_ln(jax.nn.silu(condition)), 2)
        return project_velocity(x, shift, scale, self.final_linear, self.patch_size, self.latent_shape)


def build_dit(config: ModelConfig, latent_shape: tuple[int, int, int], num_classes: int, *, key: PRNGKeyArray) -> DiT:
    """A freshly initialised float32 model (Xavier linears, normal(0.02) tables, zero adaLN outputs and final layer)."""
    dim, patch_dim = config.hidden_dim, config.patch_size**2 * latent_shape[0]
    patch_key, time_key, class_key, block_key = jax.random.split(key, 4)

    def block(key):
        attention_key, mlp_key = jax.random.split(key)
        attention = self_attention(dim, config.num_heads, config.qk_norm, key=attention_key)
        feed_forward = mlp(dim, int(dim * config.mlp_ratio), key=mlp_key)
        return Block(attention, feed_forward, zero_linear(dim, 6 * dim), config.mlp_norm_eps)

    return DiT(
        patch_embed=xavier_linear(patch_dim, dim, key=patch_key),
        time_embed=time_embedding(dim, freq_shift=config.time_freq_shift, scale=config.time_scale, key=time_key),
        class_table=0.02 * jax.random.normal(class_key, (num_classes + 1, dim)),
        blocks=cast(Block, eqx.filter_vmap(block)(jax.random.split(block_key, config.depth))),
        final_ada_ln=zero_linear(dim, 2 * dim),
        final_linear=zero_linear(dim, patch_dim),
        latent_shape=latent_shape,
        patch_size=config.patch_size,
        remat=config.remat,
        interpolation_scale=config.interpolation_scale,
    )
