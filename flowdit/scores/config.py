"""The settings of `python -m flowdit.evaluate`."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, NamedTuple

from flowdit.config import SamplingMesh, as_list
from flowdit.fields import FREE_TEXT, FieldError, require, require_choice, shown
from flowdit.inference.prompt_file import read_prompts
from flowdit.joining import check_processes
from flowdit.score_config import ScoringConfig
from flowdit.scores.metrics import METRICS
from flowdit.storage import require_local

SWEPT = ("ema_width", "solver", "steps", "interval", "internal_guidance", "guidance")
"""Settings that may be lists: every combination is one point of a sweep, the last one changing fastest."""


class Point(NamedTuple):
    """One point of a sweep: the changes to the checkpoint's sampler, None for none, and the width of the EMA."""

    ema_width: float | None
    sampler: dict[str, Any]


@dataclasses.dataclass
class EvaluateConfig(ScoringConfig):
    """Settings of `python -m flowdit.evaluate`. Null sampler settings default to the checkpoint's `train.sampler`.

    A list for `guidance`, `internal_guidance`, `interval`, `steps`, `solver` or `ema_width` is a sweep: every combination is
    scored.

    Attributes:
        checkpoint: a checkpoint, a run folder (its newest intact checkpoint), or another `source` of `flowdit.convert`.
        labels: classes of the images of a class model: `data` (drawn with the frequencies of the reference), `balanced`
            (as many of each), or numbers or names, one or a list.
        prompts: prompts of the images of a text model: `data` (captions of the reference), or one or a list.
        prompts_file: text file with one prompt per line, instead of `prompts`.
        negative_prompt: text that guidance moves away from; empty: the model's null caption.
        seed: seed of noise, labels, and the random subsets of scores; in [0, 2**32).
        solver: solver of the ODE, as `train.sampler.solver`, one or a list.
        steps: number of steps of the solver, one or a list.
        guidance: weight of guidance, one or a list.
        internal_guidance: as `train.sampler.internal_guidance`, one or a list.
        interval: lowest and highest flow time with guidance, `[low,high]`, or a list of such pairs.
        time_shift: as `train.sampler.time_shift`.
        rtol: as `train.sampler.rtol`.
        ema_width: width of a power-function average made from the run's snapshots, one or a list; null: the plain EMA.
        guide: a weaker model that guides instead of the null condition, as `checkpoint`; null: none.
        best: the score by which the best point is marked, in the first of `features` that has it; null: the first of
            `metrics`.
        save_best: write the sampler of the best point into the checkpoint, as the default for sampling.
        save_images: also write the images as PNG files, to a folder that `scores.json` names for each point.
        keep_features: keep the features of the images, so that with this setting other scores of the same images take
            seconds.
        out: folder for `scores.json`, charts, and what is needed to go on after a kill.
        vae: folder or hub id of the VAE of the latents; null: the one used by `prepare`.
        text_encoder: folder or hub id of the text encoder; null: the one of the training run.
        mesh: processes.
    """

    checkpoint: str = "???"
    labels: Any = "data"
    prompts: Any = dataclasses.field(default="data", metadata=FREE_TEXT)
    prompts_file: str | None = None
    negative_prompt: str = dataclasses.field(default="", metadata=FREE_TEXT)
    seed: int = 0
    solver: Any = None
    steps: Any = None
    guidance: Any = None
    internal_guidance: Any = None
    interval: Any = None
    time_shift: float | None = None
    rtol: float | None = None
    ema_width: Any = None
    guide: str | None = None
    best: str | None = None
    save_best: bool = False
    save_images: bool = False
    keep_features: bool = False
    out: str = "scores"
    vae: str | None = None
    text_encoder: str | None = None
    mesh: SamplingMesh = dataclasses.field(default_factory=SamplingMesh)

    def __post_init__(self) -> None:
        super().__post_init__()
        pair = as_list(self.interval)
        self.interval = [pair] if pair and not any(isinstance(value, list | tuple) for value in pair) else pair

    def points(self) -> list[Point]:
        """Every combination of the settings in `SWEPT`, in their order."""
        axes = [as_list(getattr(self, name)) or [None] for name in SWEPT]
        return [self._point(**dict(zip(SWEPT, values, strict=True))) for values in itertools.product(*axes)]

    def _point(self, ema_width: Any, interval: Any, guidance: Any, internal_guidance: Any, **others: Any) -> Point:
        numbers = dict(zip(("guidance_low", "guidance_high"), interval or (), strict=False))
        numbers |= {"guidance": guidance, "internal_guidance": internal_guidance}
        sampler = others | {name: value if value is None else float(value) for name, value in numbers.items()}
        return Point(ema_width, sampler | {"time_shift": self.time_shift, "rtol": self.rtol})

    def given_prompts(self) -> Any:
        """`prompts`, or the lines of `prompts_file`. Raises `ValueError` for a file without prompts."""
        return self.prompts if self.prompts_file is None else read_prompts(self.prompts_file)

    def check(self) -> None:
        """Raise `FieldError` naming the first field that breaks a rule; models and references check the others."""
        check_processes(self.mesh)
        require_local("out", self.out)
        super().check()
        require("seed", self.seed, 0 <= self.seed < 2**32, "must be in [0, 2**32)")
        for name in self.metrics or []:
            require_choice("metrics", name, METRICS)
        if self.guide is not None and self.negative_prompt:
            rule = "must not be given with a guide, which replaces it"
            raise FieldError("negative_prompt", f"{rule}, got {shown(self.negative_prompt)}")
        self._check_swept()
        if self.prompts_file is not None and self.prompts != "data":
            raise FieldError("prompts_file", f"must not be given together with prompts, got {shown(self.prompts)}")

    def _check_swept(self) -> None:
        for name in SWEPT:
            values = as_list(getattr(self, name))
            require(name, values, values is None or len(values) > 0, "must be a value or a list of at least one")
            require(name, values, len({str(v) for v in values or []}) == len(values or []), "must be different values")
        for pair in self.interval or []:
            is_pair = isinstance(pair, list | tuple) and len(pair) == 2 and all(map(_is_number, pair))
            require("interval", pair, is_pair, "must be [low,high], or a list of such pairs")
        for width in as_list(self.ema_width) or []:
            rule = "must be a number, or null for the plain EMA"
            require("ema_width", width, width is None or _is_number(width), rule)
        for name in ("guidance", "internal_guidance"):
            for value in as_list(getattr(self, name)) or []:
                require(name, value, _is_number(value), "must be a number or a list of numbers")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
