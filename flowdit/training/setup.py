"""Building the parts of a run from a configuration, and checking that they are consistent."""

from __future__ import annotations

import dataclasses
import functools
import logging
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from etils import epath
from jax.sharding import Mesh

from flowdit import conditioning as kinds
from flowdit.checkpoint.files import list_steps
from flowdit.checkpoint.meta import Averages, RunMeta, run_meta
from flowdit.checkpoint.restore import Found, abstract_state
from flowdit.checkpoint.writer import check_free_space
from flowdit.conditioning import Batch, Conditioning
from flowdit.config import Config
from flowdit.data.loader import DataConfig, DataSet, Source, TrainStream, open_source
from flowdit.data.manifest import Manifest
from flowdit.data.mirror import local_folder, provide_shards
from flowdit.data.schema import LATENTS, Schema, record_schema
from flowdit.diffusion.objective import FlowMatching
from flowdit.fields import about
from flowdit.fsdp import check_width
from flowdit.hardware import this_machine
from flowdit.models.compute import Compute, choose_compute
from flowdit.optim import make_optimizer
from flowdit.processes import from_first
from flowdit.sharding import batch_sharding, check_batch_size, init_sharded, make_mesh, own_rows
from flowdit.training.agreement import require_one_data_set, require_shared_folder
from flowdit.training.diagnosis import Diagnosis, make_diagnose
from flowdit.training.evaluations import Evaluation, make_evaluations
from flowdit.training.evaluations.best import find_metric, resumed_best
from flowdit.training.evaluations.snapshot import snapshots
from flowdit.training.objective import make_objective
from flowdit.training.resume import prepare_folder, resume, run_folder
from flowdit.training.start import Start, drift_figures, initial_model, load_start
from flowdit.training.step import TrainState, TrainStep, image_flops, init_state, make_train_step

logger = logging.getLogger(__name__)


class Run(NamedTuple):
    """The parts of a run, ready for the loop. `figures` are logged once, before the first step.

    `image_flops` counts the training FLOPs of one image of a batch, without auxiliary losses.
    """

    folder: epath.Path
    mesh: Mesh
    conditioning: Conditioning
    state: TrainState
    stream: TrainStream
    data: DataSet
    train_step: TrainStep
    image_flops: Callable[[Batch], int]
    diagnosis: Diagnosis
    evaluations: list[Evaluation]
    meta: RunMeta
    figures: dict[str, float]


def start_run(config: Config, found: Found | None = None) -> Run:
    """Check all settings, then build or restore the state, from `found` if given. Raises one-line `ValueError`s."""
    train, folder = config.train, run_folder(config.train.checkpoint_dir)
    manifest = open_manifest(config.data)
    mesh = make_mesh(config.mesh)
    check_batch_size(mesh, train.batch_size, train.gradient_accum)
    conditioning = kinds.for_training(config, manifest, mesh)
    data = open_data(config, manifest, conditioning)
    parts = make_parts(config, manifest, conditioning, mesh)
    objective, compute = parts.objective, parts.compute
    evaluations = make_evaluations(config, data, mesh, conditioning, objective, compute)
    stream = make_stream(config, data.train, mesh)
    meta = run_meta(config, manifest, conditioning.describe(), objective.mean, objective.scale)
    meta = dataclasses.replace(meta, hardware=this_machine().kind)
    if train.average_widths:
        meta = dataclasses.replace(meta, averages=Averages(widths=tuple(train.average_widths)))
    if data.validation is None and train.validate_every:
        logger.info("no validation records: no validation loss")
    is_first_start = train.init_from and not list_steps(folder)
    start = load_start(config, manifest, conditioning, meta, mesh) if is_first_start else None
    resuming = from_first(lambda: prepare_folder(folder, train.is_restore))
    require_shared_folder(folder)
    check_free_space(folder, parts.template, meta)
    if resuming:
        state, meta = resume(
            folder=folder,
            template=parts.template,
            build_state=lambda: parts.build_state(None),
            mesh=mesh,
            stream=stream,
            conditioning=conditioning,
            meta=meta,
            found=found,
        )
        best = resumed_best(folder, find_metric(train, evaluations), int(state.step), meta.best)
        meta = dataclasses.replace(meta, best=best)
    else:
        state = init_sharded(mesh, parts.build_state, start)
    diagnose = make_diagnose(objective, config.seed, train.gradient_accum, compute, mesh)
    evaluations += snapshots(folder, train, meta, int(state.step))
    figures = drift_figures(start, state.model, manifest.latent_shape, train)
    return Run(
        folder=folder,
        mesh=mesh,
        conditioning=conditioning,
        state=state,
        stream=stream,
        data=data,
        train_step=parts.train_step,
        image_flops=parts.image_flops,
        diagnosis=Diagnosis(folder, mesh, stream, conditioning.encode, diagnose),
        evaluations=evaluations,
        meta=meta,
        figures=figures,
    )


class Parts(NamedTuple):
    """What a training step is made of. `template` has the shapes and shardings of the state; nothing is allocated.

    `build_state` initialises the state, from another run's model if there is one; usable under jit. `image_flops` is
    that of `Run`.
    """

    objective: FlowMatching
    compute: Compute
    build_state: Callable[[Start | None], TrainState]
    template: TrainState
    train_step: TrainStep
    image_flops: Callable[[Batch], int]


