"""The end of one of several processes: what the others say, their exit status, and the restart."""

import contextlib
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from runs import (
    FAST,
    REPOSITORY,
    Finished,
    assert_same_checkpoint,
    finish,
    free_address,
    metrics,
    start,
    steps_of,
    wait_for_line,
)


@contextlib.contextmanager
def processes(data: Path, run: Path, *own: Sequence[str], stage: int = 1) -> Iterator[list[subprocess.Popen[str]]]:
    """Training processes with one device each, one for each entry of `own`, the settings of that process alone."""
    script = str(REPOSITORY / f"train_stage{stage}.py")
    settings = [
        f"experiment={['tiny', 'tiny_text'][stage - 1]}",
        *FAST,
        f"data.path={data}",
        f"train.checkpoint_dir={run}",
    ]
    settings += [f"mesh.coordinator={free_address()}", f"mesh.num_processes={len(own)}"]
    started = [start(script, *settings, f"mesh.process_id={i}", *more) for i, more in enumerate(own)]
    try:
        yield started
    finally:
        for process in started:
            process.kill()  # its child ends with it
            process.wait()


def child_of(process: subprocess.Popen[str]) -> int:
    """The process that trains; the one that was started waits for it."""
    return int(subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()[0])


def error_of(finished: Finished) -> str:
    (line,) = [line for line in finished.err.splitlines() if line.startswith("error: ")]
    return line


ENDLESS = ("train.num_steps=100000",)


@pytest.mark.parametrize(
    ("victim", "number", "limit"),
    [
        (0, signal.SIGKILL, 15),
        pytest.param(1, signal.SIGKILL, 15, marks=pytest.mark.slow),
        pytest.param(0, signal.SIGSTOP, 30, marks=pytest.mark.slow),
        pytest.param(1, signal.SIGSTOP, 30, marks=pytest.mark.slow),
    ],
)
def test_the_others_name_a_lost_process_and_end(tiny_data, tmp_path, victim, number, limit):
    with processes(tiny_data, tmp_path / "run", ENDLESS, ENDLESS) as pair:
        wait_for_line(pair[0], "step 2/")
        os.kill(child_of(pair[victim]), number)
        signalled = time.monotonic()
        finished = finish(pair[1 - victim])
        assert time.monotonic() - signalled < limit
    assert finished.status == 75
    assert error_of(finished).startswith(f"error: lost process {victim}")


@pytest.fixture(scope="module")
def undisturbed(tiny_data, tmp_path_factory) -> Path:
    """The last checkpoint of two processes that nobody has disturbed."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    with processes(tiny_data, run, KILLED, KILLED) as pair:
        assert [finish(process).status for process in pair] == [0, 0]
    return run / "24"


KILLED = ("train.num_steps=24",)


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(20))
@pytest.mark.parametrize("moment", ["training", "saving"])
def test_a_restart_after_a_kill_is_bit_identical(tiny_data, tmp_path, undisturbed, moment, trial):
    chance = random.Random(f"{moment} {trial}")
    victim, run = trial % 2, tmp_path / "run"
    # Every step is saved, so that a kill most likely hits a save, or none but the last.
    settings = (*KILLED, f"train.save_every={1 if moment == 'saving' else 12}")
    with processes(tiny_data, run, settings, settings) as pair:
        wait_for_line(pair[0], f"step {chance.randrange(2, 20)}/")
        time.sleep(chance.uniform(0, 0.3))
        os.kill(child_of(pair[victim]), signal.SIGKILL)
        assert finish(pair[1 - victim]).status == 75
    again = (*settings, "train.is_restore=null")
    with processes(tiny_data, run, again, again) as pair:
        finished = [finish(process) for process in pair]
    assert [process.status for process in finished] == [0, 0], finished
    assert_same_checkpoint(undisturbed, run / "24")


@pytest.mark.parametrize("stage", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("receiver", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_sigterm_to_one_process_saves_on_all(tiny_data, tmp_path, receiver, stage):
    run = tmp_path / "run"
    with processes(tiny_data, run, ENDLESS, ENDLESS, stage=stage) as pair:
        wait_for_line(pair[0], "step 2/")
        pair[receiver].send_signal(signal.SIGTERM)
        finished = [finish(process) for process in pair]
    assert [process.status for process in finished] == [0, 0]
    assert "stopped by signal" in finished[0].out
    last = steps_of(run)[-1]
    assert f"checkpoint: {run / str(last)}" in finished[0].out
    assert list(metrics(run, "train/loss"))[-1] == last


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_a_missing_process_is_one_line(tiny_data, tmp_path, number):
    alone = ["mesh.init_timeout=1", "mesh.num_processes=2", f"mesh.process_id={number}"]
    with processes(tiny_data, tmp_path / "run", alone) as (process,):
        finished = finish(process)
    assert finished.status == 2
    line = rf"error: mesh.init_timeout: .* process {number} of 2 at \S+, after 1 s: .*\n"
    assert re.fullmatch(line, finished.err), finished.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("own", "problem"),
    [
        pytest.param("train.checkpoint_dir={other}", "train.checkpoint_dir: must be a folder", marks=pytest.mark.slow),
        pytest.param("data.path={absent}", "data.path: {absent}", marks=pytest.mark.slow),
        ("train.batch_size=16", "train.batch_size: must be equal in all processes"),
        pytest.param("mesh.num_processes=3", "mesh.num_processes: must be equal in all", marks=pytest.mark.slow),
    ],
)
def test_a_mistake_of_one_process_ends_all(tiny_data, tmp_path, own, problem):
    places = {"other": tmp_path / "other", "absent": tmp_path / "absent"}
    (tmp_path / "other").mkdir()
    with processes(tiny_data, tmp_path / "run", (), [own.format(**places)]) as pair:
        finished = [finish(process) for process in pair]
    assert [process.status for process in finished] == [2, 2]
    assert all(problem.format(**places) in error_of(process) for process in finished)
