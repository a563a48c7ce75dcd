"""From a configuration to the parts of a run, checked against each other before any device works."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from flowdit.config import Config, TrainConfig
from flowdit.data import manifest as data_manifest
from flowdit.data.loader import Source, TrainStream, open_source
from flowdit.data.manifest import Manifest
from flowdit.diffusion.flow import resolution_shift
from flowdit.models.attention import attention_implementation
from flowdit.models.ccdit import CCDiT, ModelConfig, build_ccdit
from flowdit.sharding import check_batch_size, init_sharded, make_mesh, parameter_shardings
from flowdit.training.checkpoint import CheckpointError, abstract_state, check_free_space, list_steps, restore_newest
from flowdit.training.evaluate import Preview, Validation
from flowdit.training.optim import make_optimizer
from flowdit.training.step import Objective, TrainState, TrainStep, init_state, make_train_step

# Fields that an exact resume needs unchanged; the rest may change and is reported.
FIXED_FIELDS = ("seed", "train.batch_size", "optim.name")


class Run(NamedTuple):
    """The parts of a run, ready for the loop."""

    folder: Path
    mesh: Mesh
    state: TrainState
    stream: TrainStream
    train_step: TrainStep
    validation: Validation | None
    preview: Preview | None
    meta: dict[str, Any]
    notes: list[str]


def start_run(config: Config) -> Run:
    """Check everything, then build or restore the state. Raises `ValueError` in one line for what the user can mend."""
    train, folder = config.train, Path(config.train.checkpoint_dir)
    data = open_data(config.data.path, config.data.verify_hashes)
    objective = make_objective(train, data.manifest)
    build_model = model_builder(config.model, data.manifest, train.compute_dtype, config.seed)
    mesh = make_mesh(config.mesh)
    check_batch_size(mesh, train.batch_size, train.gradient_accum)
    labels = resolve_labels("train.sample_labels", train.sample_labels, data.manifest.class_names)
    validation, preview = _evaluations(config, data, mesh, objective, labels)
    stream = make_stream(config, data.train)
    resuming = prepare_folder(folder, train.is_restore)

    optimizer = make_optimizer(config.optim, train.num_steps)

    def build_state() -> TrainState:
        return init_state(build_model(), optimizer)

    meta, notes = run_meta(dataclasses.asdict(config), data, objective), []
    template = abstract_state(mesh, build_state)
    check_free_space(folder, template)
    if resuming:
        state = resume(folder, template, stream, meta, notes)
    else:
        state = init_sharded(mesh, build_state)
    shardings = parameter_shardings(mesh, template.model)
    accum, decay, warmup = train.gradient_accum, train.ema_decay, train.ema_warmup
    train_step = make_train_step(optimizer, objective, config.seed, accum, decay, warmup, shardings)
    return Run(folder, mesh, state, stream, train_step, validation, preview, meta, notes)


def _evaluations(
    config: Config, data: Data, mesh: Mesh, objective: Objective, labels: list[int]
) -> tuple[Validation | None, Preview | None]:
    train = config.train
    validation = preview = None
    if data.validation is not None and train.validate_every:
        micro_batch = train.batch_size // train.gradient_accum
        validation = Validation(data.validation, mesh, objective, micro_batch, train.validation_records, config.seed)
    if train.sample_every:
        folder = Path(train.checkpoint_dir)
        preview = Preview(folder, mesh, data.manifest, objective, train.sampler, labels, config.seed)
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
        changes = check_same_run(stored, meta["config"], meta["manifest_id"])
        notes.extend(f"changed since the checkpoint: {change}" for change in changes)

    restored = restore_newest(folder, template, check, notes.append)
    stream.set_state(restored.dataset)
    meta["run_id"] = restored.meta["run_id"]
    notes.append(f"resumed from {folder / str(int(restored.state.step))}")
    return restored.state


@dataclasses.dataclass(frozen=True)
class Data:
    """A verified data set, opened."""

    manifest: Manifest
    train: Source
    validation: Source | None


def open_data(path: str, verify_hashes: bool) -> Data:
    """Read the manifest, check the shards against it, open them. Raises `ValueError` naming the file and the rule."""
    manifest = Manifest.read(path)
    data_manifest.verify(path, manifest, hashes=verify_hashes)
    validation = open_source(path, manifest, "validation") if manifest.num_records("validation") else None
    return Data(manifest, open_source(path, manifest, "train"), validation)


def latent_affine(mean: Any, scale: Any, manifest: Manifest) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per-channel mean and scale of `(latent - mean) * scale`, from the configuration or the data's VAE.

    Raises `ValueError` if what comes out is far from unit variance: a wrong scale trains without a word and samples mud.
    """
    channels = manifest.latent_shape[0]
    if mean == "data":
        mean = list(manifest.channel_mean)
    if scale == "data":
        scale = [1 / max(deviation, 1e-6) for deviation in manifest.channel_std]
    mean = _per_channel("train.latent_mean", mean, manifest.vae.shift, channels)
    scale = _per_channel("train.latent_scale", scale, manifest.vae.scale, channels)
    deviation = float(np.sqrt(np.mean(np.square(np.asarray(manifest.channel_std) * np.asarray(scale)))))
    if not 0.5 <= deviation <= 2:
        raise ValueError(
            f"train.latent_scale: normalised latents must have a deviation in [0.5, 2], got {deviation:.3g} "
            f"(raw deviation {deviation / abs(scale[0]):.3g}, scale {scale[0]:.5g})"
        )
    return mean, scale


