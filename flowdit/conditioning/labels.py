"""Classes: records of latent and label, the class-conditional DiT."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Int, PRNGKeyArray

from flowdit.conditioning.base import DEFAULT_PREVIEWS, Conditioning, Example, Exported, Requests, repeated
from flowdit.conditioning.meta import ConditioningMeta
from flowdit.config import Config, TrainConfig, as_list
from flowdit.data.manifest import Manifest
from flowdit.data.mixture import Mixture
from flowdit.data.schema import Field, LabelField
from flowdit.models.config import DiTConfig, ModelConfig
from flowdit.models.dit import DiT, build_dit


@dataclasses.dataclass(frozen=True)
class Labels(Conditioning):
    """Conditioning on a class number; the null class comes after the last one (DiT)."""

    class_names: tuple[str, ...]

    model = "ccdit"
    starts_from = ("ccdit",)
    request_args = ("labels",)
    preview_field = "sample_labels"
    same_in_mixtures = ("class_names",)

    @classmethod
    def for_training(cls, config: Config, manifest: Manifest, mesh: Mesh) -> Labels:
        if not manifest.class_names:
            raise ValueError(
                f"data.path: {config.data.path} has no classes, which conditioning=labels needs; "
                "conditioning=none trains without, stage 2 on captions"
            )
        labels = cls(manifest.class_names)
        labels.resolve("train.sample_labels", config.train.sample_labels)
        return labels

    @classmethod
    def from_checkpoint(cls, config: Config, manifest: Manifest, meta: ConditioningMeta) -> Labels:
        if not manifest.class_names:
            raise ValueError("class_names: must hold the classes of a model that takes labels, got none")
        return cls(manifest.class_names)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def build_model(self, config: DiTConfig, channels: int, *, key: PRNGKeyArray) -> DiT:
        return build_dit(config, channels, self.num_classes, key=key)

    def fields(self) -> dict[str, Field]:
        return {"label": LabelField(self.num_classes)}

    def condition(self, example: Example) -> Int[Array, ""]:
        return example["label"]

    def null(self, condition: Int[Array, ""]) -> Int[Array, ""]:
        return jnp.full_like(condition, self.num_classes)

    def requests(self, count: int = 1, labels: Any = None) -> Requests:
        """Classes by number or name, one or a list; by default a selection of all."""
        return self._requests(repeated(self.resolve("labels", as_list(labels)), count))

    def previews(self, train: TrainConfig, data: Mixture | None) -> Requests:
        return self._requests(self.resolve("train.sample_labels", train.sample_labels))

    def _requests(self, numbers: list[int]) -> Requests:
        def encode(rows: Sequence[int]) -> tuple[Array, Array]:
            condition = jnp.asarray([numbers[row] for row in rows], jnp.int32)
            return condition, jax.vmap(self.null)(condition)

        captions = [self.class_names[number] for number in numbers]
        return Requests(captions, encode, lambda row: {"labels": numbers[row]})

    def resolve(self, field: str, labels: Sequence[Any] | None) -> list[int]:
        """Class numbers for numbers or names; by default `DEFAULT_PREVIEWS` evenly spaced classes."""
        if labels is None:
            count = min(DEFAULT_PREVIEWS, self.num_classes)
            return [i * self.num_classes // count for i in range(count)]
        if not labels:
            raise ValueError(f"{field}: must name at least one class, got []")
        return [self._number(field, label) for label in labels]

    def _number(self, field: str, label: Any) -> int:
        names = self.class_names
        if isinstance(label, str) and label in names:
            return names.index(label)
        number = int(label) if isinstance(label, int) or str(label).isdigit() else -1
        if isinstance(label, bool) or not 0 <= number < len(names):
            # Similar names first, as the intended class is likely among them.
            shown = [*difflib.get_close_matches(str(label), names), *names]
            known = ", ".join(dict.fromkeys(shown[:8])) + (", ..." if len(names) > 8 else "")
            raise ValueError(f"{field}: must be in [0, {len(names)}) or a class name ({known}), got {label!r}")
        return number

    @property
    def summary(self) -> str:
        return f"{self.num_classes} classes"

    def exported(self) -> Exported:
        # By number: the hub interprets a list of strings in `model_index.json` as a component.
        names = {str(number): name for number, name in enumerate(self.class_names)}
        return Exported(
            f"Class-conditional ({self.num_classes})", "pipe(class_labels=[0])", values={"class_names": names}
        )

    def unlike(self, theirs: Conditioning) -> str | None:
        if not isinstance(theirs, Labels) or self.class_names == theirs.class_names:
            return super().unlike(theirs)
        if len(theirs.class_names) != len(self.class_names):
            return f"must have the {len(self.class_names)} classes of the model, it has {len(theirs.class_names)}"
        pairs = zip(self.class_names, theirs.class_names, strict=True)
        number, (ours, other) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
        return f"must have the classes of the model in their order, class {number} is {ours!r}, its own is {other!r}"

    def fresh_parts(self, theirs: Conditioning, their_model: ModelConfig, model: ModelConfig) -> dict[str, str]:
        count = theirs.num_classes if isinstance(theirs, Labels) else 0
        if count == self.num_classes:
            return {}
        return {"class_table": f"it has {count} classes, the data have {self.num_classes}"}

    def differences(self, theirs: Conditioning) -> list[str]:
        if not isinstance(theirs, Labels) or theirs.num_classes != self.num_classes:
            return []
        pairs = list(zip(theirs.class_names, self.class_names, strict=True))
        renamed = [f"{before} is now {now}" for before, now in pairs if before != now]
        some = ", ".join(renamed[:3])
        return [f"{len(renamed)} of its {len(pairs)} classes have other names: {some}"] if renamed else []