def make_parts(
    config: Config, manifest: Manifest, conditioning: Conditioning, mesh: Mesh, compute: Compute | None = None
) -> Parts:
    """The training step of a configuration, for the devices of `mesh`, which need not be attached.

    `compute` is chosen by `choose_compute` if it is None.
    Raises `ValueError` for a model that cannot be built on these data, or parameters that the mesh cannot split.
    """
    objective = make_objective(config, manifest, conditioning)
    build_model = conditioning.model_builder(config, manifest)
    if compute is None:
        shapes = conditioning.attention_shapes(config.model, manifest.latent_shape)
        compute = choose_compute(mesh, config.train.compute_dtype, shapes, config.model.kernels)
    optimizer = make_optimizer(config.optim, config.train.num_steps)

    def build_state(start: Start | None) -> TrainState:
        model = initial_model(build_model(), start, config.train)
        parameters = auxiliary_parameters(config, manifest)
        return init_state(model, optimizer, parameters, len(config.train.average_widths))

    train_step = make_train_step(
        optimizer,
        objective,
        config.seed,
        gradient_accum=config.train.gradient_accum,
        ema_decay=config.train.ema_decay,
        ema_warmup=config.train.ema_warmup,
        compute=compute,
        mesh=mesh,
        widths=config.train.average_widths,
    )
    template = abstract_state(mesh, lambda: build_state(None))
    check_width(mesh, template.parameters)
    # Without auxiliary losses, as adding or removing one would make the total jump.
    plain = dataclasses.replace(objective, auxiliary=())
    flops = functools.partial(image_flops, plain, compute, template.parameters)
    return Parts(objective, compute, build_state, template, train_step, flops)


def auxiliary_parameters(config: Config, manifest: Manifest) -> dict[str, Any]:
    """Initialise the parameters of the enabled auxiliary losses, by name; usable under jit."""
    # Independent of other losses, and of the network, which uses the key itself.
    key = jax.random.fold_in(jax.random.key(config.seed), 0x617578)
    return {
        loss.name: loss.init(
            config.model, manifest.latent_shape, key=jax.random.fold_in(key, zlib.crc32(loss.name.encode()))
        )
        for loss in config.auxiliary_losses()
    }


def make_stream(config: Config, source: Source, mesh: Mesh) -> TrainStream:
    """This process's share of the training batches."""
    return TrainStream(
        source,
        seed=config.seed,
        batch_size=config.train.batch_size,
        num_threads=config.data.num_threads,
        prefetch=config.data.prefetch,
        rows=own_rows(mesh, config.train.batch_size),
    )


def open_manifest(config: DataConfig) -> Manifest:
    """Read the data set's manifest, and verify its shards or copy them to the local disk.

    All processes must call it, and read the same data set. Raises `ValueError` naming file and rule.
    """
    with about("data.path"):
        manifest = Manifest.read(config.path)
    require_one_data_set(manifest.id)
    options = {"hashes": config.verify_hashes, "limit": config.hash_limit}
    with about("data.path"):
        provide_shards(config.path, manifest.shards, config.local_dir, **options)
    return manifest


def open_data(config: Config, manifest: Manifest, conditioning: Conditioning) -> DataSet:
    """Open the records of both splits, with the fields of conditioning and auxiliary losses."""
    schema = batch_schema(config, manifest, conditioning)
    folder = local_folder(config.data.path, manifest.shards, config.data.local_dir)

    def source(split: str) -> Source:
        options = {"schema": schema, "text": conditioning.reader(split), "max_bad_records": config.data.max_bad_records}
        return open_source(folder, manifest, split, **options)

    return DataSet(manifest, source("train"), source("validation") if manifest.num_records("validation") else None)


def batch_schema(config: Config, manifest: Manifest, conditioning: Conditioning) -> Schema:
    """What a record holds for conditioning and auxiliary losses. Raises `ValueError` if two read a field differently."""
    fields = conditioning.fields()
    for loss in config.auxiliary_losses():
        for name, field in loss.fields().items():
            if name in LATENTS or fields.setdefault(name, field) != field:
                others = fields.get(name, "a latent")
                raise ValueError(f"auxiliary.{loss.name}: reads the field {name} as {field}, others as {others}")
    return record_schema(manifest.latent_shape, fields, manifest.has_latent_std)


def abstract_batch(config: Config, manifest: Manifest, conditioning: Conditioning, mesh: Mesh) -> dict[str, Any]:
    """Shapes, dtypes and shardings of the global batch that the step gets, after `Conditioning.encode`."""
    columns = {
        name: jax.ShapeDtypeStruct(values.shape[1:], values.dtype)
        for name, values in batch_schema(config, manifest, conditioning).stack([]).items()
        if values.dtype != object  # captions, of which `encode` makes features
    }
    size, sharding = config.train.batch_size, batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct((size, *one.shape), one.dtype, sharding=sharding)
        for name, one in (columns | conditioning.encoded()).items()
    }
