"""`python -m benchmarks.gpu_check`, as `scripts/gpu_check.sh` runs it: what one GPU does with flowdit, within minutes.

Prints the card and the versions; the attention kernels with their errors; training of DiT-XL/2, B/2 and S/2 and
sampling from XL/2 at 256 tokens in bfloat16, beside diffusers' DiT in torch, compiled. The two take turns in processes
that live at the same time, each with 45 % of the card's memory. What has no time left is skipped, with a line.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.sizes import SAMPLING_STEPS, SIZES, TINY, Size
from benchmarks.timing import Timing, table
from benchmarks.workers import Worker, WorkerFailed

OURS, THEIRS = "flowdit", "diffusers in torch"
ATTENTION = [(head_dim, tokens, keys) for head_dim in (64, 72) for tokens in (256, 1024) for keys in (None, 120)]
DRY_ATTENTION = [(64, 16, None), (72, 16, 10)]
"""Head size, tokens, and for masked cross-attention the number of keys."""
SHARED, WHOLE = 0.45, 0.9
"""Shares of the card's memory for one of two processes, and for one alone."""
PACKAGES = ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13")
PACKAGES += ("torch", "diffusers")


@dataclasses.dataclass
class Check:
    """One run: its settings, and the report that grows part by part and is written after each.

    `has_failed` is set by a part or a contender that failed, and by a part without time.
    """

    dry_run: bool
    end: float
    json_file: Path
    memory: float = 80e9
    has_failed: bool = False
    report: dict[str, Any] = dataclasses.field(default_factory=dict)

    def left(self) -> float:
        """Seconds until the end."""
        return self.end - time.monotonic()

    def say(self, text: str) -> None:
        print(text, flush=True)

    def add(self, part: str, rows: Any) -> None:
        self.report[part] = rows
        self.json_file.write_text(json.dumps(self.report, indent=1) + "\n")

    def jax_worker(self, make: str, *arguments: Any, share: float = WHOLE) -> Worker:
        """A contender of `gpu_jax`, which takes this share of the card's memory."""
        environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "true", "XLA_PYTHON_CLIENT_MEM_FRACTION": str(share)}
        environment = {"JAX_PLATFORMS": "cpu"} if self.dry_run else environment
        return Worker(f"benchmarks.gpu_jax:{make}", *arguments, environment=environment, inside=self.dry_run)

    def torch_worker(self, make: str, *arguments: Any) -> Worker:
        environment = {"CUDA_VISIBLE_DEVICES": ""} if self.dry_run else {}
        return Worker(f"benchmarks.gpu_torch:{make}", *arguments, environment=environment, inside=self.dry_run)


def has_torch() -> bool:
    return all(importlib.util.find_spec(name) for name in ("torch", "diffusers"))


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe_card(check: Check) -> None:
    """Print card, driver, versions and flags. Raises `WorkerFailed` if JAX finds no GPU."""
    with check.jax_worker("card") as worker:
        worker.prepared(check.left())
        facts = worker.ask("facts", timeout=check.left())
    if facts["platform"] != "gpu" and not check.dry_run:
        raise WorkerFailed(f"JAX finds no GPU but {facts['device']}; --dry-run tries the script on the CPU")
    driver = "unknown (no nvidia-smi)"
    if (program := shutil.which("nvidia-smi")) and not check.dry_run:
        query = [program, "--query-gpu=memory.total,driver_version", "--format=csv,noheader,nounits", "--id=0"]
        total, driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().split(", ")
        check.memory = float(total) * 2**20
    versions = {name: found for name in PACKAGES if (found := version(name))}
    facts |= {"driver": driver, "memory": check.memory, "versions": versions, "XLA_FLAGS": os.environ.get("XLA_FLAGS")}
    peak = f"{facts['peak'] / 1e12:.0f} TFLOP/s in bfloat16" if facts["peak"] else "peak unknown (flowdit/hardware.py)"
    check.say(f"card: {facts['device']}, {check.memory / 1e9:.0f} GB, {peak}; driver {driver}")
    check.say(f"versions: {', '.join(f'{name} {number}' for name, number in versions.items())}")
    check.say(f"XLA_FLAGS: {facts['XLA_FLAGS'] or 'none'}")
    if not has_torch():
        check.say("torch or diffusers is missing: nothing to compare with (pip install torch diffusers)")
    check.add("card", facts)


