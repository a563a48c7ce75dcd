"""Explaining skipped steps: a second pass over the batch of a step whose loss or gradient was not finite."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Array, Int

from flowdit.data.loader import TrainStream
from flowdit.diffusion.objective import Batch, Losses, Objective, Parameters
from flowdit.errors import first_line
from flowdit.models.compute import FLOAT32, Compute
from flowdit.models.observe import Statistics, observing, statistics
from flowdit.processes import any_process
from flowdit.sharding import batch_sharding, dotted_name, parameter_specs, replicated, shard_batch
from flowdit.training.step import example_keys, laid_out, loss_and_grads

logger = logging.getLogger(__name__)

FOLDER = "skipped"
MAX_FILES = 20
"""Most steps that a process explains."""
SHOWN_EXAMPLES = 3


class Findings(NamedTuple):
    """The results of the second pass, on the host.

    `losses.observed` holds statistics of activations by name, for each example (and each block). `weights` and
    `gradients` are those of the parameters, by block where they are stacked; `grad_norm` is the norm that decides
    whether a step is skipped. `inputs` has for each example the largest absolute value of each field of the batch, or
    its number.
    """

    losses: Losses
    weights: Any
    gradients: Any
    grad_norm: Any
    inputs: dict[str, Any]


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
                objective, parameters, batch, keys, step=step, gradient_accum=gradient_accum, compute=compute
            )
        by_example = (losses, _inputs(batch))
        if mesh is not None:
            by_example = jax.lax.with_sharding_constraint(by_example, batch_sharding(mesh))
        return by_example, laid_out(mesh, grads)

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


class Skipped(NamedTuple):
    """A skipped step: its loss and gradient norm as logged, and the updates of the weights since then."""

    step: int
    loss: float
    grad_norm: float
    updates_since: int


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

        Problems become a warning.
        """
        self._explained += 1
        try:
            findings = self._findings(skipped, parameters, batch_number)
            file = self._folder / f"{skipped.step}.json"
            if jax.process_index() == 0:
                records = [{"file": str(shard), "record": n} for shard, n in self._stream.places(batch_number)]
                report = make_report(skipped, findings, records)
                logger.warning("%s; details: %s", summary(report), file)
                self._folder.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(report, indent=1))
            self.file = file
        except Exception as problem:  # memory, or a disk or store that is lost: the run goes on
            logger.warning("step %d was skipped and cannot be explained: %s", skipped.step, first_line(problem))

    def _findings(self, skipped: Skipped, parameters: Parameters, batch_number: int) -> Findings:
        rows, problem = None, None
        try:
            rows = self._stream.read(batch_number)
        except (ValueError, OSError) as error:
            problem = error
        if any_process(problem is not None):  # the others must not wait for this process
            raise problem or OSError("another process cannot read its rows of the batch")
        assert rows is not None
        batch = self._encode(shard_batch(self._mesh, rows))
        return self._diagnose(parameters, batch, jnp.asarray(skipped.step - 1, jnp.int32))


