"""The log line and its figures: rates without compilation and pauses, MFU, learning rate, ETA."""

from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from flowdit import tracking
from flowdit.tracking import Progress

BATCH, IMAGE_FLOPS = 16, 5_000_000


class Clock:
    """A manual clock, and a step's metric on a device that takes `seconds` to be ready."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def ready_after(self, seconds: float) -> Any:
        def block_until_ready() -> None:
            self.now += seconds

        return SimpleNamespace(block_until_ready=block_until_ready)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(tracking, "time", clock)
    return clock


def step_metrics(loss: float = 0.5, skipped: int = 0) -> dict[str, Any]:
    bins = np.ones(8, np.float32)
    scalars = {"loss": loss, "grad_norm": 1.0, "learning_rate": 1e-4, "skipped": skipped, "skipped_in_row": skipped}
    return {name: np.asarray(value) for name, value in scalars.items()} | {"bins": {"loss": (bins, bins)}}


def started(clock: Clock, num_steps: int = 100) -> tuple[Progress, str]:
    """A run whose first step took 41 seconds, and its log line."""
    progress = Progress(num_steps, BATCH, "bfloat16")
    progress.image_flops = IMAGE_FLOPS
    clock.now += 41
    progress.add(step_metrics())
    values = progress.summary(1)
    assert values["train/first_step_seconds"] == 41
    assert not {"train/images_per_second", "train/steps_per_second", "train/tflops_per_second"} & set(values)
    return progress, progress.line(1, values)


def advance(progress: Progress, clock: Clock, first: int, last: int, seconds: float) -> dict[str, float]:
    for _ in range(first, last + 1):
        clock.now += seconds
        progress.add(step_metrics())
    return progress.summary(last)


def test_the_first_line_has_the_compilation_time_and_no_rate(clock):
    assert started(clock)[1] == "step 1/100  loss 0.5000  lr 1.00e-04  first step in 41 s, with compilation"


def test_rates_exclude_the_compilation(clock):
    progress, _ = started(clock)
    values = advance(progress, clock, 2, 10, seconds=0.5)
    assert values["train/steps_per_second"] == pytest.approx(2)
    assert values["train/images_per_second"] == pytest.approx(2 * BATCH)
    assert values["train/tflops_per_second"] == pytest.approx(2 * BATCH * IMAGE_FLOPS / 1e12)
    assert "train/mfu" not in values and "train/first_step_seconds" not in values
    line = progress.line(10, values)
    assert line == "step 10/100  loss 0.5000  32 img/s  0.2 GFLOP/s  lr 1.00e-04  ETA 0:00:45"


def test_utilisation_is_of_all_devices(clock, monkeypatch):
    peak = 1e9
    monkeypatch.setattr(tracking, "peak_flops", lambda device, dtype: peak if dtype == "bfloat16" else None)
    progress, _ = started(clock)
    values = advance(progress, clock, 2, 10, seconds=0.5)
    expected = 2 * BATCH * IMAGE_FLOPS / (peak * jax.device_count())
    assert values["train/mfu"] == pytest.approx(expected)
    assert f"  32 img/s  {expected:.1%} MFU  lr " in progress.line(10, values)


def test_eta_is_of_the_mean_since_the_first_step(clock):
    progress, _ = started(clock)
    advance(progress, clock, 2, 11, seconds=1)
    values = advance(progress, clock, 12, 21, seconds=3)
    assert values["train/steps_per_second"] == pytest.approx(1 / 3)
    assert progress.line(21, values).endswith(f"ETA 0:02:{79 * 2 - 120}")


def test_pauses_are_excluded_and_wait_for_running_steps(clock):
    """The host is ahead of the device: the rest of the last step at the start of a pause is training time."""
    progress, _ = started(clock)
    clock.now += 1
    unfinished = step_metrics() | {"not_ready": clock.ready_after(9)}
    progress.add(unfinished)
    with progress.paused():
        clock.now += 1000
    unfinished.pop("not_ready")
    assert progress.summary(2)["train/steps_per_second"] == pytest.approx(1 / 10)


def test_total_flops_count_every_step_of_the_run(clock):
    """Including steps before a resume and skipped ones; exact as a JSON number."""
    progress = Progress(10**7, 256, "bfloat16")
    progress.image_flops = 718_123_456_789
    progress.add(step_metrics(loss=float("nan"), skipped=3))
    total = progress.summary(1_000_000)["train/total_flops"]
    assert isinstance(total, float) and total == pytest.approx(1e6 * 256 * 718_123_456_789, rel=1e-15)


def test_a_run_of_one_step_has_a_line(clock):
    assert started(clock, num_steps=1)[1].startswith("step 1/1  loss 0.5000  lr ")


@pytest.mark.parametrize(
    ("images", "teraflops", "expected"),
    [(0.42, 0.0951, ["0.4 img/s", "95.1 GFLOP/s"]), (1234.5, 321.04, ["1234 img/s", "321.0 TFLOP/s"])],
)
def test_units(images, teraflops, expected):
    values = {"train/images_per_second": images, "train/tflops_per_second": teraflops}
    assert tracking.speed(values) == expected
