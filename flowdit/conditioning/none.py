"""No condition: records with only a latent, and a DiT whose class table has only the null class."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Int, PRNGKeyArray

from flowdit.conditioning.base import DEFAULT_PREVIEWS, Conditioning, Example, Exported, Requests
from flowdit.conditioning.meta import ConditioningMeta
from flowdit.config import Config, TrainConfig
from flowdit.data.manifest import Manifest
from flowdit.data.mixture import Mixture
from flowdit.data.schema import Field
from flowdit.models.config import DiTConfig, ModelConfig
from flowdit.models.dit import DiT, build_dit


@dataclasses.dataclass(frozen=True)
class Unconditional(Conditioning):
    """No conditioning. Labels and captions of the records are ignored; there is no dropout and no guidance."""

    model = "ccdit"
    starts_from = ("ccdit",)

    @classmethod
    def for_training(cls, config: Config, manifest: Manifest, mesh: Mesh) -> Unconditional:
        return cls()

    @classmethod
    def from_checkpoint(cls, config: Config, manifest: Manifest, meta: ConditioningMeta) -> Unconditional:
        return cls()

    def build_model(self, config: DiTConfig, channels: int, *, key: PRNGKeyArray) -> DiT:
        return build_dit(config, channels, num_classes=0, key=key)

    def fields(self) -> dict[str, Field]:
        return {}

    def condition(self, example: Example) -> Int[Array, ""]:
        return jnp.asarray(0, jnp.int32)  # the only row of the class table

    def null(self, condition: Int[Array, ""]) -> Int[Array, ""]:
        return condition

    def requests(self, count: int = 1) -> Requests:
        def encode(rows: Sequence[int]) -> tuple[Array, None]:
            return jnp.zeros(len(rows), jnp.int32), None

        return Requests([""] * count, encode, lambda row: {})

    def previews(self, train: TrainConfig, data: Mixture | None) -> Requests:
        return self.requests(DEFAULT_PREVIEWS)

    @property
    def summary(self) -> str:
        return "without condition"

    def exported(self) -> Exported:
        return Exported("Unconditional", "pipe(num_images=1)")

    def fresh_parts(self, theirs: Conditioning, their_model: ModelConfig, model: ModelConfig) -> dict[str, str]:
        return {} if isinstance(theirs, Unconditional) else {"class_table": "this run has no classes"}
