"""Where a run's figures go: the log, `metrics.jsonl` in the run folder, and Weights & Biases."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import logging
import netrc
import os
import shlex
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from PIL import Image

from flowdit.errors import first_line
from flowdit.fields import require_choice
from flowdit.hardware import peak_flops
from flowdit.line_files import open_lines
from flowdit.storage import is_remote, reason

logger = logging.getLogger(__name__)

MODES = ("online", "offline", "disabled")
METRICS = "metrics.jsonl"


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of an evaluation: figures to log, image files by name, and a line for the console."""

    figures: dict[str, float] = dataclasses.field(default_factory=dict)
    images: dict[str, os.PathLike] = dataclasses.field(default_factory=dict)
    line: str = ""


@dataclasses.dataclass
class WandbConfig:
    """Weights & Biases. Without a network or a login an online run prints a warning and continues offline.

    Attributes:
        enabled: also log to W&B.
        mode: `online`, `offline` or `disabled`.
        project: W&B project.
        name: name of the run; null: W&B's choice.
        init_timeout: seconds to wait for W&B at the start.
    """

    enabled: bool = True
    mode: str = "online"
    project: str = "flowdit"
    name: str | None = None
    init_timeout: int = 20

    def check(self) -> None:
        """Raise `FieldError` for an unknown mode."""
        require_choice("mode", self.mode, MODES)


