"""Checkpoints: `<folder>/<step>/` with `state`, `model_ema`, `dataset` and `meta`, written by Orbax in the background.

Arrays are stored by dotted name, never as pickled classes, so renaming a class does not orphan a checkpoint. Orbax
restores flipped bits without complaint, so `checksums.json` beside the items holds the SHA-256 of every file.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from flowdit.sharding import dotted_name, parameter_shardings
from flowdit.training.step import TrainState

FORMAT = 1
CHECKSUMS = "checksums.json"
TEMPORARY_SUFFIX = ".orbax-checkpoint-tmp"
Report = Callable[[str], None]


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or does not fit; or a folder that cannot be written."""


class Restored(NamedTuple):
    state: TrainState
    dataset: dict[str, Any]
    meta: dict[str, Any]


def named_arrays(tree: Any) -> dict[str, Any]:
    """`{"blocks.attention.qkv.weight": array, ...}` for the leaves of a pytree."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {dotted_name(path): leaf for path, leaf in leaves}


def from_named(template: Any, arrays: dict[str, Any]) -> Any:
    """`template`'s structure filled with the arrays of its names."""
    return jax.tree_util.tree_map_with_path(lambda path, _: arrays[dotted_name(path)], template)


def _split(state: TrainState) -> tuple[dict[str, Any], dict[str, Any]]:
    """The `state` and the `model_ema` item."""
    named = named_arrays(state)
    ema = {name.removeprefix("ema."): value for name, value in named.items() if name.startswith("ema.")}
    return {name: value for name, value in named.items() if not name.startswith("ema.")}, ema


class CheckpointWriter:
    """Saves asynchronously; keeps the newest `keep_last` steps and every multiple of `keep_every`."""

    def __init__(self, folder: Path, keep_last: int, keep_every: int | None):
        self.folder = folder
        self._pending: list[int] = []
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep_last,
            keep_period=keep_every,
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_checksums),
        )
        self._manager = ocp.CheckpointManager(folder.resolve(), options=options)

    @property
    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, dataset: dict[str, Any], meta: dict[str, Any]) -> None:
        """Copy the state to the host and write it in the background. A step already saved is left alone.

        Raises `CheckpointError` naming the last good checkpoint if this or the save before it cannot be written.
        """
        if step == self.latest_step:
            return
        try:
            self._manager.wait_until_finished()
            check_free_space(self.folder, state)
            self._pending.append(step)
            state_item, ema_item = _split(state)
            items = ocp.args.Composite(
                state=ocp.args.StandardSave(state_item),
                model_ema=ocp.args.StandardSave(ema_item),
                dataset=ocp.args.JsonSave(dataset),
                meta=ocp.args.JsonSave({"format": FORMAT, "step": step, **meta}),
            )
            self._manager.save(step, args=items, force=True)
        except Exception as problem:
            raise self._error(step, problem) from problem

    def wait(self) -> None:
        """Block until the last save is on disk with its checksums."""
        try:
            self._manager.wait_until_finished()
        except Exception as problem:
            raise self._error(self._pending[-1] if self._pending else -1, problem) from problem

    def reached_preemption(self, step: int) -> bool:
        """Whether the cluster has asked the processes of this run to stop (needs `mesh.multi_process`)."""
        return self._manager.reached_preemption(step)

    def close(self) -> None:
        self._manager.close()

    def _error(self, step: int, problem: Exception) -> CheckpointError:
        good = [s for s in list_steps(self.folder) if s != step]
        last = self.folder / str(max(good)) if good else "none"
        return CheckpointError(
            f"checkpoint {self.folder / str(step)}: could not be written: {_first_line(problem)}; last good: {last}"
        )

    def _write_checksums(self) -> None:
        # Orbax calls this when all items are on disk and before it renames the temporary folder, so that a finished
        # checkpoint never lacks its checksums.
        step = self._pending.pop()
        if jax.process_index() == 0:
            write_checksums(self.folder / f"{step}{TEMPORARY_SUFFIX}")


def check_free_space(folder: Path, state: TrainState) -> None:
    """Raise `CheckpointError` if the disk cannot take one more checkpoint of this state (or of its shapes)."""
    needed = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    free = shutil.disk_usage(folder).free
    if free < 1.05 * needed:
        raise CheckpointError(
            f"train.checkpoint_dir: a checkpoint needs {needed / 1e6:.0f} MB, {folder} has {free / 1e6:.0f} MB free"
        )


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(step_folder: Path) -> dict[str, Path]:
    """The files of all items by relative name. Orbax's own file beside them is written again after the checksums."""
    paths = sorted(p for p in step_folder.glob("*/**/*") if p.is_file())
    return {p.relative_to(step_folder).as_posix(): p for p in paths}


def write_checksums(step_folder: Path) -> None:
    """Record the SHA-256 of every file of a checkpoint's items."""
    sums = {name: _file_sha256(path) for name, path in _files(step_folder).items()}
    (step_folder / CHECKSUMS).write_text(json.dumps(sums, indent=1))


def verify_files(step_folder: Path) -> None:
    """Raise `CheckpointError` naming the first file that is missing or differs from its recorded checksum."""
    recorded = step_folder / CHECKSUMS
    try:
        sums = dict(json.loads(recorded.read_bytes()))
    except (OSError, ValueError, TypeError) as problem:
        raise CheckpointError(f"{recorded}: not readable") from problem
    files = _files(step_folder)
    for name, expected in sums.items():
        if name not in files:
            raise CheckpointError(f"{step_folder / name}: file is missing")
        if _file_sha256(files[name]) != expected:
            raise CheckpointError(f"{step_folder / name}: content differs from its checksum")


