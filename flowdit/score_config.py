"""The settings of scores: those that the evaluation of a run and `flowdit.evaluate` share, and those of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flowdit.features import FEATURES, FeatureWeights
from flowdit.fields import require, require_choice

SPLITS = ("validation", "train", "all")
"""The records of a data set that can be a reference."""


@dataclasses.dataclass
class ScoringConfig:
    """What images are compared with, and how.

    Attributes:
        reference: real images to compare with: `data` (records of the run's data set, decoded with its VAE), a folder
            of images, a folder of records, or an `.npz` file of statistics or images in ADM's format.
        reference_split: the records of a data set that are the reference: `validation`, `train` or `all`.
        where: only images of the reference with these values of kept columns, one or a list each, such as
            `{style:noto,held_out:[pair,subject]}`; null: all. Values that look like other numbers or truth values must
            be in quotes: `{subject:"23E9"}`. `labels` and `prompts` of `data` are those of these images.
        reference_resize: crop and resize reference images of another size, as `prepare` does; else they are refused.
        num_images: number of images that are drawn.
        metrics: scores, one or a list; null: all that the feature networks, the reference and the model allow.
        features: feature networks, one or a list: `efficientnet` (embedded), `inception`, `dinov2`, `clip`.
        weights: weights of the feature networks.
        batch_size: maximum number of images per batch.
        cache: folder for features of references; null: `flowdit/features` in the user's cache folder, `~/.cache`.
    """

    reference: str = "data"
    reference_split: str = "validation"
    where: Any = None  # not a dict, whose keys Hydra would have to know
    reference_resize: bool = False
    num_images: int = 5_000
    metrics: Any = None
    features: Any = "efficientnet"
    weights: FeatureWeights = dataclasses.field(default_factory=FeatureWeights)
    batch_size: int = 64
    cache: str | None = None

    def __post_init__(self) -> None:
        self.features = _names(self.features) or []
        self.metrics = _names(self.metrics)

    def check(self) -> None:
        """Raise `FieldError` naming the first field that breaks a rule; `scores.comparison` checks the others."""
        require_choice("reference_split", self.reference_split, SPLITS)
        is_choice = self.where is None or (
            isinstance(self.where, Mapping) and all(map(_has_values, self.where.values()))
        )
        require("where", self.where, is_choice, "must be null or values by column, such as {style: noto}")
        # Hydra reads 23E9 as 2.3e10 and true as True: what was written is lost.
        is_kept = all(not isinstance(one, bool | float) for value in (self.where or {}).values() for one in _all(value))
        rule = "must have texts and whole numbers: put others in quotes, as in 'where={subject:\"23E9\"}'"
        require("where", self.where, is_kept, rule)
        for name in ("num_images", "batch_size"):
            require(name, getattr(self, name), getattr(self, name) >= 1, "must be at least 1")
        require("features", self.features, bool(self.features), "must name at least one feature network")
        require("features", self.features, len(set(self.features)) == len(self.features), "must be different names")
        for name in self.features:
            require_choice("features", name, FEATURES)


@dataclasses.dataclass
class RunScoresConfig(ScoringConfig):
    """Scores of samples during a run, with the EMA weights and `train.sampler`.

    They are logged as `scores/<metric>_<features>`. The images have the same noise, classes or prompts each time.

    Attributes:
        every: steps between scores; 0: never.
    """

    every: int = 0
    num_images: int = 1_000
    metrics: Any = "kid"

    def check(self) -> None:
        super().check()
        require("every", self.every, self.every >= 0, "must be 0 (never) or more")


def _has_values(value: Any) -> bool:
    values = _all(value)
    return bool(values) and all(isinstance(one, str | int | float) for one in values)


def _all(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else [value]


def _names(value: Any) -> list[str] | None:
    if value is None:
        return None
    return [value] if isinstance(value, str) or not isinstance(value, Iterable) else [str(name) for name in value]