class Tracker:
    """Logs to console, file and W&B, on the first process only. Write errors do not end the run."""

    def __init__(
        self, folder: epath.Path, wandb_config: WandbConfig, run_config: dict[str, Any], *, run_id: str, primary: bool
    ):
        self.folder = folder
        self.primary = primary
        self._warned: set[str] = set()
        self._metrics = open_lines(folder / METRICS) if primary else None
        self._wandb = start_wandb(wandb_config, folder, run_config, run_id) if primary else None

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Write one line of `metrics.jsonl` and one W&B entry."""
        if self._metrics is None:
            return
        entry = {"step": step, "time": round(time.time(), 3), **values}
        with self.warns_only(METRICS):
            self._metrics.append(json.dumps(entry))
        self._to_wandb(step, values)

    @contextlib.contextmanager
    def warns_only(self, name: str | None) -> Iterator[None]:
        """Turn write errors for a file or folder of the run into a warning, printed once."""
        try:
            yield
        except OSError as problem:
            if name is None:
                raise
            if name not in self._warned:
                logger.warning("%s cannot be written (%s): continuing without it", self.folder / name, reason(problem))
            self._warned.add(name)

    def report(self, step: int, report: Report) -> None:
        """Log the report of an evaluation: figures, images by path, and a line."""
        if report.line:
            logger.info("step %d  %s", step, report.line)
        if report.figures:
            self.log(step, report.figures)
        if report.images:
            self._to_wandb(step, report.images)

    def flush(self) -> None:
        """Wait until the lines so far are stored, so that a checkpoint is not newer than its lines."""
        if self._metrics is not None:
            self._metrics.flush()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._metrics is not None:
            self._metrics.close()
        if self._wandb is None:
            return
        # The run is over: unsent data are in W&B's folder, and after an error the process must exit soon.
        finishing = threading.Thread(target=_finish, args=(self._wandb,), daemon=True)
        finishing.start()
        finishing.join(timeout=None if error is None else 5)

    def _to_wandb(self, step: int, values: dict[str, Any]) -> None:
        """Log figures, and images by path."""
        if self._wandb is None:
            return
        try:
            import wandb

            shown = {name: wandb.Image(_opened(v)) if isinstance(v, os.PathLike) else v for name, v in values.items()}
            self._wandb.log(shown, step=step)
        except Exception as problem:  # no error of W&B may end a training run
            logger.warning("wandb: logging failed (%s): continuing with metrics.jsonl only", first_line(problem))
            self._wandb = None


def _opened(path: os.PathLike) -> Any:
    """What W&B takes as an image: the path of a local file, the image itself from an object store."""
    if not is_remote(path):
        return str(path)
    with epath.Path(path).open("rb") as file:
        image = Image.open(file)  # type: ignore[arg-type]
        image.load()
    return image


def _finish(wandb_run: Any) -> None:
    with contextlib.suppress(Exception):
        wandb_run.finish()


def start_wandb(config: WandbConfig, folder: epath.Path, run_config: dict[str, Any], run_id: str) -> Any:
    """Start a W&B run, or return None if switched off. If the online start fails, it starts offline, with a line."""
    if not config.enabled or config.mode == "disabled":
        return None
    import wandb  # imported here, as it takes half a second

    # Without a limit, a lost network would keep a finished run from exiting.
    settings = wandb.Settings(init_timeout=config.init_timeout, finish_timeout=300, silent=True)
    arguments = dict(
        project=config.project,
        name=config.name,
        config=run_config,
        dir=None if is_remote(folder) else str(folder),
        id=run_id,
    )
    mode = config.mode
    if mode == "online" and not _has_login():
        logger.info("wandb: no login found (run `wandb login`): logging offline")
        mode = "offline"
    # W&B raises many types of errors; none of them may stop a training run.
    try:
        run = wandb.init(mode=mode, resume="allow", settings=settings, **arguments)  # type: ignore[arg-type]
        return _named_offline(run) if mode == "offline" else run
    except Exception as problem:
        logger.warning("wandb: %s start failed (%s): logging offline", mode, first_line(problem))
    try:
        wandb.teardown()
        return _named_offline(wandb.init(mode="offline", settings=settings, **arguments))  # type: ignore[arg-type]
    except Exception as problem:
        logger.warning("wandb: offline start failed (%s): continuing with metrics.jsonl only", first_line(problem))
        return None


def _named_offline(run: Any) -> Any:
    """Log where an offline run is kept, and how to upload it."""
    folder = epath.Path(run.dir).parent
    logger.info("wandb: offline run in %s, upload it with: wandb sync %s", folder, shlex.quote(str(folder)))
    return run


def _has_login() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].rstrip("/")
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


class Progress:
    """Computes the figures of a logging window and the log line from the metrics of single steps.

    Rates cover training on all devices, without pauses (`paused`) and without the first window of a process, a single
    step that includes the compilation. `image_flops`, the training FLOPs of one image, must be set before the first
    summary.
    """

    def __init__(self, num_steps: int, batch_size: int, compute_dtype: str):
        self._num_steps, self._batch_size = num_steps, batch_size
        peak = peak_flops(jax.devices()[0], compute_dtype)
        self._peak = None if peak is None else peak * jax.device_count()
        self.image_flops = 0
        self._window: list[Any] = []
        self.last_window: list[Any] = []
        """The metrics of the steps of the last summary, on the host."""
        self._parts: list[str] = []
        self._seconds, self._since = 0.0, time.perf_counter()
        self._compiled = False
        self._timed_steps = 0
        self._timed_seconds = 0.0

    def add(self, metrics: Any) -> None:
        """Add one step's metrics, which stay on the device."""
        self._window.append(metrics)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock for validation, sampling and saving.

        Waits for running steps first, as their time would be counted in the pause otherwise.
        """
        jax.block_until_ready(self._window[-1:])
        self._seconds += time.perf_counter() - self._since
        yield
        self._since = time.perf_counter()

    def summary(self, step: int) -> dict[str, float]:
        """Means over the window that ends with `step`, without skipped steps, and rates; starts a new window.

        This is the only device-to-host copy of training figures; it waits for the steps to finish. `train/total_flops`
        counts all steps of the run so far, including skipped ones. A process's first summary has
        `train/first_step_seconds` instead of rates. `train/mfu` exists if the peak of the devices is known.
        """
        window = jax.device_get(self._window)
        self.last_window = window
        self._parts = [name for name in window[-1]["bins"] if name != "loss"]
        now = time.perf_counter()
        seconds = max(self._seconds + now - self._since, 1e-9)
        self._window = []
        self._seconds = 0.0
        self._since = now
        good = [m for m in window if np.isfinite(m["loss"]) and np.isfinite(m["grad_norm"])] or window
        return {
            "train/loss": float(np.mean([m["loss"] for m in good])),
            "train/grad_norm": float(np.mean([m["grad_norm"] for m in good])),
            "train/learning_rate": float(window[-1]["learning_rate"]),
            "train/skipped_steps": int(window[-1]["skipped"]),
            "train/skipped_in_row": int(window[-1]["skipped_in_row"]),
            "train/total_flops": float(step * self._batch_size * self.image_flops),
            **self._rates(len(window), seconds),
            **_parts_by_time([m["bins"] for m in good]),
        }

    def _rates(self, steps: int, seconds: float) -> dict[str, float]:
        if not self._compiled:
            self._compiled = True
            return {"train/first_step_seconds": seconds}
        self._timed_steps += steps
        self._timed_seconds += seconds
        images = steps * self._batch_size / seconds
        flops = images * self.image_flops
        return {
            "train/images_per_second": images,
            "train/steps_per_second": steps / seconds,
            "train/tflops_per_second": flops / 1e12,
            **({} if self._peak is None else {"train/mfu": flops / self._peak}),
        }

    def line(self, step: int, values: dict[str, float]) -> str:
        """`step 150/2000  loss 0.8123  312 img/s  41.3% MFU  lr 1.00e-04  ETA 0:06:10`.

        The ETA is the time of the remaining steps, at the mean rate since the first step of this process, without
        pauses.
        """
        counts = {"skipped": "train/skipped_steps", "bad records": "data/bad_records"}
        truncated = values.get("data/truncated_captions", 0)
        rates: list[str] = []
        outlook = f"first step in {values.get('train/first_step_seconds', 0):.0f} s, with compilation"
        if self._timed_steps:
            left = (self._num_steps - step) * self._timed_seconds / self._timed_steps
            rates, outlook = speed(values), f"ETA {datetime.timedelta(seconds=int(left))}"
        parts = ", ".join(f"{name} {values[f'train/{name}']:.4f}" for name in self._parts)
        return "  ".join(
            [
                f"step {step}/{self._num_steps}",
                f"loss {values['train/loss']:.4f}{parts and f' ({parts})'}",
                *rates,
                f"lr {values['train/learning_rate']:.2e}",
                outlook,
                *(f"{word} {values[name]}" for word, name in counts.items() if values.get(name)),
                *([f"truncated captions {truncated} of {values['data/captions']}"] if truncated else []),
            ]
        )


def speed(values: dict[str, float]) -> list[str]:
    """`312 img/s` and `41.3% MFU`, or `95.2 GFLOP/s` if the peak of the devices is unknown."""
    images, teraflops = values["train/images_per_second"], values["train/tflops_per_second"]
    if "train/mfu" in values:
        use = f"{values['train/mfu']:.1%} MFU"
    else:
        use = f"{teraflops:.1f} TFLOP/s" if teraflops >= 1 else f"{1000 * teraflops:.1f} GFLOP/s"
    return [f"{images:.0f} img/s" if images >= 10 else f"{images:.1f} img/s", use]


def _parts_by_time(bins: list[dict[str, tuple[np.ndarray, np.ndarray]]]) -> dict[str, float]:
    """Means of the loss and each of its parts by bins of the flow time, and overall means of the parts."""
    figures = {}
    for name, (sums, counts) in jax.tree.map(lambda *arrays: np.sum(arrays, axis=0), *bins).items():
        if name != "loss":
            figures[f"train/{name}"] = float(sums.sum() / counts.sum())
        for i, (total, count) in enumerate(zip(sums, counts, strict=True)):
            if count:
                figures[f"{name}_by_t/{i / len(sums):.3f}-{(i + 1) / len(sums):.3f}"] = float(total / count)
    return figures