def check_attention(check: Check) -> None:
    """Errors and times of attention, forward and backward, for each shape by the kernel that flowdit would use."""
    rows, lines = [], []
    shapes, size = (DRY_ATTENTION, (2, 2)) if check.dry_run else (ATTENTION, (16, 16))
    with check.jax_worker("Attention", *size) as worker:
        worker.prepared(check.left())
        for head_dim, tokens, keys in shapes:
            row = worker.ask("measure", head_dim, tokens, keys, timeout=check.left())
            rows.append(row | {"head_dim": head_dim, "tokens": tokens, "key_tokens": keys})
            check.say(row["kernel"])
            found = [max(row[name].values()) for name in ("against_xla", "against_float32", "xla_against_float32")]
            times = [f"{1000 * row[name]:.3g} ms" for name in ("seconds", "xla_seconds")]
            shape = f"{head_dim}, {tokens}" + (f" to {keys}, masked" if keys else "")
            lines.append([shape, *(f"{error:.1e}" for error in found), *times])
            check.add("attention", rows)
    header = [
        "head size, tokens",
        "error against XLA",
        "against float32",
        "XLA's against float32",
        "time",
        "XLA's time",
    ]
    check.say(f"\nlargest relative error of output and gradients\n\n{table(header, lines)}")


def check_training(check: Check, name: str, alone: bool = False) -> None:
    """Steps of one model; with `alone` flowdit's default network, with Q/K norm, on the whole card."""
    size, share = sized(check, name), WHOLE if alone else SHARED
    batch_size = 2 if check.dry_run else size.batch_size(share * check.memory)
    repeat, rounds = (1, 1) if check.dry_run else (10, 4)
    title = f"{name} training{', Q/K norm, whole card' if alone else ''}"
    while True:
        contenders = {OURS: functools.partial(check.jax_worker, "step", size, batch_size, alone, repeat, share=share)}
        if has_torch() and not alone:
            shared = ("step", size, batch_size, share, repeat)
            contenders[THEIRS] = functools.partial(check.torch_worker, *shared, not check.dry_run)
        results = take_turns(check, contenders, rounds)
        if batch_size == 1 or not any(is_memory_short(result) for result in results.values()):
            break
        batch_size //= 2
        check.say(f"{title}: out of memory, again with a batch of {batch_size}")
    report(check, title, batch_size, results)


def check_sampling(check: Check, name: str) -> None:
    """Images of one model: Euler's method with guidance."""
    size, batch_size = sized(check, name), 2 if check.dry_run else 32
    contenders = {OURS: functools.partial(check.jax_worker, "sampling", size, batch_size, False, share=SHARED)}
    if has_torch():
        theirs = functools.partial(check.torch_worker, "sampling", size, batch_size, SHARED, not check.dry_run)
        contenders[THEIRS] = theirs
    results = take_turns(check, contenders, 1 if check.dry_run else 4)
    report(check, f"{name} sampling, {SAMPLING_STEPS} guided steps", batch_size, results)


def sized(check: Check, name: str) -> Size:
    return TINY if check.dry_run else SIZES[name]


def is_memory_short(result: Mapping[str, Any]) -> bool:
    return any(sign in result.get("problem", "") for sign in ("RESOURCE_EXHAUSTED", "OutOfMemoryError"))


def take_turns(check: Check, contenders: Mapping[str, Callable[[], Worker]], rounds: int) -> dict[str, dict[str, Any]]:
    """Prepare one contender after the other, then run them in turns A B A B ...; the seconds and facts of each.

    One that fails is left out from then on, with its problem.
    """
    results: dict[str, dict[str, Any]] = {name: {"seconds": []} for name in contenders}
    workers: dict[str, Worker] = {}
    with contextlib.ExitStack() as ending:
        for name, start in contenders.items():  # each alone: both time kernels while they compile
            workers[name] = ending.enter_context(start())
            with left_out_if_it_fails(name, workers, results):
                results[name]["prepared_seconds"] = workers[name].prepared(check.left())
        for _ in range(rounds):
            for name in list(workers):
                with left_out_if_it_fails(name, workers, results):
                    results[name]["seconds"].append(workers[name].ask("run", timeout=check.left()))
        for name in list(workers):
            with left_out_if_it_fails(name, workers, results):
                results[name] |= workers[name].ask("facts", timeout=check.left())
    return results


