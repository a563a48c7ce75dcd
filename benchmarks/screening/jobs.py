"""The processes of a screening, one at a time: timings, training runs and evaluations, each skipped if it is finished."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from benchmarks.screening.plan import BASELINE, Plan, merged, of_steps
from flowdit.reporting.metrics import read_metrics
from flowdit.storage import write_whole

REPOSITORY = Path(__file__).parents[2]
METRICS = "metrics.jsonl"
QUIET = ("train.sample_every=0", "train.keep_last=1", "wandb.enabled=false")
"""Settings of all runs that a plan may replace."""
TIMED = 1_000_000
TIMING = (
    *(f"train.num_steps={TIMED}", "train.validate_every=0", "train.sample_every=0", "train.save_every=0"),
    "train.scores.every=0",
)
"""Of short runs, which are stopped: with the steps of the plan, schedules and options need not fit into a few."""
GRACE = 120
"""Seconds that a run has for saving when the driver is stopped."""


class JobError(Exception):
    """A process of the screening has failed; the last line that it printed."""


class Run(NamedTuple):
    """A training run: an option with a seed."""

    option: str
    seed: int

    def __str__(self) -> str:
        return f"{self.option}, seed {self.seed}"


class Jobs:
    """Starts the processes of `plan`, with all files under `out`; they inherit the descriptor `lock`."""

    def __init__(self, plan: Plan, out: Path, lock: int):
        self.plan = plan
        self.out = out.resolve()
        self._lock = lock
        path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
        cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(self.out / "compiled"))
        self._environment = os.environ | {"PYTHONPATH": path, "JAX_COMPILATION_CACHE_DIR": cache}

    def folder(self, run: Run) -> Path:
        return self.out / "runs" / run.option / f"seed{run.seed}"

    def steps(self, option: str) -> int:
        """Steps within the budget."""
        if self.plan.budget.steps is not None:
            return self.plan.budget.steps
        return max(self.plan.validations, round(self.rate(option) * 60 * (self.plan.budget.minutes or 0)))

    def rate(self, option: str) -> float:
        """Steps per second of an option, from short runs.

        The baseline's is measured once. An option is timed right after the baseline is timed again, and its rate is the
        baseline's first one times their ratio, so that a load that comes and goes does not change its budget. A timing
        with other settings is replaced. Raises `JobError` if a run has begun by one.
        """
        file = self.out / "runs" / option / "timing.json"
        compared = dict.fromkeys((BASELINE, option))
        settings = {
            "overrides": {name: self.plan.overrides(name) for name in compared},
            "timing_steps": self.plan.timing_steps,
        }
        known = read_json(file) or {}
        if {name: known.get(name) for name in settings} == settings:
            return known["steps_per_second"]
        if any(has_checkpoint(folder) for folder in file.parent.glob("seed*")):
            raise JobError(f"{file.parent}: its timing has other settings than the plan: give another folder")
        first = self.rate(BASELINE) if option != BASELINE else None
        measured = {name: self._measured(option, name) for name in compared}
        found = measured[option] if first is None else first * measured[option] / measured[BASELINE]
        write_json(file, {**settings, "steps_per_second": found, "measured": measured})
        return found

    def _measured(self, owner: str, option: str) -> float:
        """Steps per second of a short run, of which no checkpoint is kept: those of its fastest part, as load comes and goes."""
        run = self.out / "runs" / owner / "timing"
        shutil.rmtree(run, ignore_errors=True)
        own = [f"train.log_every={max(1, self.plan.timing_steps // 6)}", f"train.checkpoint_dir={run}"]
        overrides = of_steps(merged(QUIET, self.plan.overrides(option), TIMING, own), TIMED)
        self._train(overrides, run.with_suffix(".log"), until=lambda: last_step(run) >= self.plan.timing_steps)
        found = max(rates(run), default=0.0)
        shutil.rmtree(run, ignore_errors=True)
        if not found:
            raise JobError("the short run has no steps per second")
        return found

    def train(self, run: Run) -> None:
        """Train, or continue a run that was interrupted. Raises `JobError` if it fails or was begun otherwise."""
        self.check(run)
        folder = self.folder(run)
        steps = self.steps(run.option)
        overrides = self._overrides(run)
        record = folder.with_suffix(".json")
        if self._known(run) != overrides:
            if not has_checkpoint(folder):  # figures of an attempt with other settings
                shutil.rmtree(folder, ignore_errors=True)
            write_json(record, {"overrides": overrides, "is_finished": False})
        self._train(merged(overrides, [f"train.checkpoint_dir={folder}"]), folder.with_suffix(".log"))
        if not (folder / str(steps)).is_dir():
            raise JobError(f"it ended before step {steps}")
        write_json(record, {"overrides": overrides, "steps": steps, "is_finished": True})

    def check(self, run: Run) -> None:
        """Raise `JobError` if a run has a checkpoint of other settings than those of the plan."""
        if has_checkpoint(self.folder(run)):
            known, overrides = self._known(run), self._overrides(run)
            if known is not None and known != overrides:
                changed = ", ".join(sorted(set(known) ^ set(overrides)))
                raise JobError(f"{self.folder(run)}: was begun with other settings ({changed}): give another folder")

    def is_trained(self, run: Run) -> bool:
        """Whether a run is finished with the settings of the plan."""
        record = read_json(self.folder(run).with_suffix(".json"))
        if record is None or not record["is_finished"] or not has_checkpoint(self.folder(run)):
            return False
        try:
            self.check(run)
        except JobError:
            return False
        return True

    def finished(self) -> list[Run]:
        """All finished runs of the plan that are in the folder."""
        found = [Run(file.parent.name, int(file.stem[4:])) for file in self.out.glob("runs/*/seed*.json")]
        return [run for run in found if self.plan.knows(run.option, run.seed) and self.is_trained(run)]

    def _known(self, run: Run) -> list[str] | None:
        """The overrides with which a run was begun."""
        record = read_json(self.folder(run).with_suffix(".json"))
        return None if record is None else record["overrides"]

    def _overrides(self, run: Run) -> list[str]:
        """The settings of a run, without its folder, so that results may be moved."""
        steps = self.steps(run.option)
        own = [f"seed={run.seed}", f"train.num_steps={steps}", "train.is_restore=null"]
        own.append(f"train.validate_every={max(1, steps // self.plan.validations)}")
        own.append(f"train.save_every={max(1, steps // self.plan.saves)}")
        return of_steps(merged(QUIET, self.plan.overrides(run.option), own), steps)

    def evaluate(self, run: Run) -> None:
        """Score the last checkpoint by each part of the plan."""
        for part in self.plan.evaluate.parts if self.plan.evaluate is not None else ():
            if self.scores(run, part) is None:
                out = self._scores(run, part)
                own = [f"checkpoint={self.folder(run) / str(self.steps(run.option))}", f"out={out}"]
                settings = self._evaluation(run, part)
                self._start(["-m", "flowdit.evaluate", *merged(settings["overrides"], own)], out.with_suffix(".log"))
                write_json(out / "overrides.json", settings)

    def scores(self, run: Run, part: str) -> Any:
        """The content of the file of the scores of a run in a part; None if there is none with the plan's settings."""
        folder = self._scores(run, part)
        is_known = read_json(folder / "overrides.json") == self._evaluation(run, part)
        return read_json(folder / "scores.json") if is_known else None

    def _scores(self, run: Run, part: str) -> Path:
        return self.out / "scores" / run.option / f"seed{run.seed}" / part

    def _evaluation(self, run: Run, part: str) -> dict[str, Any]:
        """The settings of an evaluation, without the folders."""
        assert self.plan.evaluate is not None
        overrides = merged(self.plan.evaluate.settings, self.plan.evaluate.parts[part])
        return {"overrides": overrides, "steps": self.steps(run.option)}

    def _train(self, overrides: Sequence[str], log: Path, until: Callable[[], bool] | None = None) -> None:
        self._start([str(REPOSITORY / f"train_stage{self.plan.stage}.py"), *overrides], log, until)

    def _start(self, arguments: Sequence[str], log: Path, until: Callable[[], bool] | None = None) -> None:
        """Run Python to its end, or `until` is true. If this process is stopped, so is the other, which may save first."""
        log.parent.mkdir(parents=True, exist_ok=True)
        before = log.stat().st_size if log.exists() else 0
        with log.open("a", encoding="utf-8") as stream:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                env=self._environment,
                stdout=stream,
                stderr=subprocess.STDOUT,
                pass_fds=[self._lock],  # so that nothing else starts while it is running, even without the driver
                start_new_session=True,  # Ctrl-C comes to the driver alone
            )
            try:
                while process.poll() is None and not (until and until()):
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(0.2 if until else None)
            finally:
                _stop(process)
        if process.returncode and not (until and until()):
            printed = log.read_bytes()[before:].decode(errors="replace")
            lines = [line for line in printed.splitlines() if line.strip()]
            errors = [line for line in lines if line.startswith("error: ")]
            raise JobError((errors or lines or [f"exit status {process.returncode}"])[-1])


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a process, if it is running."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
        return
    process.kill()
    process.wait()


