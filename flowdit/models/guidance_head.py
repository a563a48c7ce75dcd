"""The guidance head: a second final layer after an earlier block, for Internal Guidance (Zhou et al. 2025)."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flowdit.models.config import ModelConfig
from flowdit.models.layers import Linear, zero_linear
from flowdit.models.trunk import TrunkSettings, project_velocity
from flowdit.sharding import REPLICATED, ParameterSpec


class GuidanceHead(eqx.Module):
    """The velocity from the tokens after block `depth`; weaker than the network's, so that guidance can move away from it.

    As the final layer of its network it has a modulation of its own, `ada_ln`, or a table that is added to the embedding
    of the time.
    """

    ada_ln: Linear | None
    table: Float[Array, "2 dim"] | None
    linear: Linear
    depth: int = eqx.field(static=True)

    def __call__(
        self,
        x: Float[Array, "tokens dim"],
        embedding: Float[Array, " dim"],
        settings: TrunkSettings,
        latent_shape: tuple[int, ...],
    ) -> Float[Array, "channels height width"]:
        """`embedding` is that of the time, with the class in a class model."""
        if self.table is not None:
            modulation = self.table + embedding[None]
        else:
            assert self.ada_ln is not None
            modulation = self.ada_ln(jax.nn.silu(embedding)).reshape(2, -1)
        return project_velocity(x, modulation, self.linear, settings, latent_shape, name="guidance_head")

    def parameter_specs(self) -> dict[str, ParameterSpec]:
        return {"table": REPLICATED}


def build_guidance_head(config: ModelConfig, channels: int, *, has_text: bool) -> GuidanceHead | None:
    """The head of `config.guidance_head`, all zeros, so that its velocity is 0 at first; None without one."""
    if config.guidance_head is None:
        return None
    dim = config.hidden_dim
    return GuidanceHead(
        ada_ln=None if has_text else zero_linear(dim, 2 * dim),
        table=jnp.zeros((2, dim)) if has_text else None,
        linear=zero_linear(dim, config.patch_size**2 * channels),
        depth=config.guidance_head,
    )


def required(head: GuidanceHead | None) -> GuidanceHead:
    """The head. Raises `ValueError` if the network has none."""
    if head is None:
        raise ValueError("weak: the network has no guidance head (model.guidance_head)")
    return head
