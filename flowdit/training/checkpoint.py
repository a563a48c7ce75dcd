"""Checkpoints: `<folder>/<step>/` with `state`, `model_ema`, `dataset` and `meta`, in Orbax's format.

Arrays are stored by dotted name, never as pickled classes, so renaming a class does not orphan a checkpoint. The files
are verified (`checkpoint_files`) before anything in them is believed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from flowdit.diffusion.objective import Parameters
from flowdit.errors import first_line
from flowdit.processes import from_first, wait_for_all
from flowdit.sharding import dotted_name, parameter_shardings
from flowdit.training.checkpoint_files import (
    CheckpointError,
    DamagedCheckpoint,
    list_steps,
    set_aside,
    verify_files,
    write_checksums,
)
from flowdit.training.step import TrainState

FORMAT = 1
Report = Callable[[str], None]
_OPT_STATE = jax.tree_util.GetAttrKey("opt_state")
_PARAMETERS = tuple(map(jax.tree_util.GetAttrKey, Parameters._fields))
Fresh = Callable[[set[str]], dict[str, Any]]


class Restored(NamedTuple):
    state: TrainState
    dataset: dict[str, Any]
    meta: dict[str, Any]


def named_arrays(tree: Any) -> dict[str, Any]:
    """`{"blocks.attention.qkv.weight": array, ...}` for the leaves of a pytree."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {stored_name(path): leaf for path, leaf in leaves}
    assert len(named) == len(leaves), "two arrays have one name"
    return named


def from_named(template: Any, arrays: dict[str, Any]) -> Any:
    """`template`'s structure filled with the arrays of its names."""
    return jax.tree_util.tree_map_with_path(lambda path, _: arrays[stored_name(path)], template)


def stored_name(path: tuple) -> str:
    """The name on disk. An optimizer's moments of the model are called after the model's arrays, without `model.`.

    So a run is the same on disk whether the optimizer has auxiliary losses to look after or not.
    """
    if path and path[0] == _OPT_STATE:
        # The first of the two is the field of `Parameters`; what lies below it may be called as it likes.
        field = next((i for i, entry in enumerate(path) if entry in _PARAMETERS), None)
        if field is not None and path[field] == _PARAMETERS[0]:
            path = path[:field] + path[field + 1 :]
    return dotted_name(path)


def split_state(state: TrainState) -> tuple[dict[str, Any], dict[str, Any]]:
    """The `state` and the `model_ema` item."""
    named = named_arrays(state)
    ema = {name.removeprefix("ema."): value for name, value in named.items() if name.startswith("ema.")}
    return {name: value for name, value in named.items() if not name.startswith("ema.")}, ema


def read_meta(step_folder: Path) -> dict[str, Any]:
    """The metadata of a checkpoint, all of whose files have been verified.

    Raises `CheckpointError` if it is not a flowdit checkpoint of a known format, `DamagedCheckpoint` if its files are not
    those that were written.
    """
    if not (step_folder / "meta").is_dir():
        raise CheckpointError(f"{step_folder}: not a checkpoint folder (expected checkpoints/<step>)")
    verify_files(step_folder)
    return _parse_meta(step_folder)


def _parse_meta(step_folder: Path) -> dict[str, Any]:
    try:
        meta = _read_json(step_folder / "meta")
    except Exception as problem:
        raise CheckpointError(f"{step_folder}: metadata cannot be read: {first_line(problem)}") from problem
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        found = meta.get("format") if isinstance(meta, dict) else None
        raise CheckpointError(f"{step_folder}: checkpoint format must be {FORMAT}, got {found}")
    return meta


def _read_json(item_folder: Path) -> Any:
    # The handler's own: a checkpointer waits for all processes, and the first one reads metadata alone.
    return ocp.JsonCheckpointHandler().restore(item_folder)  # type: ignore[arg-type]


def _restore_arrays(item_folder: Path, targets: dict[str, Any]) -> dict[str, Any]:
    """Arrays by name, shapes checked first: Orbax would cast and sometimes slice without a word.

    Arrays of auxiliary losses may be missing or too many on disk: those of both sides are read.
    """
    # The handler's own, as the checkpointer warns that an item has no metadata of a step.
    stored: Any = ocp.StandardCheckpointHandler().metadata(item_folder.resolve())  # type: ignore[arg-type]
    stored = getattr(stored, "tree", stored)
    found = {name: tuple(leaf.shape) for name, leaf in stored.items()}
    wanted = {name: tuple(leaf.shape) for name, leaf in targets.items()}
    names = {name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name)}
    came_or_went = {name for name in names if is_auxiliary(name) and (name in found) != (name in wanted)}
    if differing := sorted(names - came_or_went):
        listed = ", ".join(f"{n} (stored {found.get(n)}, expected {wanted.get(n)})" for n in differing[:5])
        raise CheckpointError(f"{item_folder}: {len(differing)} arrays differ from the model: {listed}")
    if came_or_went:
        return _restore_some(item_folder, {name: target for name, target in targets.items() if name in found})
    return ocp.StandardCheckpointer().restore(item_folder.resolve(), targets)


def _restore_some(item_folder: Path, targets: dict[str, Any]) -> dict[str, Any]:
    """Out of more arrays; the others stay on disk."""
    restore_args = ocp.checkpoint_utils.construct_restore_args(targets)
    request = ocp.args.PyTreeRestore(item=targets, restore_args=restore_args, partial_restore=True)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        return checkpointer.restore(item_folder.resolve(), args=request)