def _per_channel(field: str, value: Any, default: float, channels: int) -> tuple[float, ...]:
    values = default if value is None else value
    values = values if isinstance(values, Sequence) and not isinstance(values, str) else [values] * channels
    if len(values) != channels:
        raise ValueError(f"{field}: must be a number or one for each of the {channels} channels, got {len(values)}")
    if not all(isinstance(v, int | float) and not isinstance(v, bool) and np.isfinite(v) for v in values):
        raise ValueError(f"{field}: must be finite numbers, got {value}")
    if field.endswith("scale") and not all(values):
        raise ValueError(f"{field}: must not be 0, got {value}")
    return tuple(float(v) for v in values)


def make_objective(train: TrainConfig, manifest: Manifest) -> Objective:
    """What stage 1 minimises on this data: velocity error, conditioned on the label, the null class being the last."""
    mean, scale = latent_affine(train.latent_mean, train.latent_scale, manifest)
    shift = resolution_shift(manifest.latent_shape) if train.time_shift is None else train.time_shift
    return Objective(
        condition_field="label",
        null=np.int32(manifest.num_classes),
        drop_rate=train.drop_rate,
        mean=mean,
        scale=scale,
        time_distribution=train.time_distribution,
        time_shift=shift,
        compute_dtype=train.compute_dtype,
    )


def model_builder(config: ModelConfig, manifest: Manifest, compute_dtype: str, seed: int) -> Callable[[], CCDiT]:
    """A function that initialises the model of this configuration on this data's latents and classes."""
    config.check(manifest.latent_shape)
    tokens = manifest.latent_shape[1] * manifest.latent_shape[2] // config.patch_size**2
    implementation = attention_implementation(config.hidden_dim // config.num_heads, tokens, compute_dtype)
    return lambda: build_ccdit(
        config, manifest.latent_shape, manifest.num_classes, implementation, key=jax.random.key(seed)
    )


def resolve_labels(
    field: str, labels: Sequence[Any] | None, class_names: Sequence[str], default_count: int = 16
) -> list[int]:
    """Class numbers for numbers or names; without any, `default_count` classes spread over all."""
    if labels is None:
        count = min(default_count, len(class_names))
        return [i * len(class_names) // count for i in range(count)]
    if not labels:
        raise ValueError(f"{field}: must name at least one class, got []")
    return [_label(field, label, class_names) for label in labels]


def _label(field: str, label: Any, class_names: Sequence[str]) -> int:
    if isinstance(label, str) and label in class_names:
        return class_names.index(label)
    number = int(label) if isinstance(label, int) or str(label).isdigit() else -1
    if isinstance(label, bool) or not 0 <= number < len(class_names):
        known = ", ".join(class_names[:8]) + (", ..." if len(class_names) > 8 else "")
        raise ValueError(f"{field}: must be in [0, {len(class_names)}) or a class name ({known}), got {label!r}")
    return number


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


def check_same_run(stored: dict[str, Any], current: dict[str, Any], manifest_id: str) -> list[str]:
    """Changed fields as `name: old -> new`. Raises `ValueError` if one makes an exact resume impossible."""
    if stored["manifest_id"] != manifest_id:
        raise ValueError(
            f"data.path: the data set must be the one of the checkpoint (manifest {stored['manifest_id'][:12]}), "
            f"got {manifest_id[:12]}: the data changed since the checkpoint was written"
        )
    old, new = _flat(stored["config"]), _flat(current)
    changed = {
        name: (old.get(name), new.get(name))
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    }
    for name, (before, now) in changed.items():
        if name in FIXED_FIELDS or (name.startswith("model.") and name != "model.remat"):
            raise ValueError(f"{name}: must be {before} as in the checkpoint to resume, got {now}")
    return [f"{name}: {before} -> {now}" for name, (before, now) in changed.items() if name != "train.is_restore"]


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def run_meta(config: dict[str, Any], data: Data, objective: Objective) -> dict[str, Any]:
    """What a checkpoint says of itself, enough to sample from it and to refuse a resume that would not be exact."""
    packages = ("flowdit", "jax", "equinox", "optax", "orbax-checkpoint", "grain")
    return {
        "config": config,
        "manifest": dataclasses.asdict(data.manifest),
        "manifest_id": data.manifest.id,
        "latent_mean": list(objective.mean),
        "latent_scale": list(objective.scale),
        "run_id": secrets.token_hex(4),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in packages}},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "source"