@contextlib.contextmanager
def left_out_if_it_fails(name: str, workers: dict[str, Worker], results: dict[str, dict[str, Any]]) -> Iterator[None]:
    try:
        yield
    except WorkerFailed as problem:
        results[name]["problem"] = str(problem)
        del workers[name]


def report(check: Check, title: str, batch_size: int, results: dict[str, dict[str, Any]]) -> None:
    """Print a row for each contender, or its problem. Both are counted with flowdit's FLOPs."""
    ours, theirs = results[OURS], results.get(THEIRS, {})
    flops, peak = ours.get("flops"), ours.get("peak")
    lines = []
    for name, result in results.items():
        if "problem" in result:
            check.say(f"{title}, {name}: {result['problem']}")
            check.has_failed = True
            continue
        timing = Timing(result["seconds"])
        # A step makes a batch of images, and a draw's seconds are those of one image.
        amount = batch_size if "training" in title else 1
        share = f"{100 * amount * flops / timing.median / peak:.1f} %" if flops and peak else "unknown"
        peak_memory = f"{result['peak_memory'] / 1e9:.1f} GB" if result["peak_memory"] else "unknown"
        are_both = theirs and not any("problem" in each for each in (ours, theirs))
        ratio = timing.ratio(Timing(theirs["seconds"])) if are_both else ""
        lines.append([name, str(batch_size), timing.shown(), timing.rate(amount), share, peak_memory, ratio])
    if "kernels" in ours:
        check.say(ours["kernels"])
    header = ["batch", f"time {'a step' if 'training' in title else 'an image'}", "images/s", "of peak", "memory"]
    if lines:
        check.say(f"\n{table([title, *header, 'time / diffusers'], lines)}")
    check.add(title, {"batch_size": batch_size, "contenders": results})


PARTS: dict[str, tuple[float, Callable[[Check], None]]] = {
    "attention": (30, check_attention),
    "XL/2": (100, functools.partial(check_training, name="XL/2")),
    "sampling": (60, functools.partial(check_sampling, name="XL/2")),
    "whole-card": (60, functools.partial(check_training, name="XL/2", alone=True)),
    "B/2": (60, functools.partial(check_training, name="B/2")),
    "S/2": (60, functools.partial(check_training, name="S/2")),
}
"""In this order, each with the seconds without which it is not started."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts; the exit status is 2 without a GPU, and 1 if a part or a contender failed or a part had no time."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny models on the CPU, in this process, not compiled by torch"
    )
    parser.add_argument("--minutes", type=float, default=8.5, help="after which nothing runs any more (default 8.5)")
    parser.add_argument(
        "--json", type=Path, default=Path("gpu_check.json"), help="file of the results (gpu_check.json)"
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, help="these parts alone")
    given = parser.parse_args(arguments)
    check = Check(given.dry_run, time.monotonic() + 60 * given.minutes, given.json)
    try:
        describe_card(check)
    except WorkerFailed as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    for name in given.only or (list(PARTS)[:4] if given.dry_run else PARTS):  # the others are the same but for the size
        seconds, part = PARTS[name]
        check.say(f"\n### {name}\n")
        if check.left() < (0 if check.dry_run else seconds):
            check.say(f"skipped: {max(0, check.left()):.0f} s are left, it needs about {seconds:.0f} s")
            check.has_failed = True
            continue
        try:
            part(check)
        except WorkerFailed as problem:
            check.say(f"failed: {problem}")
            check.has_failed = True
    check.say(f"\nresults: {check.json_file}")
    return 1 if check.has_failed else 0


if __name__ == "__main__":
    sys.exit(main())
