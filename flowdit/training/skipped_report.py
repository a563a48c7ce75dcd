"""What is written about a skipped step, in a JSON file and on the console."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from flowdit.diffusion.objective import Losses
from flowdit.models.observe import Statistics
from flowdit.sharding import dotted_name

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


class Skipped(NamedTuple):
    """A skipped step: its loss and gradient norm as logged, and the updates of the weights since then."""

    step: int
    loss: float
    grad_norm: float
    updates_since: int


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
