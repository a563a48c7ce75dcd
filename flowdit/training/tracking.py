"""Where a run's figures go: the console, `metrics.jsonl` in the run folder, and Weights & Biases."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import netrc
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np

MODES = ("online", "offline", "disabled")


@dataclasses.dataclass
class WandbConfig:
    """Weights & Biases. Without a network or a login an online run says so and goes on offline."""

    enabled: bool = True
    mode: str = "online"
    project: str = "flowdit"
    name: str | None = None
    init_timeout: int = 20

    def check(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"wandb.mode: must be one of {', '.join(MODES)}, got {self.mode!r}")


class Tracker:
    """Logs to all places; on processes other than the first it does nothing. What cannot be written ends no run."""

    def __init__(
        self, folder: Path, wandb_config: WandbConfig, run_config: dict[str, Any], *, run_id: str, primary: bool
    ):
        self.folder = folder
        self.primary = primary
        self._warned: set[Path] = set()
        self._wandb = start_wandb(wandb_config, folder, run_config, run_id) if primary else None

    def say(self, line: str) -> None:
        """A line on the console, from the first process alone. A console that is gone or full ends no run either."""
        if self.primary:
            with contextlib.suppress(OSError):
                print(line, flush=True)

    def warn(self, line: str) -> None:
        """A line from whichever process it is, which of several says its number."""
        process = f" process {jax.process_index()}:" if jax.process_count() > 1 else ""
        with contextlib.suppress(OSError):
            print(f"warning:{process} {line}", flush=True)

    def log(self, step: int, values: dict[str, Any]) -> None:
        """One line of `metrics.jsonl` and one W&B entry."""
        if not self.primary:
            return
        entry = {"step": step, "time": round(time.time(), 3), **values}
        file = self.folder / "metrics.jsonl"
        with self.warns_only(file):
            append_line(file, json.dumps(entry))
        self._to_wandb(step, values)

    @contextlib.contextmanager
    def warns_only(self, path: Path) -> Iterator[None]:
        """What cannot be written there costs a line, said once, and not the run."""
        try:
            yield
        except OSError as problem:
            if path not in self._warned:
                self.warn(f"{path} cannot be written ({problem.strerror or problem}): going on without")
            self._warned.add(path)

    def validation(self, step: int, losses: dict[str, float]) -> None:
        self.log(step, losses)
        self.say(f"step {step}  validation loss {losses['validation/loss']:.4f}")

    def picture(self, step: int, path: Path | None) -> None:
        """Show a grid of samples that lies at `path`."""
        if path is None:
            return
        self.say(f"step {step}  samples: {path}")
        self._to_wandb(step, {"samples": path})

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._wandb is None:
            return
        # The run is over: what W&B has not sent lies in its folder, and after an error the process is to end soon.
        finishing = threading.Thread(target=_finish, args=(self._wandb,), daemon=True)
        finishing.start()
        finishing.join(timeout=None if error is None else 5)

    def _to_wandb(self, step: int, values: dict[str, Any]) -> None:
        """Log figures, and pictures by their paths."""
        if self._wandb is None:
            return
        try:
            import wandb

            shown = {name: wandb.Image(str(v)) if isinstance(v, Path) else v for name, v in values.items()}
            self._wandb.log(shown, step=step)
        except Exception as problem:  # whatever goes wrong there must not cost a training run
            self.say(f"wandb: logging failed ({problem}): going on with metrics.jsonl alone")
            self._wandb = None


def _finish(wandb_run: Any) -> None:
    with contextlib.suppress(Exception):
        wandb_run.finish()


def append_line(file: Path, line: str) -> None:
    """Add a line to a JSONL file whose last one may have been cut, by a full disk or a kill.

    A cut line is removed: left there, it would spoil the new one as well.
    """
    with file.open("ab+") as stream:
        stream.truncate(_end_of_last_line(stream))
        stream.write(f"{line}\n".encode())


def _end_of_last_line(stream: BinaryIO, block: int = 1 << 16) -> int:
    end = stream.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - block)
        stream.seek(start)
        if (found := stream.read(end - start).rfind(b"\n")) >= 0:
            return start + found + 1
        end = start
    return 0


def start_wandb(config: WandbConfig, folder: Path, run_config: dict[str, Any], run_id: str) -> Any:
    """A W&B run, or None when switched off. A failing online start becomes an offline one, said in a line."""
    if not config.enabled or config.mode == "disabled":
        return None
    import wandb  # half a second of import that a run without W&B does not pay

    # Without a bound, a network that is gone would keep a finished run from ending.
    settings = wandb.Settings(init_timeout=config.init_timeout, finish_timeout=300, silent=True)
    arguments = dict(project=config.project, name=config.name, config=run_config, dir=str(folder), id=run_id)
    mode = config.mode
    if mode == "online" and not _has_login():
        print("wandb: no login found (run `wandb login`): logging offline", flush=True)
        mode = "offline"
    # W&B raises its own, requests' and OS errors; none of them may stop a training run.
    try:
        return wandb.init(mode=mode, resume="allow", settings=settings, **arguments)  # type: ignore[arg-type]
    except Exception as problem:
        print(f"wandb: {mode} start failed ({_reason(problem)}): logging offline", flush=True)
    try:
        wandb.teardown()
        return wandb.init(mode="offline", settings=settings, **arguments)  # type: ignore[arg-type]
    except Exception as problem:
        print(f"wandb: offline start failed ({_reason(problem)}): going on with metrics.jsonl alone", flush=True)
        return None


def _reason(problem: Exception) -> str:
    return (str(problem).splitlines() or [type(problem).__name__])[0]


def _has_login() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].rstrip("/")
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


class Progress:
    """Turns the metrics of single steps into figures for a logging window and a line on the console."""

    def __init__(self, num_steps: int, batch_size: int, learning_rate: Callable[[int], Any]):
        self._num_steps, self._batch_size, self._learning_rate = num_steps, batch_size, learning_rate
        self._window: list[Any] = []
        self._seconds, self._since = 0.0, time.perf_counter()

    def add(self, metrics: Any) -> None:
        """Keep one step's metrics, still on the device."""
        self._window.append(metrics)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stops the clock: validation, sampling and saving are no training time."""
        self._seconds += time.perf_counter() - self._since
        yield
        self._since = time.perf_counter()

    def summary(self, step: int) -> dict[str, float]:
        """Means over the window that ends with `step` (skipped steps left out of them) and rates; starts a new window.

        The one device-to-host copy of training figures; it waits for the steps to finish.
        """
        window = jax.device_get(self._window)
        with self.paused():
            seconds, count = max(self._seconds, 1e-9), len(window)
        self._window, self._seconds = [], 0.0
        skipped = int(window[-1]["skipped"])
        good = [m for m in window if np.isfinite(m["loss"]) and np.isfinite(m["grad_norm"])] or window
        return {
            "train/loss": float(np.mean([m["loss"] for m in good])),
            "train/grad_norm": float(np.mean([m["grad_norm"] for m in good])),
            "train/learning_rate": self._last_learning_rate(step - skipped),
            "train/skipped_steps": skipped,
            "train/skipped_in_row": int(window[-1]["skipped_in_row"]),
            "train/images_per_second": count * self._batch_size / seconds,
            "train/steps_per_second": count / seconds,
            **_loss_by_time(*(np.sum([m[name] for m in good], axis=0) for name in ("bin_sums", "bin_counts"))),
        }

    def _last_learning_rate(self, updates: int) -> float:
        """That of the last of `updates` updates: a skipped step makes none, and the schedule counts updates."""
        return float(np.asarray(self._learning_rate(max(updates - 1, 0))))

    def line(self, step: int, values: dict[str, float]) -> str:
        """`step 150/2000  loss 0.8123  312 img/s  ETA 6:10`."""
        eta = datetime.timedelta(seconds=int((self._num_steps - step) / values["train/steps_per_second"]))
        counts = {
            "skipped": "train/skipped_steps",
            "truncated captions": "data/truncated_captions",
            "bad records": "data/bad_records",
        }
        notable = "".join(f"  {word} {values[name]}" for word, name in counts.items() if values.get(name))
        return (
            f"step {step}/{self._num_steps}  loss {values['train/loss']:.4f}"
            f"  {values['train/images_per_second']:.0f} img/s  ETA {eta}{notable}"
        )


def _loss_by_time(sums: np.ndarray, counts: np.ndarray) -> dict[str, float]:
    bins = len(sums)
    means = ((i, float(total / count)) for i, (total, count) in enumerate(zip(sums, counts, strict=True)) if count)
    return {f"loss_by_t/{i / bins:.3f}-{(i + 1) / bins:.3f}": mean for i, mean in means}
