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
from flowdit.data.manifest import Manifest
from flowdit.data.mixture import DataSet
from flowdit.data.stream import TrainStream
from flowdit.diffusion.auxiliary import DataShapes
from flowdit.diffusion.objective import FlowMatching
from flowdit.fsdp import check_width
from flowdit.hardware import this_machine
from flowdit.models.compute import Compute, choose_compute
from flowdit.optim import Optimizer, make_optimizer
from flowdit.processes import from_first
from flowdit.sharding import check_batch_size, init_sharded, make_mesh
from flowdit.training.agreement import require_shared_folder
from flowdit.training.diagnosis import Diagnosis, make_diagnose
from flowdit.training.evaluations import Evaluation, make_evaluations
from flowdit.training.evaluations.best import find_metric, resumed_best
from flowdit.training.evaluations.snapshot import snapshots
from flowdit.training.objective import make_objective
from flowdit.training.resume import prepare_folder, resume, run_folder
from flowdit.training.run_data import abstract_batch, feature_caches, make_stream, open_data, open_manifests
from flowdit.training.start import Start, drift_figures, initial_model, load_start
from flowdit.training.step import TrainState, TrainStep, image_flops, init_state, make_train_step

logger = logging.getLogger(__name__)


class Run(NamedTuple):
    """The parts of a run, ready for the loop. `figures` are logged once, before the first step.

    `batches` has the shapes of a batch of each bucket, by latent shape, and `template` those of the state.
    `image_flops` counts the training FLOPs of one image of a batch, without auxiliary losses.
    """

    folder: epath.Path
    mesh: Mesh
    conditioning: Conditioning
    state: TrainState
    stream: TrainStream
    data: DataSet
    train_step: TrainStep
    template: TrainState
    batches: dict[tuple[int, int, int], Any]
    image_flops: Callable[[Batch], int]
    diagnosis: Diagnosis
    evaluations: list[Evaluation]
    meta: RunMeta
    figures: dict[str, float]


def start_run(config: Config, found: Found | None = None) -> Run:
    """Check all settings, then build or restore the state, from `found` if given. Raises one-line `ValueError`s."""
    train, folder = config.train, run_folder(config.train.checkpoint_dir)
    parts_of_data, manifest = open_manifests(config)
    map_shape, features = feature_caches(config, parts_of_data)
    mesh = make_mesh(config.mesh)
    check_batch_size(mesh, train.batch_size, train.gradient_accum)
    conditioning = kinds.for_training(config, manifest, mesh)
    data = open_data(config, parts_of_data, manifest, conditioning, map_shape)
    parts = make_parts(config, manifest, conditioning, mesh, map_shape=map_shape)
    objective, compute = parts.objective, parts.compute
    evaluations = make_evaluations(config, data, mesh, conditioning, objective, compute)
    stream = make_stream(config, data, mesh)
    shapes = [shape for shape, share in zip(manifest.bucket_shapes, stream.shares, strict=True) if share]
    batches = {shape: abstract_batch(config, manifest, conditioning, mesh, shape, map_shape) for shape in shapes}
    meta = run_meta(config, manifest, conditioning.describe(), objective.mean, objective.scale)
    meta = dataclasses.replace(meta, hardware=this_machine().kind, features=features)
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
        template=parts.template,
        batches=batches,
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
    optimizer: Optimizer
    compute: Compute
    build_state: Callable[[Start | None], TrainState]
    template: TrainState
    train_step: TrainStep
    image_flops: Callable[[Batch], int]


def make_parts(
    config: Config,
    manifest: Manifest,
    conditioning: Conditioning,
    mesh: Mesh,
    compute: Compute | None = None,
    map_shape: tuple[int, int, int] | None = None,
) -> Parts:
    """The training step of a configuration, for the devices of `mesh`, which need not be attached.

    `compute` is chosen by `choose_compute` if it is None. `map_shape` is that of the feature maps, if a loss reads them.
    Raises `ValueError` for a model that cannot be built on these data, or parameters that the mesh cannot split.
    """
    objective = make_objective(config, manifest, conditioning)
    build_model = conditioning.model_builder(config, manifest)
    if compute is None:
        latent_shapes = dict.fromkeys((manifest.latent_shape, *manifest.bucket_shapes))
        shapes = [one for shape in latent_shapes for one in conditioning.attention_shapes(config.model, shape)]
        compute = choose_compute(mesh, config.train.compute_dtype, shapes, config.model.kernels)
    optimizer = make_optimizer(config.optim, config.train.num_steps, config.train.compute_dtype)

    def build_state(start: Start | None) -> TrainState:
        model = initial_model(build_model(), start, config.train)
        parameters = auxiliary_parameters(config, DataShapes(manifest.latent_shape, map_shape))
        return init_state(model, optimizer, parameters, len(config.train.average_widths))

    template = abstract_state(mesh, lambda: build_state(None))
    check_width(mesh, template.parameters)
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
        template=template if len(manifest.bucket_shapes) > 1 else None,
    )
    # Without auxiliary losses, as adding or removing one would make the total jump.
    plain = dataclasses.replace(objective, auxiliary=())
    flops = functools.partial(image_flops, plain, compute, template.parameters)
    return Parts(
        objective=objective,
        optimizer=optimizer,
        compute=compute,
        build_state=build_state,
        template=template,
        train_step=train_step,
        image_flops=flops,
    )


def auxiliary_parameters(config: Config, shapes: DataShapes) -> dict[str, Any]:
    """Initialise the parameters of the enabled auxiliary losses, by name; usable under jit."""
    # Independent of other losses, and of the network, which uses the key itself.
    key = jax.random.fold_in(jax.random.key(config.seed), 0x617578)
    return {
        loss.name: loss.init(config.model, shapes, key=jax.random.fold_in(key, zlib.crc32(loss.name.encode())))
        for loss in config.auxiliary_losses()
    }
