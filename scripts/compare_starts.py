"""Compare stage 2 from a re-parameterised class model with stage 2 from scratch: same seeds and steps, embedded data.

    python scripts/compare_starts.py checkpoints/demo/1800 runs/starts --seeds 0 1 2

Runs `experiment=openmoji_text` for every start and seed without a finished run, one after the other, and prints
validation losses by step, and the number of steps to the best loss from scratch. `--plot losses.png` draws the curves
(needs matplotlib).
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
STARTS = {
    "scratch": {},
    "block0, dropped": {"init_shared_map": "block0", "init_class": "dropped"},
    "mean, dropped": {"init_shared_map": "mean", "init_class": "dropped"},
    "block0, null class": {"init_shared_map": "block0", "init_class": "null_class"},
    "mean, null class": {"init_shared_map": "mean", "init_class": "null_class"},
}
Curve = dict[int, float]


def train(start: str, seed: int, class_model: Path, run: Path, num_steps: int) -> None:
    """Run stage 2, or resume an interrupted run."""
    settings = {"num_steps": num_steps, "checkpoint_dir": run, "validate_every": 50, "sample_every": 0, "keep_last": 1}
    settings |= {"is_restore": str((run / "metrics.jsonl").exists()).lower()}
    settings |= STARTS[start] and {"init_from": class_model, **STARTS[start]}
    overrides = [f"train.{name}={value}" for name, value in settings.items()]
    command = [sys.executable, str(ROOT / "train_stage2.py"), "experiment=openmoji_text", f"seed={seed}", *overrides]
    subprocess.run(command, check=True)


def validation_curve(run: Path) -> Curve:
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {entry["step"]: entry["validation/loss"] for entry in entries if "validation/loss" in entry}


def steps_to(curve: Curve, loss: float) -> int | None:
    """The first validated step at or below `loss`."""
    return next((step for step, value in sorted(curve.items()) if value <= loss), None)


def report(curves: dict[str, list[Curve]], shown: list[int]) -> str:
    """Losses (mean and range over seeds) at some steps, and the first step to the best loss of the first start."""
    reference = next(iter(curves))
    lines = [f"| start | {' | '.join(f'step {step}' for step in shown)} | steps to the best of {reference} |"]
    lines += ["|" + " --- |" * (len(shown) + 2)]
    for start, runs in curves.items():
        columns = [[curve[step] for curve in runs] for step in shown]
        losses = [f"{np.mean(values):.4f} ({min(values):.4f} to {max(values):.4f})" for values in columns]
        reached = [steps_to(curve, min(base.values())) for curve, base in zip(runs, curves[reference], strict=True)]
        lines.append(f"| {start} | {' | '.join(losses)} | {', '.join(map(str, reached))} |")
    return "\n".join(lines)


def plot(curves: dict[str, list[Curve]], file: Path) -> None:
    import matplotlib.pyplot as plt  # pyright: ignore[reportMissingImports]  # optional, only for this plot

    figure, axes = plt.subplots(figsize=(7, 4))
    for i, (start, runs) in enumerate(curves.items()):
        for j, curve in enumerate(runs):
            axes.plot(*zip(*sorted(curve.items()), strict=True), color=f"C{i}", label=start if j == 0 else None, lw=1.2)
    axes.set(xlabel="step", ylabel="validation loss (EMA, held-out captions)")
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("class_model", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=["scratch", "block0, dropped"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--num-steps", type=int, default=1000)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    curves: dict[str, list[Curve]] = {start: [] for start in args.starts}
    for seed in args.seeds:
        for start in args.starts:
            run = args.folder / f"{start.replace(', ', '_')}_{seed}"
            train(start, seed, args.class_model, run, args.num_steps)
            curves[start].append(validation_curve(run))
    shown = [step for step in (50, 100, 200, 500, args.num_steps) if step in curves[args.starts[0]][0]]
    print(report(curves, shown))
    if args.plot:
        plot(curves, args.plot)


if __name__ == "__main__":
    main()
