"""From a configuration to the parts of a run, checked against each other before any device works."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from flowdit.config import Config, from_stored
from flowdit.data import manifest as data_manifest
from flowdit.data.loader import DataConfig, Source, TrainStream, open_source
from flowdit.data.manifest import Manifest
from flowdit.models.compute import Compute, choose_compute
from flowdit.processes import from_first
from flowdit.sharding import check_batch_size, init_sharded, make_mesh
from flowdit.training.checkpoint import abstract_state, restore_newest
from flowdit.training.checkpoint_files import CheckpointError, list_steps
from flowdit.training.checkpoint_writer import check_free_space
from flowdit.training.evaluate import Preview, Validation
from flowdit.training.objective import Objective, make_objective
from flowdit.training.optim import make_optimizer
from flowdit.training.stages import Stage, make_stage
from flowdit.training.start import drift_figures, initial_model, load_start
from flowdit.training.step import TrainState, TrainStep, init_state, make_train_step

# Fields that an exact resume needs unchanged; the rest may change and is reported.
FIXED_FIELDS = ("seed", "train.batch_size", "optim.name", "data.long_caption_prob")
# Fields that say how a process was started and nothing of the run.
STARTING_FIELDS = ("train.is_restore", "mesh.coordinator", "mesh.num_processes", "mesh.process_id")


@dataclasses.dataclass(frozen=True)
class Data:
    """A verified data set, opened."""

    manifest: Manifest
    train: Source
    validation: Source | None


class Run(NamedTuple):
    """The parts of a run, ready for the loop. `figures` are logged once, before the first step."""

    folder: Path
    mesh: Mesh
    stage: Stage
    state: TrainState
    stream: TrainStream
    data: Data
    train_step: TrainStep
    validation: Validation | None
    preview: Preview | None
    meta: dict[str, Any]
    notes: list[str]
    figures: dict[str, float]


def start_run(config: Config) -> Run:
    """Check everything, then build or restore the state. Raises `ValueError` in one line for what the user can mend."""
    train, folder = config.train, Path(config.train.checkpoint_dir)
    manifest = open_manifest(config.data)
    mesh = make_mesh(config.mesh)
    check_batch_size(mesh, train.batch_size, train.gradient_accum)
    stage = make_stage(config, manifest, mesh)
    data = open_data(config.data, manifest, stage)
    objective = make_objective(train, manifest, stage.conditioning, _choose_compute(config, manifest, stage, mesh))
    validation, preview = _evaluations(config, data, mesh, stage, objective)
    stream = make_stream(config, data.train)
    meta, notes = run_meta(dataclasses.asdict(config), manifest, stage.meta, objective.mean, objective.scale), []
    start = None
    if train.init_from and not list_steps(folder):
        start = load_start(config, manifest, meta, mesh, notes)
    resuming = from_first(lambda: prepare_folder(folder, train.is_restore))

    optimizer = make_optimizer(config.optim, train.num_steps)
    build_state = lambda start: init_state(initial_model(stage.build_model(), start, train), optimizer)
    template = abstract_state(mesh, lambda: build_state(None))
    check_free_space(folder, template, meta)
    if resuming:
        state = resume(folder, template, stream, meta, notes)
    else:
        state = init_sharded(mesh, build_state, start)
    figures = drift_figures(start, state.model, train, notes)
    accum, decay, warmup = train.gradient_accum, train.ema_decay, train.ema_warmup
    train_step = make_train_step(optimizer, objective, config.seed, accum, decay, warmup, mesh)
    return Run(folder, mesh, stage, state, stream, data, train_step, validation, preview, meta, notes, figures)


def _choose_compute(config: Config, manifest: Manifest, stage: Stage, mesh: Mesh) -> Compute:
    text = stage.meta["text"]
    shapes = config.model.attention_shapes(manifest.latent_shape, text and text["max_length"])
    return choose_compute(mesh, config.train.compute_dtype, shapes)


def _evaluations(
    config: Config, data: Data, mesh: Mesh, stage: Stage, objective: Objective
) -> tuple[Validation | None, Preview | None]:
    train = config.train
    validation = preview = None
    if data.validation is not None and train.validate_every:
        micro_batch, limit = train.batch_size // train.gradient_accum, train.validation_records
        validation = Validation(data.validation, mesh, stage.encode, objective, micro_batch, limit, config.seed)
    if train.sample_every:
        requests = stage.previews(data.validation or data.train)
        folder = Path(train.checkpoint_dir)
        preview = Preview(folder, mesh, data.manifest, objective, train.sampler, requests, config.seed)
    return validation, preview


def make_stream(config: Config, source: Source) -> TrainStream:
    """This process's share of the training batches."""
    return TrainStream(
        source,
        seed=config.seed,
        batch_size=config.train.batch_size,
        num_threads=config.data.num_threads,
        prefetch=config.data.prefetch,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def resume(
    folder: Path, template: TrainState, stream: TrainStream, meta: dict[str, Any], notes: list[str]
) -> TrainState:
    """State of the newest whole checkpoint; the stream is moved to the batch after it. Appends what to tell the user."""

    def check(stored: dict[str, Any]) -> None:
        changes = check_same_run(stored, meta)
        notes.extend(f"changed since the checkpoint: {change}" for change in changes)

    restored = restore_newest(folder, template, check, notes.append)
    stream.set_state(restored.dataset)
    meta["run_id"] = restored.meta["run_id"]
    notes.append(f"resumed from {folder / str(int(restored.state.step))}")
    return restored.state


def open_manifest(config: DataConfig) -> Manifest:
    """The data set's manifest, once its shards agree with it. Raises `ValueError` naming the file and the rule."""
    manifest = Manifest.read(config.path)
    data_manifest.verify(config.path, manifest, hashes=config.verify_hashes, limit=config.hash_limit)
    return manifest


def open_data(config: DataConfig, manifest: Manifest, stage: Stage) -> Data:
    """The records of both splits as this stage reads them."""

    def source(split: str) -> Source:
        options = {"schema": stage.schema, "text": stage.text(split), "max_bad_records": config.max_bad_records}
        return open_source(config.path, manifest, split, **options)

    return Data(manifest, source("train"), source("validation") if manifest.num_records("validation") else None)


def prepare_folder(folder: Path, is_restore: bool) -> bool:
    """Make the run folder; True if there is a checkpoint to resume from.

    A folder in use is never written over, and a resume of a run that never was is a mistyped path, not a new run.
    A run that died before its first checkpoint starts again from step 0.
    """
    in_use = folder.is_dir() and any(folder.iterdir())
    if in_use and not is_restore:
        raise CheckpointError(
            f"train.checkpoint_dir: {folder} already holds a run; resume it with train.is_restore=true or choose another"
        )
    if is_restore and not in_use:
        raise CheckpointError(f"train.is_restore: there is no run to resume in train.checkpoint_dir={folder}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as problem:
        raise CheckpointError(f"train.checkpoint_dir: {folder} cannot be written: {problem.strerror}") from None
    return bool(list_steps(folder))


def check_same_run(stored: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """Changed fields as `name: old -> new`, from the metadata of a checkpoint and of this run.

    Raises `ValueError` if a change makes an exact resume impossible.
    """
    if stored["manifest_id"] != current["manifest_id"]:
        raise ValueError(
            f"data.path: the data set must be the one of the checkpoint (manifest {stored['manifest_id'][:12]}), "
            f"got {current['manifest_id'][:12]}: the data changed since the checkpoint was written"
        )
    old, new = _flat(dataclasses.asdict(from_stored(stored["config"]))), _flat(current["config"])
    changed = {name: (old[name], new[name]) for name in sorted(new) if old[name] != new[name]}
    for name, (before, now) in changed.items():
        if name in FIXED_FIELDS or (name.startswith("model.") and name != "model.remat"):
            raise ValueError(f"{name}: must be {before} as in the checkpoint to resume, got {now}")
    # An encoder that was moved is the same one.
    before, now = ({**(meta.get("text") or {}), "name": None} for meta in (stored, current))
    if before != now:
        raise ValueError(
            f"text.encoder: must be that of the checkpoint to resume, {stored['text']}, got {current['text']}"
        )
    return [f"{name}: {before} -> {now}" for name, (before, now) in changed.items() if name not in STARTING_FIELDS]


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def run_meta(
    config: dict[str, Any],
    manifest: Manifest,
    stage_meta: dict[str, Any],
    mean: Sequence[float],
    scale: Sequence[float],
) -> dict[str, Any]:
    """What a checkpoint says of itself, enough to sample from it and to refuse a resume that would not be exact."""
    packages = ("flowdit", "jax", "equinox", "optax", "orbax-checkpoint", "grain")
    return {
        "config": config,
        "manifest": dataclasses.asdict(manifest),
        "manifest_id": manifest.id,
        "latent_mean": list(mean),
        "latent_scale": list(scale),
        **stage_meta,
        "run_id": secrets.token_hex(4),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in packages}},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "source"