def has_checkpoint(run: Path) -> bool:
    """Whether a run has saved."""
    return any(folder.name.isdigit() for folder in run.glob("*"))


def last_step(run: Path) -> int:
    """The newest step of a run that may not have begun."""
    if not (run / METRICS).exists():
        return 0
    sessions = read_metrics(epath.Path(run / METRICS)).sessions
    return sessions[-1].last_step if sessions else 0


def rates(run: Path) -> list[float]:
    """A run's steps per second between log entries, without compilation and pauses."""
    curve = read_metrics(epath.Path(run / METRICS)).curve("train/steps_per_second")
    return [] if curve is None else [value for value in curve.values.tolist() if math.isfinite(value)]


@contextlib.contextmanager
def locked(out: Path) -> Iterator[int]:
    """Hold the folder of the results. SIGTERM ends the driver as Ctrl-C does.

    Raises `ValueError` if another driver, or a process that one has left behind, holds it.
    """
    out.mkdir(parents=True, exist_ok=True)
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _interrupt) if is_main else None
    with (out / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{out}: a driver, or a process that it has started, is still running") from None
        try:
            yield lock.fileno()
        finally:
            if is_main:
                signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def read_json(file: Path) -> Any:
    """The content of a file that this package has written; None if there is none."""
    return json.loads(file.read_text()) if file.exists() else None


def write_json(file: Path, content: Any) -> None:
    """Write a file, whole or not at all. Raises `ValueError` for NaN and infinities, which JSON does not have."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(epath.Path(file), json.dumps(content, indent=1, allow_nan=False) + "\n")