def make_report(skipped: Skipped, findings: Findings, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The content of a file, as JSON. Numbers that are not finite are strings.

    `first_not_finite` is the first such value in the order of the computation: in a forward pass through the layers,
    else the loss, else in a backward pass; null if the second pass was finite. `worst_examples` are the numbers, within
    the batch, of the examples with such a value, else of all, largest loss first.
    """
    losses = findings.losses
    values = _activations(losses.observed)
    first = _first_not_finite(values, findings)
    order = np.nan_to_num(losses.total, nan=np.inf)
    candidates = first["examples"] if first and first["examples"] else range(len(order))
    worst = sorted(candidates, key=lambda i: -order[i])
    own_first = dict.fromkeys(_not_finite(losses.total), "loss")
    for layer, name, value in reversed(values):
        own_first |= dict.fromkeys(_not_finite(value["largest"]), f"{layer} {name}")
    examples = [
        {
            **record,
            "t": losses.t[i],
            "loss": losses.total[i],
            **{f"loss_{name}": part[i] for name, part in losses.parts.items()},
            "input": {name: value[i] for name, value in findings.inputs.items()},
            "first_not_finite": own_first.get(i),
        }
        for i, record in enumerate(records)
    ]
    report = {
        "step": skipped.step,
        "loss": skipped.loss,
        "gradient_norm": skipped.grad_norm,
        "updates_of_the_weights_since": skipped.updates_since,
        "first_not_finite": first,
        "worst_examples": worst[:16],
        "layers": _layers(values, _by_layer(findings.weights), _by_layer(findings.gradients)),
        "examples": examples,
    }
    return _as_json(report)


Value = tuple[str, str, dict[str, np.ndarray]]
"""Layer, name and statistics of a value, each (examples,), in the order of the computation."""


def _activations(observed: Mapping[str, Any]) -> list[Value]:
    values = []
    for name, found in observed.items():
        if name == "blocks":
            depth = jax.tree.leaves(found)[0].shape[1]
            blocks = [jax.tree.map(lambda x, i=i: x[:, i], found) for i in range(depth)]
            values += [(f"block {i + 1}", n, _named(v)) for i, block in enumerate(blocks) for n, v in block.items()]
        else:
            values.append((name, "output", _named(found)))
    return values


def _named(found: Any) -> dict[str, np.ndarray]:
    return found._asdict() if isinstance(found, Statistics) else {"largest": found}


def _by_layer(parameters: Any) -> dict[str, float]:
    """The norm of each layer from the statistics of its parameters: of each block, and of what is beside the blocks."""
    squares: dict[str, float] = {}
    is_statistics = lambda node: isinstance(node, Statistics)
    for path, found in jax.tree_util.tree_flatten_with_path(parameters, is_leaf=is_statistics)[0]:
        group, layer, *_ = dotted_name(path).split(".")
        layer = layer if group == "model" else f"{group} {layer}"
        names = [layer] if not found.norm.ndim else [f"block {i + 1}" for i in range(len(found.norm))]
        for name, norm in zip(names, np.atleast_1d(found.norm).astype(np.float64), strict=True):
            squares[name] = squares.get(name, 0.0) + float(norm) ** 2
    return {name: math.sqrt(square) for name, square in squares.items()}


def _first_not_finite(values: list[Value], findings: Findings) -> dict[str, Any] | None:
    for layer, name, value in values:
        if bad := _not_finite(value["largest"]):
            return {"pass": "forward", "layer": layer, "value": name, "examples": bad}
    if bad := _not_finite(findings.losses.total):
        return {"pass": "forward", "layer": "loss", "value": "output", "examples": bad}
    if np.isfinite(findings.grad_norm):
        return None
    gradients = _by_layer(findings.gradients)
    backward = [*reversed(dict.fromkeys(layer for layer, _, _ in values)), *gradients]
    bad = [layer for layer in backward if not math.isfinite(gradients.get(layer, 0.0))]
    # Without any, the sum of their squares overflows.
    layer = bad[0] if bad else max(gradients, key=lambda name: gradients[name])
    return {"pass": "backward", "layer": layer, "value": "gradient", "examples": []}


def _not_finite(by_example: Any) -> list[int]:
    return np.flatnonzero(~np.isfinite(by_example)).tolist()


def _layers(values: list[Value], weights: dict[str, float], gradients: dict[str, float]) -> list[dict[str, Any]]:
    """One entry for each layer: norms of weights and gradient, and of the activations over the whole batch."""
    layers: dict[str, dict[str, Any]] = {name: {} for name in (*dict.fromkeys(v[0] for v in values), *weights)}
    for layer, name, value in values:
        norm = {"norm": np.linalg.norm(value["norm"].astype(np.float64))} if "norm" in value else {}
        layers[layer][name] = {**norm, "largest": value["largest"].max()}
    norms = {"weight_norm": weights, "gradient_norm": gradients}
    return [
        {"layer": layer, **{k: norm[layer] for k, norm in norms.items() if layer in norm}, **activations}
        for layer, activations in layers.items()
    ]


def _as_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return _as_json(value.item())
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def summary(report: Mapping[str, Any]) -> str:
    """The report in a line: the first value that is not finite, and the worst examples."""
    first, examples = report["first_not_finite"], report["examples"]
    since = report["updates_of_the_weights_since"]
    later = f" with the weights {since} updates later" if since else ""
    if first is None:
        found = f"a second pass{later} was finite"
    else:
        of = f" of {len(first['examples'])} of {len(examples)} examples" if first["examples"] else ""
        found = f"not finite{later}: first {first['layer']} {first['value']}{of} in the {first['pass']} pass"
    shown = "; ".join(
        f"{e['file']} record {e['record']} (t {_short(e['t'])}, loss {_short(e['loss'])})"
        for e in (examples[i] for i in report["worst_examples"][:SHOWN_EXAMPLES])
    )
    return (
        f"step {report['step']} was skipped (loss {_short(report['loss'])}, gradient norm "
        f"{_short(report['gradient_norm'])}); {found}; worst examples: {shown}"
    )


def _short(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"
