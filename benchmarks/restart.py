"""Seconds from the loss of one of two processes to the end of the other, and from the restart to its first step."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.timing import Timing, table

REPOSITORY = Path(__file__).parents[1]
CASES = {
    "kill -9, process 1": (1, "SIGKILL"),
    "kill -9, the first": (0, "SIGKILL"),
    "SIGSTOP, process 1": (1, "SIGSTOP"),
}
ROUNDS = 3


@contextlib.contextmanager
def two_processes(data: Path, run: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """A run of the preset `tiny`, which is resumed if it exists."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    settings = ["experiment=tiny", f"data.path={data}", f"train.checkpoint_dir={run}", "train.num_steps=1000000"]
    settings += ["train.is_restore=null", "train.validate_every=0", "train.sample_every=0", "train.keep_last=2"]
    mesh = [f"mesh.coordinator={address}", "mesh.num_processes=2"]
    command = [sys.executable, REPOSITORY / "train_stage1.py", *settings, *mesh]
    pair = [
        subprocess.Popen(
            [*command, f"mesh.process_id={i}"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        for i in (0, 1)
    ]
    try:
        yield pair
    finally:
        for process in pair:
            process.kill()
            process.wait()


def wait_for_step(process: subprocess.Popen[str], count: int = 1) -> None:
    """Wait for `count` log lines of steps."""
    assert process.stdout is not None
    for line in process.stdout:
        count -= line.startswith("step ")
        if count == 0:
            return


def seconds_of(data: Path, victim: int, name: str) -> tuple[float, float]:
    """From the signal to the end of the other process; from the restart of both to the first step's log line."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        with two_processes(data, run) as pair:
            wait_for_step(pair[0], count=6)
            child = Path(f"/proc/{pair[victim].pid}/task/{pair[victim].pid}/children").read_text().split()[0]
            os.kill(int(child), getattr(signal, name))
            start = time.perf_counter()
            pair[1 - victim].communicate()
            ended = time.perf_counter() - start
        start = time.perf_counter()
        with two_processes(data, run) as pair:
            wait_for_step(pair[0])
            return ended, time.perf_counter() - start


def measure() -> str:
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        subprocess.run([sys.executable, "-m", "flowdit.prepare", f"out={data}"], check=True, stdout=subprocess.DEVNULL)
        rows = []
        for case, (victim, name) in CASES.items():
            rounds = [seconds_of(data, victim, name) for _ in range(ROUNDS)]
            ended, restarted = (Timing(column) for column in zip(*rounds, strict=True))
            rows.append([case, ended.shown(), restarted.shown()])
    return table(["lost", "to the end of the other", "from the restart to the first step"], rows)