def is_auxiliary(name: str) -> bool:
    """Whether an array of the `state` item belongs to an auxiliary loss: a parameter, or a moment of the optimizer."""
    return re.search(r"(^|^opt_state\..*\.)auxiliary\.", name) is not None


def _restore_step(step_folder: Path, template: TrainState, fresh: Fresh) -> Restored:
    state_targets, ema_targets = split_state(template)
    meta = _parse_meta(step_folder)
    try:
        arrays = _restore_arrays(step_folder / "state", state_targets)
        ema = _restore_arrays(step_folder / "model_ema", ema_targets)
        dataset = _read_json(step_folder / "dataset")
    except CheckpointError:
        raise
    except Exception as problem:
        raise CheckpointError(f"{step_folder}: cannot be read: {first_line(problem)}") from problem
    arrays |= {f"ema.{name}": value for name, value in ema.items()}
    if missing := state_targets.keys() - arrays.keys():
        arrays |= fresh(missing)
    return Restored(from_named(template, arrays), dataset, meta)


def restore_newest(
    folder: Path, template: TrainState, check_meta: Callable[[dict], None], report: Report, fresh: Fresh
) -> Restored:
    """The newest checkpoint that is whole; damaged newer ones are reported and renamed to `<step>.damaged`.

    The first process finds it, and all are told before any of them restores. `template` holds `ShapeDtypeStruct`s with
    shardings. `check_meta` raises `ValueError` for a checkpoint that is whole but belongs to another run: that ends the
    search, as does a checkpoint of another format. `fresh` makes arrays of auxiliary losses that the checkpoint lacks,
    by their names. Raises `CheckpointError` if no step can be read.
    """
    step, damaged = from_first(lambda: _find_newest(folder, check_meta))
    for name, reason in damaged.items():
        report(f"checkpoint {folder / name} is damaged and passed over: {reason}")
    restored = _restore_step(folder / str(step), template, fresh)
    wait_for_all("restored")
    from_first(lambda: [set_aside(folder / name) for name in damaged])
    return restored


def _find_newest(folder: Path, check_meta: Callable[[dict], None]) -> tuple[int, dict[str, str]]:
    """The newest step that is whole, and for newer ones, by name, what is damaged in them."""
    step, damaged = _newest_whole(folder)
    step_folder = folder / str(step)
    meta = _parse_meta(step_folder)
    if meta.get("step") != step:
        raise CheckpointError(f"{step_folder}: must be named after the step that it holds, {meta.get('step')}")
    check_meta(meta)
    return step, damaged


def _newest_whole(folder: Path) -> tuple[int, dict[str, str]]:
    damaged: dict[str, str] = {}
    for step in reversed(list_steps(folder)):
        try:
            verify_files(folder / str(step))
        except DamagedCheckpoint as problem:
            damaged[str(step)] = str(problem)
            continue
        return step, damaged
    raise CheckpointError(f"{folder}: no checkpoint can be read: " + "; ".join(damaged.values()))


def newest_whole(folder: Path) -> Path:
    """The newest checkpoint of a run folder whose files are those that were written. Raises `CheckpointError` for none."""
    return folder / str(_newest_whole(folder)[0])


def restore_weights(
    step_folder: Path, template: Any, mesh: jax.sharding.Mesh | None = None, weights: str = "ema"
) -> Any:
    """The EMA or, with `weights` "model", the raw weights in the structure of `template` (or its shapes), as float32.

    They lie on the first device, or on `mesh` as the sharding rules have it. The files are taken to be verified, as
    `read_meta` does.
    """
    one_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
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


def _restore_raw(step_folder: Path, targets: dict[str, Any]) -> dict[str, Any]:
    """The arrays of the model out of the `state` item, whose optimizer state is left on disk."""
    if not (step_folder / "state").is_dir():
        raise CheckpointError(f"{step_folder}: a slim checkpoint, which holds no raw weights, only the EMA")
    named = {f"model.{name}": target for name, target in targets.items()}
    arrays = _restore_some(step_folder / "state", named)
    return {name.removeprefix("model."): array for name, array in arrays.items()}


def save_slim(target: Path, ema: Any, meta: dict[str, Any], dtype: str = "float16") -> None:
    """A checkpoint of `model_ema` and `meta` alone, the weights stored in `dtype`; it samples, it does not resume."""
    if target.exists():
        raise CheckpointError(f"{target}: exists already")
    arrays = {name: value.astype(jnp.dtype(dtype)) for name, value in named_arrays(ema).items()}
    items = ocp.args.Composite(model_ema=ocp.args.StandardSave(arrays), meta=ocp.args.JsonSave(meta))
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(target.resolve(), args=items)
    for marker in target.rglob("commit_success.txt"):
        marker.unlink()  # object stores need it while writing; in a file that is passed on it tells the author's paths
    write_checksums(target)


def abstract_state(mesh: jax.sharding.Mesh, build: Callable[[], TrainState]) -> TrainState:
    """Shapes, dtypes and shardings of a state, for restoring into."""
    shapes = jax.eval_shape(build)
    shardings = parameter_shardings(mesh, shapes)
    return jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes, shardings
    )
