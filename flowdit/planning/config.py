"""The settings of `python -m flowdit.plan`: those of training, and its own."""

from __future__ import annotations

import dataclasses
from typing import Any

from flowdit.config import Config, as_list
from flowdit.fields import require, under
from flowdit.planning.machines import Topology, parse_topology


@dataclasses.dataclass
class DataShape:
    """The shapes of the training data, where they are not those of the data set at `data.path`.

    Attributes:
        latent: channels, height and width of latents; null: those of the data set, or `[16,32,32]` (SD3's VAE at 256 px)
            if `data.path` has none yet.
        classes: number of classes, with `conditioning=labels`; null: that of the data set, or 1000.
        text_width: width of the text features; null: 256 with `text.encoder=wordllama`, else 2304 (T5Gemma-2B).
        features: rows, columns and width of the feature maps of auxiliary losses that read them; null: those of
            `data.feature_cache`, or `[16,16,768]` (DINOv2-B) if there are none yet.
    """

    latent: list[int] | None = None
    classes: int | None = None
    text_width: int | None = None
    features: list[int] | None = None

    def check(self) -> None:
        """Raise `FieldError` naming the first field that breaks a rule."""
        for name, sides in (("latent", "[channels,height,width]"), ("features", "[rows,columns,width]")):
            value = getattr(self, name)
            is_shape = value is None or (len(value) == 3 and all(side >= 1 for side in value))
            require(name, value, is_shape, f"must be null or three sides {sides}")
        for name in ("classes", "text_width"):
            value = getattr(self, name)
            require(name, value, value is None or value >= 1, "must be null or at least 1")


@dataclasses.dataclass
class PlanConfig(Config):
    """Settings of `python -m flowdit.plan`, besides those of training, which it takes all.

    Attributes:
        topology: machine and shape, one or a list: `v5e:4x4`, `v6e:2x2`, `v5p:2x2x1`, `v5e:1` for one device, `h100:8`,
            `a100-80gb:8`.
        stage: the training command that is planned, 1 or 2; null: that of `experiment=...`, else 1.
        price_per_device_hour: price of an hour of one device, in any currency; null: no price.
        largest_batch: search the largest batch that fits, by bisection; each try is a compilation.
        utilisation: share of the peak that a GPU is assumed to reach; in (0, 1].
        out: folder for `plan.json` and, with several topologies, the chart `plan.png`; null: none is written.
        shape: shapes of the data.
    """

    topology: Any = "???"
    stage: int | None = None
    price_per_device_hour: float | None = None
    largest_batch: bool = False
    utilisation: float = 0.4
    out: str | None = None
    shape: DataShape = dataclasses.field(default_factory=DataShape)

    def topologies(self) -> list[Topology]:
        """The machines to plan for. Raises `FieldError` for one that is not known."""
        names = as_list(self.topology)
        require("topology", self.topology, bool(names), "must name at least one machine")
        assert names is not None
        return [parse_topology(str(name)) for name in names]

    def check(self) -> None:
        super().check()
        self.topologies()
        price = self.price_per_device_hour
        require("price_per_device_hour", price, price is None or price >= 0, "must be null, 0 or more")
        require("utilisation", self.utilisation, 0 < self.utilisation <= 1, "must be in (0, 1]")
        require("stage", self.stage, self.stage in (None, 1, 2), "must be null, 1 or 2")
        with under("shape."):
            self.shape.check()
