"""A plan as lines for the console and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from flowdit.hardware import GIGA
from flowdit.planning.compilation import compiler_flags, compiler_versions
from flowdit.planning.config import PlanConfig
from flowdit.planning.data import PlannedData
from flowdit.planning.gpu import cudnn_shapes
from flowdit.planning.planner import Plan, Range
from flowdit.training.estimate import duration


def table(plans: Sequence[Plan], num_steps: int) -> list[str]:
    """A column for each topology and a row for each figure."""
    rows: list[list[str]] = [["", *(plan.topology for plan in plans)]]

    def add(name: str, cells: Sequence[str]) -> None:
        if any(cells):
            rows.append([name, *cells])

    add("mesh", [" ".join(f"{axis}={size}" for axis, size in plan.mesh.items() if size > 1) or "-" for plan in plans])
    add("batch, images a device", [f"{plan.batch_size}, {plan.images_per_device}" for plan in plans])
    add("method", [_method(plan) for plan in plans])
    add("fits", ["yes" if plan.fits else "NO" for plan in plans])
    add("memory a device, of", [f"{_gb(plan.peak_memory)}, {_gb(plan.memory_limit)} GB" for plan in plans])
    for part in dict.fromkeys(part for plan in plans for part in plan.memory):
        add(f"  {part}", [f"{_gb(plan.memory[part])} GB" if part in plan.memory else "" for plan in plans])
    add("  in the host's memory", [f"{_gb(plan.host_memory)} GB" if plan.host_memory else "" for plan in plans])
    add("computation", [_milliseconds(plan.compute_seconds) for plan in plans])
    add("communication", [_milliseconds(plan.communication_seconds) for plan in plans])
    for kind in dict.fromkeys(kind for plan in plans for kind in plan.collectives):
        add(f"  {kind}", [_exchange(plan, kind) for plan in plans])
    add("step", [_span(plan.step_seconds, 1e3, "ms") for plan in plans])
    add("images/s", [_span(plan.images_per_second) for plan in plans])
    add("model FLOPs utilisation", [_span(plan.utilisation, 100.0, "%") for plan in plans])
    add("M cycles an image", [_cycles(plan) for plan in plans])
    add("  cheapest branches", [_cycles(plan, cheapest=True) if plan.conditional_cycles else "" for plan in plans])
    add("not estimated", [_kernels(plan) for plan in plans])
    add(f"{num_steps} steps", [_durations(plan) for plan in plans])
    add("device-hours", [_span(plan.device_hours) for plan in plans])
    add("price", [_span(plan.price) for plan in plans])
    add("largest batch that fits", ["" if plan.largest_batch is None else f"{plan.largest_batch}" for plan in plans])
    add("compilation", [f"{plan.compile_seconds:.0f} s" if not plan.is_estimate else "" for plan in plans])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def assumptions(config: PlanConfig, plans: Sequence[Plan], data: PlannedData) -> list[str]:
    """What the figures rest on, a line each."""
    lines = [*data.assumptions, f"{compiler_versions()}; nothing was run"]
    lines += [f"{name}={flags}" for name, flags in compiler_flags().items()]
    if any(plan.cycles is not None for plan in plans):
        lines += [
            "computation on TPUs: the compiler's own estimate of cycles. By that of libtpu 0.0.42.1, a bfloat16 product "
            "of two 4096 x 4096 matrices reaches 97 % (v5e), 96 % (v5p) and 87 % (v6e) of the published rate",
            "custom calls (Pallas kernels) have no estimate: their operations count at the published peak",
        ]
    saved = [_cycles(plan, cheapest=True) for plan in plans if plan.conditional_cycles]
    if saved:
        figures = ", ".join(dict.fromkeys(saved))
        lines.append(f"conditionals count their dearest branch; with the cheapest: {figures} M cycles an image")
    if any(plan.host_memory for plan in plans):
        lines.append("the time of moving values to the host's memory and back is not counted")
    if any(plan.unknown_loops for plan in plans):
        lines.append("loops whose length the program does not say are counted once")
    if any(plan.cycles is None and plan.compute_seconds is not None for plan in plans):
        lines.append(
            f"computation on GPUs: an estimate, operations (recomputation included) at {config.utilisation:.0%} of the "
            "published peak (utilisation=), and the update at the published memory bandwidth; the model FLOPs "
            "utilisation follows from that"
        )
    if any(plan.is_estimate for plan in plans):
        lines += _of_estimated_memory(config, data)
    if any(plan.collectives for plan in plans):
        lines.append(
            "communication: bytes by ring algorithms over the published rate of the links, without latency; the step is "
            "between the larger of computation and communication (all hidden) and their sum (none hidden)"
        )
    lines.append("times are of the step alone: no validation, previews, checkpoints, waiting for data or restarts")
    return lines


def _of_estimated_memory(config: PlanConfig, data: PlannedData) -> list[str]:
    lines = ["memory of GPUs: by formula, from shapes; compiled where the GPUs are there"]
    shapes = ", ".join(f"({shape})" for shape in cudnn_shapes(config, data))
    if config.model.kernels == "auto":
        lines.append(f"attention on GPUs: {f'by cuDNN for {shapes}' if shapes else 'by XLA'}, by its published rules")
    if config.mesh.tensor > 1:
        lines.append(
            "of what the backward pass keeps, mesh.tensor splits arrays by head and those wider than the model, and no "
            "others; operations are all split"
        )
    return lines


def as_json(plans: Sequence[Plan], lines: Sequence[str], settings: Any) -> dict[str, Any]:
    """Everything, for other programs."""
    return {
        "versions": compiler_versions(),
        "flags": compiler_flags(),
        "settings": settings,
        "assumptions": list(lines),
        "plans": [dataclasses.asdict(plan) for plan in plans],
    }


def _gb(size: int | float) -> str:
    return f"{size / GIGA:.2f}"


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{_digits(seconds * 1e3)} ms"


def _digits(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{float(f'{value:.3g}'):,.15g}".replace(",", "")


def _span(values: Range | None, factor: float = 1.0, unit: str = "") -> str:
    if values is None:
        return ""
    low, high = (_digits(value * factor) for value in values)
    return f"{low if low == high else f'{low} to {high}'} {unit}".rstrip()


def _durations(plan: Plan) -> str:
    if plan.days is None:
        return ""
    low, high = (duration(days * 86400) for days in plan.days)
    return low if low == high else f"{low} to {high}"


def _exchange(plan: Plan, kind: str) -> str:
    found = plan.collectives.get(kind)
    return "" if found is None else f"{found.count} x, {_gb(found.bytes)} GB, {_milliseconds(found.seconds)}"


def _cycles(plan: Plan, *, cheapest: bool = False) -> str:
    if plan.cycles_per_image is None:
        return ""
    saved = plan.conditional_cycles / plan.images_of_a_device if cheapest else 0
    return f"{(plan.cycles_per_image - saved) / 1e6:.2f}"


def _method(plan: Plan) -> str:
    if plan.is_estimate:
        return "estimate"
    is_timed = plan.compute_seconds is not None and plan.cycles is None
    return "memory compiled, time estimated" if is_timed else "compiled"


def _kernels(plan: Plan) -> str:
    calls = ", ".join(f"{count} x {name}" for name, count in plan.kernels.items())
    return f"{calls}, {plan.kernel_flops / 1e12:.2f} TFLOP" if calls else ""
