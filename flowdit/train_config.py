"""The settings of a training run, `train.*`."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from flowdit.diffusion.flow import TIME_DISTRIBUTIONS
from flowdit.diffusion.sampling import SamplerConfig
from flowdit.fields import FREE_TEXT, require, require_choice, require_effect, under
from flowdit.models.reparameterise import CLASS_CONDITIONS, SHARED_MAPS
from flowdit.power_ema import check_width
from flowdit.score_config import RunScoresConfig


@dataclasses.dataclass
class TrainConfig:
    """Settings of a training run.

    Attributes:
        num_steps: optimizer steps of the whole run.
        batch_size: images per step, over all devices and micro-batches.
        gradient_accum: micro-batches per step, computed sequentially; divides `batch_size`.
        is_restore: continue the run in `checkpoint_dir` from its newest intact checkpoint; null: if `checkpoint_dir` holds
            one, else start it, for job scripts that are started again.
        requeue: end with exit status 75, and not 0, if a signal has stopped the run before its last step, so that a
            scheduler starts it again.
        checkpoint_dir: the run folder: checkpoints, `metrics.jsonl`, previews.
        save_every: steps between checkpoints; 0: only the last step, which is always saved.
        keep_last: number of newest checkpoints that are kept.
        keep_every: also keep the checkpoint of every multiple of this number of steps; null: none.
        keep_best: figure of an evaluation, such as `validation/loss`, or a score of `train.scores`, such as `kid`, by which
            the best checkpoint is kept besides these, as `<checkpoint_dir>/best`; null: none.
        keep_best_mode: whether lower values of `keep_best` are better, `min`, or higher ones, `max`; `auto`: by the figure.
        log_every: steps between log entries.
        validate_every: steps between validations; 0: never.
        validation_records: maximum number of held-out records per validation.
        sample_every: steps between preview grids; 0: never.
        sample_labels: classes of the previews, by number or name; null: 16 evenly spaced ones. Only with
            `conditioning=labels`.
        sample_prompts: prompts of the previews; null: 16 held-out captions. Only with `conditioning=text`.
        ema_decay: decay per step of the moving average of the weights, which validation and samples use; in [0, 1).
        ema_warmup: limit the decay at step n to (1 + n) / (10 + n), for short runs.
        ema_snapshot_every: steps between snapshots of power-function averages in `<checkpoint_dir>/ema`, from which an EMA of
            any width is made afterwards (`ema_width`); 0: no such averages.
        ema_widths: their widths, each the standard deviation of an average's profile as a fraction of the run so far; in
            (0, 0.289). Each takes the memory of the weights, in the state, a checkpoint and a snapshot.
        compute_dtype: dtype of the computation, `bfloat16` or `float32`; parameters and optimizer state are float32.
        latent_mean: mean subtracted from latents, a number or one per channel; null: the VAE's shift; `data`: the mean
            of the data, per channel.
        latent_scale: factor of latents after that; null: the VAE's scale; `data`: 1 / standard deviation of the data,
            per channel.
        drop_rate: probability that an example's condition is dropped, which guidance needs; in [0, 1].
        time_distribution: distribution of training times in (0, 1): `logit_normal` or `uniform`.
        time_std: standard deviation of the logit of logit-normal times; their mean is the logarithm of `time_shift`.
        time_uniform_after: last step with `time_distribution`, after which times are uniform; null: none.
        time_shift: shift s of training times, t' = s t / (1 + (s - 1) t); null: sqrt(C H W / 4096) of latents C x H x W.
        max_skipped_in_row: number of consecutive steps without finite loss and gradient after which the run ends.
        init_from: checkpoint or run folder whose EMA weights initialise the model; in stage 2 also that of a class model.
        init_time: flow time at which a text model has the same output as the class model that it starts from; in [0,
            1].
        init_shared_map: how the shared modulation map is made from the class model's: `block0` (that of its first
            block) or `mean` (of all blocks).
        init_class: how the class is removed from the class model: `dropped` (no class vector) or `null_class`.
        profile: first and last step of a profiler trace in the run folder, as `[100,105]`; null: none.
        sampler: the sampler of previews, and the defaults of `flowdit.sample`.
        scores: scores of samples.
    """

    num_steps: int = 400_000
    batch_size: int = 256
    gradient_accum: int = 1
    is_restore: bool | None = False
    requeue: bool = False
    checkpoint_dir: str = "checkpoints"
    save_every: int = 5_000
    keep_last: int = 3
    keep_every: int | None = None
    keep_best: str | None = None
    keep_best_mode: str = "auto"
    log_every: int = 100
    validate_every: int = 5_000
    validation_records: int = 1_024
    sample_every: int = 5_000
    sample_labels: list[Any] | None = None
    sample_prompts: list[str] | None = dataclasses.field(default=None, metadata=FREE_TEXT)
    ema_decay: float = 0.9999
    ema_warmup: bool = False
    ema_snapshot_every: int = 0
    ema_widths: list[float] = dataclasses.field(default_factory=lambda: [0.05, 0.10])
    compute_dtype: str = "bfloat16"
    latent_mean: Any = None
    latent_scale: Any = None
    drop_rate: float = 0.1
    time_distribution: str = "logit_normal"
    time_std: float = 1.0
    time_uniform_after: int | None = None
    time_shift: float | None = 1.0
    max_skipped_in_row: int = 20
    init_from: str | None = None
    init_time: float = 0.5
    init_shared_map: str = "block0"
    init_class: str = "dropped"
    profile: list[int] | None = None
    sampler: SamplerConfig = dataclasses.field(default_factory=SamplerConfig)
    scores: RunScoresConfig = dataclasses.field(default_factory=RunScoresConfig)

    def check(self) -> None:
        """Raise `FieldError` naming the first field that breaks a rule."""
        at_least_one = ("num_steps", "batch_size", "gradient_accum", "keep_last", "log_every", "validation_records")
        for field in (*at_least_one, "max_skipped_in_row"):
            value = getattr(self, field)
            require(field, value, value >= 1, "must be at least 1")
        for field in ("save_every", "validate_every", "sample_every", "ema_snapshot_every"):
            value = getattr(self, field)
            require(field, value, value >= 0, "must be 0 (never) or more")
        interval, shift = self.keep_every, self.time_shift
        uniform = self.time_uniform_after
        require("keep_every", interval, interval is None or interval >= 1, "must be null or at least 1")
        require("ema_decay", self.ema_decay, 0 <= self.ema_decay < 1, "must be in [0, 1)")
        require("drop_rate", self.drop_rate, 0 <= self.drop_rate <= 1, "must be in [0, 1]")
        require("time_std", self.time_std, 0 < self.time_std < math.inf, "must be positive and finite")
        require("time_uniform_after", uniform, uniform is None or uniform >= 0, "must be null or 0 or more")
        require("time_shift", shift, shift is None or shift > 0, "must be null or positive")
        require_choice("compute_dtype", self.compute_dtype, ("bfloat16", "float32"))
        require_choice("keep_best_mode", self.keep_best_mode, ("auto", "min", "max"))
        require_choice("time_distribution", self.time_distribution, TIME_DISTRIBUTIONS)
        for field in ("time_std", "time_uniform_after"):
            require_effect(self, field, "time_distribution", "logit_normal")
        require("init_time", self.init_time, 0 <= self.init_time <= 1, "must be in [0, 1]")
        require_choice("init_shared_map", self.init_shared_map, SHARED_MAPS)
        require_choice("init_class", self.init_class, CLASS_CONDITIONS)
        for width in self.ema_widths:
            check_width("ema_widths", width)
        is_set = 0 < len(self.ema_widths) == len(set(self.ema_widths))
        require("ema_widths", self.ema_widths, is_set, "must be one or more different widths")
        window = self.profile
        is_window = window is None or (len(window) == 2 and 2 <= window[0] <= window[1] <= self.num_steps)
        rule = f"must be null or two steps in [2, num_steps={self.num_steps}], the first and the last to trace"
        require("profile", window, is_window, rule)
        with under("sampler."):
            self.sampler.check()
        with under("scores."):
            self.scores.check()

    @property
    def average_widths(self) -> list[float]:
        """The widths of the power-function averages of the training state; none without snapshots."""
        return list(self.ema_widths) if self.ema_snapshot_every else []
