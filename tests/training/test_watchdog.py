"""Steps that do not finish end the process; batches that do not come are named."""

import json
import os
import re
import threading
import time

import pytest
from runs import error_line, finish, free_address, start, train_here
from test_processes import settings

from flowdit.data.record_files import RecordFiles
from flowdit.tracking import Progress, Report
from flowdit.training import setup, watchdog
from flowdit.training.evaluations import Evaluation
from flowdit.training.watchdog import StallClock, StepClock


def expired_after(clock: StepClock, finished: int, seconds: int = 10_000) -> int | None:
    """Seconds without a further step until `clock` expires; None: never."""
    return next((second for second in range(1, seconds) if clock.tick(1.0, finished)), None)


@pytest.mark.parametrize(
    ("timeout", "step_seconds", "steps", "expected"),
    [
        (None, 30.0, 4, 601),  # 20 times the median
        (None, 2.0, 4, 301),  # the least
        (None, 30.0, 3, None),  # the first compiles and is not timed
        (0.0, 1.0, 4, None),
        (7.0, 1.0, 4, 8),
        (7.0, 1.0, 0, None),  # compiling
    ],
)
def test_limit_of_a_step(timeout, step_seconds, steps, expected):
    clock = StepClock(timeout)
    for step in range(1, steps + 1):
        assert not clock.tick(step_seconds, step)
    assert expired_after(clock, steps) == expected


def test_many_steps_between_two_looks_share_the_time():
    clock = StepClock(None)
    for second in range(5):
        clock.tick(1.0, second * 1000)
    assert expired_after(clock, 4000) == watchdog.LEAST_SECONDS + 1


def test_a_stall_is_reported_at_growing_intervals_and_its_end_once(messages):
    clock = StallClock(10.0)
    for number in (0, None, *[1] * 100, 2, 2, None):
        clock.tick(1.0, None if number is None else f"waiting for batch {number}", lambda: "its files")
    assert messages() == [
        *(f"waiting for batch 1 for {n} s (data.stall_timeout): its files" for n in (10, 20, 40, 80)),
        "waiting for batch 1: over after 100 s",
    ]


def test_steps_that_finish_in_pauses_are_not_timed():
    """With a save after every step, the first look at the clock after it would time the step with a second."""
    clock = StepClock(None)
    for step in range(1, 10):
        assert not any(clock.tick(1.0, step - 1) for _ in range(299))
        clock.restart(step)  # in the pause
    assert expired_after(clock, 9) is None


@pytest.fixture
def ended(monkeypatch) -> tuple[list[int], threading.Event]:
    """Statuses with which the process would have ended, and an event that is set then."""
    statuses, event = [], threading.Event()

    def end(status):
        statuses.append(status)
        event.set()

    monkeypatch.setattr(os, "_exit", end)
    return statuses, event


def hang_at(step: int, monkeypatch, event: threading.Event) -> None:
    """The loop waits for `event` after this step."""
    add, seen = Progress.add, []

    def deadlock():
        assert event.wait(30)

    def add_and_wait(self, values):
        add(self, values)
        seen.append(values)
        if len(seen) == step:
            deadlock()

    monkeypatch.setattr(Progress, "add", add_and_wait)


def test_a_deadlock_ends_the_process_with_the_place_of_the_main_thread(tiny_data, tmp_path, monkeypatch, capfd, ended):
    statuses, event = ended
    hang_at(5, monkeypatch, event)
    train_here(tiny_data, tmp_path / "run", "mesh.step_timeout=1")
    assert statuses == [75]
    (line,) = (line for line in capfd.readouterr().err.splitlines() if "step_timeout" in line)
    place = r"the main thread was in .*/training/loop.py:\d+ train -> .*/threading.py:\d+ wait"
    file = tmp_path / "run" / "stalled" / "4-process0.txt"
    assert re.fullmatch(
        r"error: mesh.step_timeout: no step has finished for [12] s after step 4 \(limit 1 s\); "
        rf"{place}; tracebacks of all threads: {file}",
        line,
    ), line
    text = file.read_text()
    assert "thread MainThread, innermost call first" in text and "test_watchdog.py" in text and " deadlock" in text


class Slow(Evaluation):
    def is_due(self, step, is_last):
        return step == 4

    def __call__(self, step, state):
        time.sleep(2.5)
        return Report()


def test_an_evaluation_takes_as_long_as_it_takes(tiny_data, tmp_path, monkeypatch, ended):
    monkeypatch.setattr(setup, "make_evaluations", lambda *_: [Slow()])
    finished = train_here(tiny_data, tmp_path / "run", "mesh.step_timeout=2")
    assert (finished.status, finished.err, ended[0]) == (0, "", [])
    assert "done; checkpoint" in finished.out


def test_a_stalled_read_is_named_with_file_and_records(tiny_data, tmp_path, monkeypatch):
    """The first read of the training loop takes 1.5 s."""
    read, stalled = RecordFiles._read_files, []

    def read_slowly(self, indices):
        if len(indices) > 1 and not stalled:
            stalled.extend(indices)
            time.sleep(1.5)
        return read(self, indices)

    monkeypatch.setattr(RecordFiles, "_read_files", read_slowly)
    finished = train_here(tiny_data, tmp_path / "run", "data.stall_timeout=0.4", "data.num_threads=1")
    assert finished.status == 0
    lines = [line for line in finished.out.splitlines() if "batch 0" in line]
    assert len(lines) == 3, finished.out
    for line in lines[:2]:
        assert line.startswith("warning: waiting for batch 0 for ")
        assert f"{tiny_data}/train-0.array_record records {min(stalled)}, " in line
    assert lines[2].startswith("warning: waiting for batch 0: over after ")


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        ("mesh.step_timeout=-1", "mesh.step_timeout: must be null (automatic), 0 (never) or more, got -1"),
        ("data.stall_timeout=-1", "data.stall_timeout: must be 0 (never) or more, got -1"),
    ],
)
def test_invalid_limits(tiny_data, tmp_path, given, rule):
    assert error_line(train_here(tiny_data, tmp_path / "run", given)).startswith(f"error: {rule}")


ONE_HANGS = """
import json, sys, threading
from flowdit.train import stage1
from flowdit.tracking import Progress

hangs, arguments = json.loads(sys.argv[1])
add, seen = Progress.add, []

def add_and_wait(self, values):
    add(self, values)
    seen.append(values)
    if hangs and len(seen) == 4:
        threading.Event().wait()

Progress.add = add_and_wait
sys.argv = ["stage1", *arguments]
stage1()
"""


@pytest.mark.slow
@pytest.mark.parametrize("hanging", [0, 1])
def test_all_processes_end_if_one_hangs(tiny_data, tmp_path, hanging):
    cluster = [
        f"mesh.coordinator={free_address()}",
        "mesh.num_processes=2",
        "mesh.step_timeout=5",
        "train.log_every=100",
    ]
    _, *arguments = settings(1, tiny_data, tmp_path / "run", *cluster)
    processes = [
        start("-c", ONE_HANGS, json.dumps([i == hanging, [*arguments, f"mesh.process_id={i}"]]), devices=2)
        for i in (0, 1)
    ]
    try:
        finished = [finish(process) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.status for process in finished] == [75, 75]
    line = next(line for line in finished[hanging].err.splitlines() if "step_timeout" in line)
    assert line.startswith(f"error: process {hanging}: mesh.step_timeout: no step has finished for "), line
    assert "threading.py" in line
    (file,) = (tmp_path / "run" / "stalled").glob(f"*-process{hanging}.txt")
    assert "add_and_wait" in file.read_text()
