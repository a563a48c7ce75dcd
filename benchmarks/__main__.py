"""`python -m benchmarks [name ...]`: run the named benchmarks, or all, and print each as a markdown table."""

import argparse
import importlib
import importlib.metadata
import os
import platform
import time

BENCHMARKS = (
    "loader",
    "compile",
    "sampler",
    "checkpoint",
    "parts",
    "train_step",
    "text",
    "memory",
    "convert",
    "prepare",
    "restart",
    "scores",
    "features",
)
LONG = ("long_run", "million", "million_images", "data", "tpu", "recipes", "batch_size", "text_model")
"""Only by name: they take minutes to hours, and gigabytes."""
WITH_ARGUMENTS = ("tpu", "recipes", "batch_size", "text_model")
"""Benchmarks that take what follows their name; their `check` raises `ValueError` for wrong arguments."""
ANY_DEVICE = ("recipes", "text_model")
"""Benchmarks that may use an accelerator, alone."""
PACKAGES = ("jax", "jaxlib", "torch", "diffusers", "numpy", "grain", "array-record", "orbax-checkpoint")


def machine() -> str:
    """Cores available to this process, the load before the start, and the versions."""
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    return f"{cores} {platform.machine()} cores, load {load:.1f} before the start; Python {platform.python_version()}, {versions}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "names",
        nargs="*",
        metavar="name",
        help=f"one of {', '.join(BENCHMARKS + LONG)} (default: all but {', '.join(LONG)}); tpu takes the names of its "
        "rows, and settings as in model.remat=full; recipes a plan; batch_size a folder of runs; text_model a "
        "checkpoint, and settings",
    )
    names: list[str] = parser.parse_args().names or list(BENCHMARKS)
    last = next((i + 1 for i, name in enumerate(names) if name in WITH_ARGUMENTS), len(names))
    names, arguments = names[:last], names[last:]
    if unknown := sorted(set(names) - {*BENCHMARKS, *LONG}):
        parser.error(f"name: must be one of {', '.join(BENCHMARKS + LONG)}, got {unknown[0]!r}")
    if len(names) > 1 or names[0] not in ANY_DEVICE:
        # All references run on the CPU, so JAX does too. JAX reads this when a benchmark imports it.
        os.environ["JAX_PLATFORMS"] = "cpu"
    if (name := names[-1]) in WITH_ARGUMENTS:
        try:
            importlib.import_module(f"benchmarks.{name}").check(arguments)
        except ValueError as problem:
            parser.error(f"{problem} (what follows {name} is for it; other benchmarks stand before it)")
    print(f"Machine: {machine()}", flush=True)
    for name in names:
        start = time.perf_counter()
        measure = importlib.import_module(f"benchmarks.{name}").measure
        table = measure(*arguments) if name in WITH_ARGUMENTS else measure()
        print(f"\n### {name}\n\n{table}\n\n({time.perf_counter() - start:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
