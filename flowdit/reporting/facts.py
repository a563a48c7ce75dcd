"""Figures of a run in words: how far it is, how fast and how long it trained."""

from __future__ import annotations

import datetime

import numpy as np

from flowdit.reporting.html import Fact
from flowdit.reporting.metrics import Curve, Session
from flowdit.reporting.reading import RunRecord
from flowdit.reporting.svg import amount


def facts(run: RunRecord) -> list[Fact]:
    """What a reader looks for first."""
    metrics = run.metrics
    found = [Fact("Step", f"{run.last_step:,}", _progress(run))]
    for name, title in (("train/loss", "Training loss"), ("validation/loss", "Validation loss")):
        if (curve := metrics.curve(name)) is not None and np.isfinite(curve.values).any():
            lowest = int(np.nanargmin(curve.values))
            detail = f"lowest {curve.values[lowest]:.4f} at step {int(curve.steps[lowest]):,}"
            found.append(Fact(title, f"{curve.last:.4f}", detail if name.startswith("validation") else ""))
    if (speed := metrics.curve("train/images_per_second")) is not None and (rate := _mean_rate(speed)):
        found.append(Fact("Images per second", f"{rate:,.4g}", "mean, without pauses"))
    if (mfu := metrics.curve("train/mfu")) is not None and np.isfinite(mfu.values).any():
        found.append(Fact("MFU", f"{np.nanmedian(mfu.values):.1%}", "median"))
    if hours := sum(session.hours for session in metrics.sessions):
        found.append(Fact("Time", duration(hours), _sessions(metrics.sessions)))
    elif len(metrics.clock.values):
        found.append(Fact("Time", duration(metrics.clock.last), "with pauses"))
    if (batch := run.batch_size) is not None:
        found.append(Fact("Images seen", amount(run.last_step * batch), f"batches of {batch:,}"))
    if (flops := metrics.curve("train/total_flops")) is not None and np.isfinite(flops.last):
        found.append(Fact("Training FLOPs", f"{flops.last:.2e}"))
    if (skipped := metrics.curve("train/skipped_steps")) is not None and skipped.last > 0:
        found.append(Fact("Skipped steps", f"{skipped.last:,.0f}", "loss or gradient not finite"))
    hardware = (run.reference or {}).get("hardware") if run.meta is None else run.meta.hardware
    if hardware:
        found.append(Fact("Hardware", hardware))
    return found


def _progress(run: RunRecord) -> str:
    if run.reference is not None:
        return "reference"
    if run.meta is None:
        return "no checkpoint yet"
    total = run.meta.config.train.num_steps
    return "complete" if run.last_step >= total else f"of {total:,}"


def _sessions(sessions: list[Session]) -> str:
    repeated = sum(session.repeated for session in sessions)
    parts = ["with pauses"] if len(sessions) == 1 else [f"in {len(sessions)} sessions"]
    if repeated:
        parts.append(f"{repeated:,} steps done again")
    return ", ".join(parts)


def _mean_rate(curve: Curve) -> float:
    """The mean of a rate over all steps, which is steps by time; 0 if it is not known."""
    is_known = curve.values > 0
    lengths = np.diff(curve.steps[is_known], prepend=0).astype(np.float64)
    time = (lengths / curve.values[is_known]).sum()
    return float(lengths.sum() / time) if time else 0.0


def duration(hours: float) -> str:
    """`40 s`, `12 min`, `3 h 20 min`, `4.2 days`."""
    seconds = hours * 3600
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    if hours < 48:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{hours / 24:,.1f} days"


def moment(time: float | None) -> str:
    """A Unix time in UTC."""
    try:
        known = datetime.datetime.fromtimestamp(time, datetime.UTC) if time is not None else None
    except (ValueError, OverflowError, OSError):
        known = None
    return "unknown" if known is None else f"{known:%Y-%m-%d %H:%M} UTC"
