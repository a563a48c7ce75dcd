"""Explaining skipped steps: a second pass over the batch of a step whose loss or gradient was not finite."""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Array, Int

from flowdit.data.stream import TrainStream
from flowdit.diffusion.objective import Batch, Losses, Objective, Parameters
from flowdit.errors import first_line
from flowdit.models.compute import FLOAT32, Compute
from flowdit.models.observe import observing, statistics
from flowdit.processes import any_process
from flowdit.sharding import batch_sharding, parameter_specs, replicated, shard_batch
from flowdit.training.skipped_report import Findings, Skipped, make_report, summary
from flowdit.training.step import example_keys, loss_and_grads

logger = logging.getLogger(__name__)

FOLDER = "skipped"
MAX_FILES = 20
"""Most steps that a process explains."""


Diagnose = Callable[[Parameters, Batch, Int[Array, ""]], Findings]


def make_diagnose(
    objective: Objective,
    seed: int,
    gradient_accum: int = 1,
    compute: Compute = FLOAT32,
    mesh: Mesh | None = None,
) -> Diagnose:
    """Return a (parameters, batch, steps before) -> findings on the host, with the random numbers of that training step.

    Several programs, one after the other, of which none has two collective operations that are independent of each
    other: over several processes, XLA for CPUs does not run those in the same order everywhere.
    """
    everywhere = None if mesh is None else replicated(mesh)

    def second_pass(
        parameters: Parameters, batch: Batch, step: Int[Array, ""]
    ) -> tuple[tuple[Losses, Any], Parameters]:
        keys = example_keys(seed, step, batch)
        with observing():
            losses, grads = loss_and_grads(
                objective, parameters, batch, keys, step=step, gradient_accum=gradient_accum, compute=compute, mesh=mesh
            )
        by_example = (losses, _inputs(batch))
        if mesh is not None:
            by_example = jax.lax.with_sharding_constraint(by_example, batch_sharding(mesh))
        return by_example, grads

    def norms(tree: Parameters) -> Parameters:
        specs = parameter_specs(tree)
        return jax.tree.map(lambda spec, leaf: statistics(leaf, lead=spec.stacked), specs, tree)

    def pack(leaves: list[Array]) -> Array:
        return jnp.concatenate([leaf.astype(jnp.float32).reshape(len(leaf), -1) for leaf in leaves], axis=1)

    run = jax.jit(compute.on(mesh, second_pass))
    run_norms, run_norm, run_pack = (
        jax.jit(function, out_shardings=everywhere) for function in (norms, optax.tree.norm, pack)
    )

    def diagnose(parameters: Parameters, batch: Batch, step: Int[Array, ""]) -> Findings:
        weights = jax.device_get(run_norms(parameters))
        by_example, grads = jax.block_until_ready(run(parameters, batch, step))
        gradients = jax.device_get(run_norms(grads))
        grad_norm = jax.device_get(run_norm(grads))
        leaves, structure = jax.tree.flatten(by_example)
        packed = jax.device_get(run_pack(leaves))
        widths = [math.prod(leaf.shape[1:]) for leaf in leaves]
        parts = np.split(packed, np.cumsum(widths)[:-1], axis=1)
        on_host = [part.reshape(leaf.shape).astype(leaf.dtype) for part, leaf in zip(parts, leaves, strict=True)]
        losses, inputs = jax.tree.unflatten(structure, on_host)
        return Findings(losses, weights, gradients, grad_norm, inputs)

    return diagnose


def _inputs(batch: Batch) -> dict[str, Array]:
    """For each example the largest absolute value of a field of real numbers, or its integer."""
    inputs = {}
    for name, values in batch.items():
        if jnp.issubdtype(values.dtype, jnp.floating):
            inputs[name] = jnp.abs(values.astype(jnp.float32)).reshape(len(values), -1).max(-1)
        elif jnp.issubdtype(values.dtype, jnp.integer) and values.ndim == 1:
            inputs[name] = values
    return inputs


class Diagnosis:
    """Explains the first of every row of skipped steps in `<run folder>/skipped/<step>.json`, up to `MAX_FILES`."""

    def __init__(
        self, folder: epath.Path, mesh: Mesh, stream: TrainStream, encode: Callable[[Batch], Batch], diagnose: Diagnose
    ):
        self._folder = folder / FOLDER
        self._mesh = mesh
        self._stream = stream
        self._encode = encode
        self._diagnose = diagnose
        self._explained = 0
        self._last_was_skipped = False
        self.file: epath.Path | None = None
        """The last file written."""

    def step_to_explain(self, step: int, window: Sequence[Mapping[str, Any]]) -> Skipped | None:
        """The first step of the last row of skipped ones among the steps up to `step` with metrics `window`, on the host.

        None if there is no such row, or it began before the window. It must be called with every window.
        """
        skipped = [not (np.isfinite(m["loss"]) and np.isfinite(m["grad_norm"])) for m in window]
        before = [self._last_was_skipped, *skipped]
        starts = [i for i, is_skipped in enumerate(skipped) if is_skipped and not before[i]]
        self._last_was_skipped = before[-1]
        if not starts or self._explained >= MAX_FILES:
            return None
        i = starts[-1]
        loss, grad_norm = float(window[i]["loss"]), float(window[i]["grad_norm"])
        return Skipped(step - len(window) + i + 1, loss, grad_norm, updates_since=skipped[i:].count(False))

    def explain(self, skipped: Skipped, parameters: Parameters, batch_number: int) -> None:
        """Compute again with `parameters`, write the file and log a line. All processes must call it.

        Problems become a warning. Only one in the computation over several processes is raised: the others would wait.
        """
        self._explained += 1
        rows = findings = None
        with _only_warning(skipped.step):
            rows = self._read(batch_number)
        if rows is None:
            return
        with _only_warning(skipped.step) if jax.process_count() == 1 else contextlib.nullcontext():
            batch = self._encode(shard_batch(self._mesh, rows))
            findings = self._diagnose(parameters, batch, jnp.asarray(skipped.step - 1, jnp.int32))
        if findings is not None:
            with _only_warning(skipped.step):
                self._report(skipped, findings, batch_number)

    def _read(self, batch_number: int) -> dict[str, np.ndarray]:
        """This process's rows. Raises an error on all processes if one of them cannot read."""
        rows, problem = None, None
        try:
            rows = self._stream.read(batch_number)
        except (ValueError, OSError) as error:
            problem = error
        if any_process(problem is not None):
            raise problem or OSError("another process cannot read its rows of the batch")
        assert rows is not None
        return rows

    def _report(self, skipped: Skipped, findings: Findings, batch_number: int) -> None:
        file = self._folder / f"{skipped.step}.json"
        if jax.process_index() == 0:
            records = [{"file": str(shard), "record": n} for shard, n in self._stream.places(batch_number)]
            report = make_report(skipped, findings, records)
            logger.warning("%s; details: %s", summary(report), file)
            self._folder.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(report, indent=1))
        self.file = file


@contextlib.contextmanager
def _only_warning(step: int) -> Iterator[None]:
    try:
        yield
    except Exception as problem:  # memory, or a disk or store that is lost: the run goes on
        logger.warning("step %d was skipped and cannot be explained: %s", step, first_line(problem))
