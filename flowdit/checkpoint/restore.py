"""Restoring checkpoints: `<folder>/<step>/` with `state`, `model_ema`, `dataset` and `meta`, in Orbax's format.

The files are verified (`checkpoint.files`) before anything else is read.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from flowdit.arrays import check_arrays, shape_text
from flowdit.checkpoint.files import CheckpointError, DamagedCheckpoint, find_damage, list_steps, set_aside
from flowdit.checkpoint.meta import RunMeta, read_json_item, verified_meta
from flowdit.checkpoint.names import from_named, is_auxiliary, is_average, named_arrays, split_state
from flowdit.checkpoint.retention import best_step, is_best_name
from flowdit.errors import first_line
from flowdit.fields import listed
from flowdit.processes import from_first, wait_for_all
from flowdit.sharding import parameter_shardings
from flowdit.storage import absolute, connect

logger = logging.getLogger(__name__)

Fresh = Callable[[set[str]], dict[str, Any]]
State = TypeVar("State")
"""A training state: a pytree of arrays whose field `ema` holds the EMA weights."""


@dataclasses.dataclass(frozen=True)
class Restored(Generic[State]):
    state: State
    dataset: dict[str, Any]
    meta: RunMeta


def _restore_arrays(item_folder: epath.Path, targets: dict[str, Any]) -> dict[str, Any]:
    """Restore arrays by name after checking shapes: Orbax silently casts and sometimes slices.

    Arrays of auxiliary losses and of averages may be missing or additional on disk: those in common are read.
    """
    # The handler directly, as the checkpointer warns that an item has no metadata of a step.
    stored: Any = ocp.StandardCheckpointHandler().metadata(absolute(item_folder))
    stored = getattr(stored, "tree", stored)
    found = {name: shape_text(leaf.shape) for name, leaf in stored.items()}
    wanted = {name: shape_text(leaf.shape) for name, leaf in targets.items()}
    added_or_removed = {name for name in found.keys() ^ wanted.keys() if is_auxiliary(name) or is_average(name)}
    try:
        check_arrays(_without(wanted, added_or_removed), _without(found, added_or_removed), item_folder)
    except ValueError as problem:
        raise CheckpointError(str(problem)) from None
    if added_or_removed:
        return restore_some(item_folder, _without(targets, added_or_removed))
    return ocp.StandardCheckpointer().restore(absolute(item_folder), targets)


def _without(arrays: dict[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: array for name, array in arrays.items() if name not in names}


def restore_some(item_folder: epath.Path, targets: dict[str, Any]) -> dict[str, Any]:
    """Restore some of the arrays of an item."""
    restore_args = ocp.checkpoint_utils.construct_restore_args(targets)
    request = ocp.args.PyTreeRestore(item=targets, restore_args=restore_args, partial_restore=True)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        return checkpointer.restore(absolute(item_folder), args=request)


def _restore_step(step_folder: epath.Path, template: State, fresh: Fresh) -> Restored[State]:
    state_targets, ema_targets = split_state(template)
    meta = verified_meta(step_folder)
    try:
        arrays = _restore_arrays(step_folder / "state", state_targets)
        ema = _restore_arrays(step_folder / "model_ema", ema_targets)
        dataset = read_json_item(step_folder / "dataset")
    except CheckpointError:
        raise
    except Exception as problem:
        raise CheckpointError(f"{step_folder}: cannot be read: {first_line(problem)}") from problem
    arrays |= {f"ema.{name}": value for name, value in ema.items()}
    if missing := state_targets.keys() - arrays.keys():
        arrays |= fresh(missing)
    return Restored(from_named(template, arrays), dataset, meta)


@dataclasses.dataclass(frozen=True)
class Found:
    """The newest intact step of a run folder, and the names of newer, damaged ones."""

    step: int
    damaged: list[str]


def find_newest(folder: epath.Path) -> Found:
    """Find the newest intact checkpoint; damaged newer ones are logged.

    All processes must call it: each reads a share of the files, and all get the same answer. Raises `CheckpointError`
    if no step can be read.
    """
    damaged: dict[str, str] = {}
    for step in from_first(lambda: list_steps(folder)[::-1]):
        if (reason := find_damage(folder / str(step))) is not None:
            damaged[str(step)] = reason
            continue
        for name, reason in damaged.items() if jax.process_index() == 0 else ():
            logger.warning("checkpoint %s is damaged and skipped: %s", folder / name, reason)
        return Found(step, list(damaged))
    raise CheckpointError(f"{folder}: no checkpoint can be read: {listed(list(damaged.values()), limit=3, length=300)}")


def restore_newest(
    folder: epath.PathLike,
    template: State,
    check_meta: Callable[[RunMeta], None],
    fresh: Fresh,
    found: Found | None = None,
) -> Restored[State]:
    """Restore the newest intact checkpoint, `found` or else searched; damaged newer ones are renamed `<step>.damaged`.

    `template` holds `ShapeDtypeStruct`s with shardings. `check_meta` raises `ValueError` for a checkpoint of another run.
    `fresh` makes the arrays of auxiliary losses and averages that are not in the checkpoint, by name. Raises
    `CheckpointError` if no step can be read, or it is of another format.
    """
    folder = epath.Path(folder)
    found = found or find_newest(folder)
    step_folder = folder / str(found.step)
    from_first(lambda: _check_step(step_folder, found.step, check_meta))
    restored = _restore_step(step_folder, template, fresh)
    wait_for_all("restored")
    from_first(lambda: [set_aside(folder / name) for name in found.damaged])
    return restored


def _check_step(step_folder: epath.Path, step: int, check_meta: Callable[[RunMeta], None]) -> None:
    meta = verified_meta(step_folder)
    if meta.step != step:
        raise CheckpointError(f"{step_folder}: must be named after its step, {meta.step}")
    check_meta(meta)


def newest_intact(folder: epath.PathLike) -> epath.Path:
    """The newest intact checkpoint of a run folder, verified and logged; of `<run>/best` the best one.

    Other folders are returned unchanged. All processes must call it. Raises `CheckpointError` for a run folder without
    an intact checkpoint, and for a best one that is damaged or missing.
    """
    folder = connect(folder)
    if is_best_name(folder):
        found = best_step(folder)
        if (damage := find_damage(found)) is not None:
            raise DamagedCheckpoint(damage)
        logger.info("%s: the best checkpoint of the run", found)
        return found
    if (folder / "meta").is_dir() or not list_steps(folder):
        return folder
    found = folder / str(find_newest(folder).step)
    logger.info("%s: the newest intact checkpoint of the run", found)
    return found


def restore_weights(
    step_folder: epath.PathLike, template: Any, mesh: jax.sharding.Mesh | None = None, weights: str = "ema"
) -> Any:
    """Restore the EMA or, with `weights` "model", the raw weights as float32 in the structure of `template` (arrays or
    shapes).

    They are on the first device of the process, or on `mesh` by the sharding rules. The files must be verified before,
    by `read_meta`.
    """
    step_folder = epath.Path(step_folder)
    one_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shardings = {} if mesh is None else named_arrays(parameter_shardings(mesh, template))
    targets = {
        name: jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=shardings.get(name, one_device))
        for name, leaf in named_arrays(template).items()
    }
    try:
        if weights == "ema":
            return from_named(template, _restore_arrays(step_folder / "model_ema", targets))
        return from_named(template, _restore_raw(step_folder, targets))
    except CheckpointError:
        raise
    except Exception as problem:
        raise CheckpointError(f"{step_folder}: cannot be read: {first_line(problem)}") from problem


def _restore_raw(step_folder: epath.Path, targets: dict[str, Any]) -> dict[str, Any]:
    """Restore the arrays of the model from the `state` item, without the optimizer state."""
    if not (step_folder / "state").is_dir():
        raise CheckpointError(f"{step_folder}: holds only the EMA weights, not the raw ones")
    named = {f"model.{name}": target for name, target in targets.items()}
    arrays = restore_some(step_folder / "state", named)
    return {name.removeprefix("model."): array for name, array in arrays.items()}


def abstract_state(mesh: jax.sharding.Mesh, build: Callable[[], State]) -> State:
    """Shapes, dtypes and shardings of a state, as a template for restoring."""
    shapes = jax.eval_shape(build)
    shardings = parameter_shardings(mesh, shapes)
    return jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes, shardings
    )
