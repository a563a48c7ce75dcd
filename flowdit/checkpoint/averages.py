"""Post-hoc EMA: the weights of an average of any width, from the power-function averages of a run.

They are in the `state` of a checkpoint, at its step, and in the snapshots `<run>/ema/<step>/` of earlier ones.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from flowdit.checkpoint.files import CheckpointError, DamagedCheckpoint, list_steps, verify_files
from flowdit.checkpoint.meta import Averages, verified_meta
from flowdit.checkpoint.names import from_named, named_arrays
from flowdit.checkpoint.restore import restore_some
from flowdit.errors import first_line
from flowdit.fields import FieldError
from flowdit.power_ema import Average, check_width, reconstruct

logger = logging.getLogger(__name__)

SNAPSHOTS = "ema"
"""The folder of the snapshots in a run folder."""
MAX_ERROR = 0.1
"""The largest error of a profile that is accepted, as a fraction of its length."""


class Stored(NamedTuple):
    """An average on disk: the item's folder, and what stands before the names of its arrays."""

    average: Average
    item: epath.Path
    prefix: str


def restore_average(step_folder: epath.Path, template: Any, width: float) -> Any:
    """The weights of a verified checkpoint as an average of `width`, float32, in the structure of `template`.

    Snapshots are verified; damaged ones are left out, with a warning. Raises `FieldError` as `find_average`.
    """
    stored, factors = find_average(step_folder, width)
    return from_named(template, _combined(stored, factors, named_arrays(template)))


def find_average(step_folder: epath.Path, width: float) -> tuple[list[Stored], np.ndarray]:
    """The stored averages of which an average of `width` is made, and the factor of each.

    Snapshots are verified, but not loaded.

    Raises `FieldError` for a width that is impossible, or further from what is stored than `MAX_ERROR`, and for a
    checkpoint without averages.
    """
    check_width("ema_width", width)
    own = verified_meta(step_folder).averages
    if own is None or not (step_folder / "state").is_dir():
        raise FieldError("ema_width", f"{step_folder} has no power-function averages (train.ema_snapshot_every=0)")
    stored = _averages(own, step_folder / "state", "averages.")
    if width not in own.widths:
        stored = [*_snapshots(step_folder, own), *stored]
    wanted = Average(width, own.updates)
    factors, error = reconstruct([one.average for one in stored], wanted)
    number = len({one.item for one in stored}) - 1
    what = f"an average of width {width:g} from {number} snapshots and {step_folder}"
    if error > MAX_ERROR:
        near = " and ".join(f"{known:g}" for known in own.widths)
        rule = f"must be nearer to {near}, or the run have more snapshots: {what} has a profile that is {error:.0%} off"
        raise FieldError("ema_width", f"{rule} (limit {MAX_ERROR:.0%})")
    logger.info("%s; error of its profile %.2g %%", what, 100 * error)
    return stored, factors


def _averages(meta: Averages, item: epath.Path, prefix: str) -> list[Stored]:
    return [Stored(Average(width, meta.updates), item, f"{prefix}{i}.") for i, width in enumerate(meta.widths)]


def _snapshots(step_folder: epath.Path, own: Averages) -> Iterator[Stored]:
    """The averages of the run's snapshots before a checkpoint. Those of a time before the averages were switched off
    and on again, or of another run in the same folder, do not belong to it.
    """
    folder = step_folder.parent / SNAPSHOTS
    for step in list_steps(folder):
        if step >= int(step_folder.name):
            break
        try:
            verify_files(folder / str(step))
            meta = verified_meta(folder / str(step)).averages
        except DamagedCheckpoint as problem:
            logger.warning("snapshot left out: %s", problem)
            continue
        if meta is None or (meta.widths, meta.since) != (own.widths, own.since):
            continue
        if 0 < meta.updates < own.updates:
            yield from _averages(meta, folder / str(step) / "averages", "")


def _combined(stored: list[Stored], factors: np.ndarray, template: dict[str, Any]) -> dict[str, np.ndarray]:
    """The sum of the averages by name, each read in turn: two copies of the weights are in memory."""
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shapes = {name: jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=here) for name, leaf in template.items()}
    total = {name: np.zeros(leaf.shape, np.float32) for name, leaf in template.items()}
    for one, factor in zip(stored, factors, strict=True):
        targets = {f"{one.prefix}{name}": shape for name, shape in shapes.items()}
        try:
            arrays = restore_some(one.item, targets)
        except Exception as problem:
            raise CheckpointError(f"{one.item}: cannot be read: {first_line(problem)}") from problem
        for name, array in arrays.items():
            total[name.removeprefix(one.prefix)] += np.float32(factor) * np.asarray(array)
    return total