def list_steps(folder: Path) -> list[int]:
    """Finished checkpoints in `folder`, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(int(p.name) for p in folder.iterdir() if p.is_dir() and p.name.isdigit())


def read_meta(step_folder: Path) -> dict[str, Any]:
    """The checkpoint's metadata. Raises `CheckpointError` if it is not a flowdit checkpoint of a known format."""
    if not (step_folder / "meta").is_dir():
        raise CheckpointError(f"{step_folder}: not a checkpoint folder (expected checkpoints/<step>)")
    try:
        meta = ocp.Checkpointer(ocp.JsonCheckpointHandler()).restore(step_folder.resolve() / "meta")
    except Exception as problem:
        raise CheckpointError(f"{step_folder}: metadata cannot be read: {_first_line(problem)}") from problem
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        found = meta.get("format") if isinstance(meta, dict) else None
        raise CheckpointError(f"{step_folder}: checkpoint format must be {FORMAT}, got {found}")
    return meta


def _restore_arrays(item_folder: Path, targets: dict[str, Any]) -> dict[str, Any]:
    """Arrays by name, shapes checked first: Orbax would cast and sometimes slice without a word."""
    # The handler's own, as the checkpointer warns that an item has no metadata of a step.
    stored: Any = ocp.StandardCheckpointHandler().metadata(item_folder.resolve())  # type: ignore[arg-type]
    stored = getattr(stored, "tree", stored)
    found = {name: tuple(leaf.shape) for name, leaf in stored.items()}
    wanted = {name: tuple(leaf.shape) for name, leaf in targets.items()}
    if found != wanted:
        names = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        listed = ", ".join(f"{n} (stored {found.get(n)}, expected {wanted.get(n)})" for n in names[:5])
        raise CheckpointError(f"{item_folder}: {len(names)} arrays differ from the model: {listed}")
    return ocp.StandardCheckpointer().restore(item_folder.resolve(), targets)


def _restore_step(step_folder: Path, template: TrainState, check_meta: Callable[[dict], None]) -> Restored:
    state_targets, ema_targets = _split(template)
    meta = read_meta(step_folder)
    check_meta(meta)
    try:
        arrays = _restore_arrays(step_folder / "state", state_targets)
        ema = _restore_arrays(step_folder / "model_ema", ema_targets)
        dataset = ocp.Checkpointer(ocp.JsonCheckpointHandler()).restore(step_folder.resolve() / "dataset")
    except CheckpointError:
        raise
    except Exception as problem:
        raise CheckpointError(f"{step_folder}: cannot be read: {_first_line(problem)}") from problem
    arrays |= {f"ema.{name}": value for name, value in ema.items()}
    return Restored(from_named(template, arrays), dataset, meta)


def restore_newest(folder: Path, template: TrainState, check_meta: Callable[[dict], None], report: Report) -> Restored:
    """The newest checkpoint that is whole; damaged newer ones are reported and renamed to `<step>.damaged`.

    `template` holds `ShapeDtypeStruct`s with shardings. `check_meta` raises `ValueError` if the checkpoint is whole
    but belongs to another run: that ends the search. Raises `CheckpointError` if no step can be read.
    """
    damaged: list[tuple[Path, str]] = []
    for step in reversed(list_steps(folder)):
        step_folder = folder / str(step)
        try:
            if jax.process_index() == 0:
                verify_files(step_folder)
            restored = _restore_step(step_folder, template, check_meta)
        except CheckpointError as problem:
            report(f"checkpoint {step_folder} is damaged and passed over: {problem}")
            damaged.append((step_folder, str(problem)))
            continue
        multihost_utils.sync_global_devices("restored")
        _set_aside([path for path, _ in damaged])
        return restored
    raise CheckpointError(f"{folder}: no checkpoint can be read: " + "; ".join(reason for _, reason in damaged))


def _set_aside(step_folders: list[Path]) -> None:
    """Rename rather than delete: the step will be written again, and what is left may be worth a look."""
    for path in step_folders if jax.process_index() == 0 else []:
        target = path.with_name(f"{path.name}.damaged")
        shutil.rmtree(target, ignore_errors=True)
        path.rename(target)


def restore_weights(
    step_folder: Path, template: Any, mesh: jax.sharding.Mesh | None = None, weights: str = "ema"
) -> Any:
    """The EMA or, with `weights` "model", the raw weights in the structure of `template` (or its shapes), as float32.

    They lie on the first device, or on `mesh` as the sharding rules have it.
    """
    verify_files(step_folder)
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
        raise CheckpointError(f"{step_folder}: cannot be read: {_first_line(problem)}") from problem


def _restore_raw(step_folder: Path, targets: dict[str, Any]) -> dict[str, Any]:
    """The arrays of the model out of the `state` item, whose optimizer state is left on disk."""
    if not (step_folder / "state").is_dir():
        raise CheckpointError(f"{step_folder}: a slim checkpoint, which holds no raw weights, only the EMA")
    named = {f"model.{name}": target for name, target in targets.items()}
    restore_args = ocp.checkpoint_utils.construct_restore_args(named)
    request = ocp.args.PyTreeRestore(item=named, restore_args=restore_args, partial_restore=True)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        arrays = checkpointer.restore((step_folder / "state").resolve(), args=request)
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


def _first_line(problem: Exception) -> str:
    text = str(problem).strip()
    return text.splitlines()[0] if text else type(problem).__name__
