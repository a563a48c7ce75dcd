"""Resuming a run from a checkpoint: checking that it is the same run, and reporting changes."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
from etils import epath
from jax.sharding import Mesh

from flowdit.checkpoint.files import CheckpointError, list_steps
from flowdit.checkpoint.meta import RunMeta
from flowdit.checkpoint.names import named_arrays
from flowdit.checkpoint.restore import Found, restore_newest
from flowdit.conditioning import Conditioning, kind_of
from flowdit.config import Config
from flowdit.data.stream import TrainStream
from flowdit.fields import about, require
from flowdit.joining import ProcessConfig
from flowdit.sharding import init_sharded
from flowdit.storage import connect, reason
from flowdit.training.step import TrainState, copies

logger = logging.getLogger(__name__)

# Fields that must not change for an exact resume; other changes are reported.
FIXED_FIELDS = (
    "seed",
    "train.batch_size",
    "optim.name",
    "optim.muon_modulation",
    "data.long_caption_prob",
    "data.tag_dropout",
)
# How the same numbers are computed, up to rounding.
COMPUTE_FIELDS = ("model.remat", "model.kernels", "model.scan_blocks")
# Fields of the processes and not of the run, which may continue on another machine.
PROCESS_FIELDS = tuple(f"mesh.{field.name}" for field in dataclasses.fields(ProcessConfig))
STARTING_FIELDS = ("train.is_restore", "train.requeue", "train.profile", *PROCESS_FIELDS)


def run_folder(checkpoint_dir: str) -> epath.Path:
    """The run folder, which need not exist. Raises `FieldError` for an object store that cannot be used."""
    with about("train.checkpoint_dir"):
        return connect(checkpoint_dir)


def is_in_use(folder: epath.Path) -> bool:
    """Whether `folder` exists and holds anything."""
    return folder.is_dir() and any(folder.iterdir())


def require_run(folder: epath.Path) -> None:
    """Raise `CheckpointError` unless `folder` holds a run: its path is probably mistyped."""
    if (folder / "meta").is_dir():
        raise CheckpointError(f"train.checkpoint_dir: must be a run folder, {folder} is a checkpoint: give its parent")
    if not is_in_use(folder):
        raise CheckpointError(f"train.is_restore: there is no run to resume in train.checkpoint_dir={folder}")


def prepare_folder(folder: epath.Path, is_restore: bool | None) -> bool:
    """Create the run folder; True if there is a checkpoint to resume from.

    A folder in use is never overwritten; with None its run is resumed, if it holds one. Resuming a run that does not exist
    is an error, as the path is probably mistyped. A run that ended before its first checkpoint starts again from step 0.
    """
    if is_restore:
        require_run(folder)
    elif is_restore is not None and is_in_use(folder):
        raise CheckpointError(
            f"train.checkpoint_dir: {folder} already holds a run; resume it with train.is_restore=true or choose another"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as problem:
        raise CheckpointError(f"train.checkpoint_dir: {folder} cannot be written: {reason(problem)}") from None
    return bool(list_steps(folder))


def resume(
    folder: epath.Path,
    template: TrainState,
    build_state: Callable[[], TrainState],
    mesh: Mesh,
    stream: TrainStream,
    conditioning: Conditioning,
    meta: RunMeta,
    found: Found | None,
) -> tuple[TrainState, RunMeta]:
    """Restore the newest intact checkpoint, `found` or else searched, and move the stream to the batch after it.

    Logs changed settings. Returns its state, and `meta` with what is of the resumed run: its id, its best step, and since
    when it has averages. Parameters of auxiliary losses that are not in the checkpoint are taken from `build_state`.
    """

    def check(stored: RunMeta) -> None:
        conditioning.check_resumable(stored)
        for change in check_same_run(stored, meta):
            logger.info(change)

    def fresh(names: set[str]) -> dict[str, jax.Array]:
        build = lambda: {name: array for name, array in named_arrays(build_state()).items() if name in names}
        return init_sharded(mesh, build)

    restored = restore_newest(folder, template, check, fresh, found)
    stream.set_state(restored.dataset)
    state, step = restored.state, int(restored.state.step)
    logger.info("resumed from %s", folder / str(step))
    meta = dataclasses.replace(meta, run_id=restored.meta.run_id, best=restored.meta.best)
    if meta.averages is not None and restored.meta.averages is None:
        logger.info("train.ema_snapshot_every: power-function averages start from the weights of step %d", step)
        state = eqx.tree_at(lambda s: s.averages, state, copies(state.model, len(state.averages)))
        return state, dataclasses.replace(meta, averages=dataclasses.replace(meta.averages, since=step))
    return state, dataclasses.replace(meta, averages=meta.averages and restored.meta.averages)


def check_same_run(stored: RunMeta, current: RunMeta) -> list[str]:
    """Changed fields as `name: old -> new`, from the metadata of a checkpoint and of this run.

    Raises `ValueError` if a change makes an exact resume impossible.
    """
    before, now = stored.config, current.config
    weights = [[folder.weight for folder in config.data.folders] for config in (before, now)]
    if len(weights[0]) == len(weights[1]):  # else another data set is what matters
        rule = f"the weights of the data sets must be {weights[0]} as in the checkpoint to resume"
        require("data.mix", weights[1], proportional(*weights), rule)
    # Not the stored identities, which may be of an earlier version.
    if different := stored.manifest.differences(current.manifest):
        raise ValueError(
            f"data.path: the data set must be the one of the checkpoint, got another {', '.join(different)}: "
            "the data changed since the checkpoint was written"
        )
    if (kind := kind_of(before)) != (ours := kind_of(now)):
        raise ValueError(f"conditioning: must be {kind} as in the checkpoint to resume, got {ours}")
    if stored.averages is not None and current.averages is not None:
        widths = list(stored.averages.widths)
        is_same = widths == list(current.averages.widths)
        rule = f"must be {widths} as in the checkpoint to resume"
        require("train.ema_widths", list(current.averages.widths), is_same, rule)
    if stored.features and current.features:
        rule = f"must hold features of the network in the checkpoint to resume, {stored.features}"
        require("data.feature_cache", current.features, stored.features == current.features, rule)
    notes = auxiliary_notes(before, now)
    old, new = (flat_settings(config) for config in (before, now))
    common = sorted(old.keys() & new.keys())
    changed = {name: (old[name], new[name]) for name in common if old[name] != new[name]}
    for name, (stored_value, value) in changed.items():
        is_fixed = name in FIXED_FIELDS and (name != "optim.muon_modulation" or now.optim.name == "muon")
        if is_fixed or (name.startswith("model.") and name not in COMPUTE_FIELDS):
            raise ValueError(f"{name}: must be {stored_value} as in the checkpoint to resume, got {value}")
    reported = {name: pair for name, pair in changed.items() if name not in STARTING_FIELDS}
    return notes + [f"changed since the checkpoint: {name}: {a} -> {b}" for name, (a, b) in reported.items()]


def proportional(some: Sequence[float], others: Sequence[float]) -> bool:
    """Whether two lists of weights are in the same ratio."""
    shares = ([weight / sum(weights) for weight in weights] for weights in (some, others))
    return len(some) == len(others) and all(itertools.starmap(math.isclose, zip(*shares, strict=True)))


def auxiliary_notes(before: Config, now: Config) -> list[str]:
    """Notes on auxiliary losses added or removed since the checkpoint."""
    old, new = _switched_on(before), _switched_on(now)
    return [
        *(
            f"auxiliary loss {name}: added since the checkpoint, starts from fresh parameters"
            for name in new
            if name not in old
        ),
        *(
            f"auxiliary loss {name}: removed since the checkpoint, its parameters are dropped"
            for name in old
            if name not in new
        ),
    ]


def flat_settings(config: Config) -> dict[str, Any]:
    """The settings of a run by key. Auxiliary losses that are switched off do not matter and are left out."""
    # Runs of earlier versions have no `conditioning` key.
    kind = kind_of(config)
    return _flat(dataclasses.asdict(config) | {"conditioning": kind, "auxiliary": _switched_on(config)})


def _switched_on(config: Config) -> dict[str, Any]:
    """Settings of the enabled losses by name, including losses that are not registered."""
    settings = dataclasses.asdict(config)["auxiliary"].items()
    return {name: values for name, values in settings if isinstance(values, dict) and values.get("weight")}


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
