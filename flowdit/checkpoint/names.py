"""Names of the arrays of a checkpoint. No class is stored, so renaming a class does not invalidate checkpoints."""

from __future__ import annotations

import re
from typing import Any

import jax

from flowdit.diffusion.objective import Parameters
from flowdit.sharding import dotted_name

_OPT_STATE = jax.tree_util.GetAttrKey("opt_state")
_PARAMETERS = tuple(map(jax.tree_util.GetAttrKey, Parameters._fields))


def named_arrays(tree: Any) -> dict[str, Any]:
    """`{"blocks.attention.qkv.weight": array, ...}` for the leaves of a pytree."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {stored_name(path): leaf for path, leaf in leaves}
    assert len(named) == len(leaves), "two arrays have one name"
    return named


def from_named(template: Any, arrays: dict[str, Any]) -> Any:
    """Fill the structure of `template` with arrays by name."""
    return jax.tree_util.tree_map_with_path(lambda path, _: arrays[stored_name(path)], template)


def stored_name(path: tuple) -> str:
    """The name on disk. The optimizer's moments of the model have the names of the model's arrays, without `model.`.

    So the names are the same with and without auxiliary losses.
    """
    if path and path[0] == _OPT_STATE:
        # The first of these entries is the field of `Parameters`; names below it are arbitrary.
        field = next((i for i, entry in enumerate(path) if entry in _PARAMETERS), None)
        if field is not None and path[field] == _PARAMETERS[0]:
            path = path[:field] + path[field + 1 :]
    return dotted_name(path)


def split_state(state: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The `state` and `model_ema` items of a training state, whose field `ema` holds the EMA weights."""
    named = named_arrays(state)
    ema = {name.removeprefix("ema."): value for name, value in named.items() if name.startswith("ema.")}
    return {name: value for name, value in named.items() if not name.startswith("ema.")}, ema


def is_auxiliary(name: str) -> bool:
    """Whether an array of the `state` item belongs to an auxiliary loss: a parameter, or a moment of the optimizer."""
    return re.search(r"(^|^opt_state\..*\.)auxiliary\.", name) is not None


def is_average(name: str) -> bool:
    """Whether an array of the `state` item belongs to a power-function average of the model."""
    return name.startswith("averages.")
