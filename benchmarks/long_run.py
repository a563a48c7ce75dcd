"""Memory, descriptors and threads of long runs of the tiny preset, early and at the end.

`python -m benchmarks long_run` (hours on two cores) runs 20,000 steps with saves, validation and previews in one
process and in two; `LONG_RUN_STEPS` and `LONG_RUN_PROCESSES` (`1`, `2`) make it shorter.
"""

import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.noise_data import write_noise_data
from benchmarks.timing import table

STEPS = int(os.environ.get("LONG_RUN_STEPS", "20000"))
PROCESSES = [int(count) for count in os.environ.get("LONG_RUN_PROCESSES", "1 2").split()]
EARLY = STEPS // 10
SETTINGS = (
    "experiment=tiny",
    f"train.num_steps={STEPS}",
    "train.save_every=1000",
    "train.validate_every=1000",
    "train.sample_every=1000",
    "train.log_every=50",
    "train.validation_records=64",
)
Sample = dict[str, int]


def usage(pid: int | str = "self") -> Sample:
    """Resident memory in kB, open descriptors and threads of a process (Linux)."""
    status = Path(f"/proc/{pid}/status").read_text()
    resident = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
    counts = {
        name: len(os.listdir(f"/proc/{pid}/{part}")) for name, part in (("descriptors", "fd"), ("threads", "task"))
    }
    return {"memory": int(resident.split()[1])} | counts


def last_step(run: Path) -> int:
    with contextlib.suppress(OSError, IndexError, ValueError):
        return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    return 0


def observe(folder: Path, count: int) -> list[list[tuple[int, Sample]]]:
    """Run in `count` processes; what each used every second, with the step."""
    run, cluster = folder / f"run{count}", [[]]
    if count > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"mesh.coordinator=127.0.0.1:{free.getsockname()[1]}"
        cluster = [[address, f"mesh.num_processes={count}", f"mesh.process_id={i}"] for i in range(count)]
    paths = (f"data.path={folder / 'data'}", f"train.checkpoint_dir={run}")
    command = (sys.executable, "train_stage1.py", *SETTINGS, *paths)
    processes = [subprocess.Popen([*command, *more], stdout=subprocess.DEVNULL) for more in cluster]
    seen: list[list[tuple[int, Sample]]] = [[] for _ in processes]
    try:
        while all(process.poll() is None for process in processes):
            step = last_step(run)
            for process, samples in zip(processes, seen, strict=True):
                with contextlib.suppress(OSError, StopIteration):  # it has just ended
                    samples.append((step, usage(process.pid)))
            time.sleep(1)
        if any(process.wait(timeout=60) for process in processes):
            raise RuntimeError(f"the run failed: {[process.returncode for process in processes]}")
    finally:
        for process in processes:
            process.kill()
    return seen


def median(samples: list[tuple[int, Sample]], first: int, last: int, name: str) -> float:
    """The median over the samples of the steps from `first` to `last`."""
    return statistics.median(sample[name] for step, sample in samples if first <= step <= last)


def measure() -> str:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_noise_data(Path(folder) / "data", num_shards=4, records_per_shard=1000)
        for count in PROCESSES:
            for i, samples in enumerate(observe(Path(folder), count)):
                if log := os.environ.get("LONG_RUN_LOG"):
                    Path(f"{log}.{count}.{i}.json").write_text(json.dumps(samples))
                for name in ("memory", "descriptors", "threads"):
                    early = median(samples, EARLY, EARLY + EARLY // 2, name)
                    end = median(samples, STEPS - EARLY // 2, STEPS, name)
                    rows.append([f"{i + 1} of {count}", name, f"{early:.0f}", f"{end:.0f}", f"{end / early - 1:+.1%}"])
    return table(["process", "of which", f"step {EARLY}", f"step {STEPS}", "change"], rows)
