"""The arrays of a checkpoint by dotted name, never as pickled classes: renaming a class does not orphan a checkpoint."""

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
    """`template`'s structure filled with the arrays of its names."""
    return jax.tree_util.tree_map_with_path(lambda path, _: arrays[stored_name(path)], template)


def stored_name(path: tuple) -> str:
    """The name on disk. An optimizer's moments of the model are called after the model's arrays, without `model.`.

    So a run is the same on disk whether the optimizer has auxiliary losses to look after or not.
    """
    if path and path[0] == _OPT_STATE:
        # The first of the two is the field of `Parameters`; what lies below it may be called as it likes.
        field = next((i for i, entry in enumerate(path) if entry in _PARAMETERS), None)
        if field is not None and path[field] == _PARAMETERS[0]:
            path = path[:field] + path[field + 1 :]
    return dotted_name(path)


def split_state(state: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The `state` and the `model_ema` item of a training state, whose field `ema` holds the averaged weights."""
    named = named_arrays(state)
    ema = {name.removeprefix("ema."): value for name, value in named.items() if name.startswith("ema.")}
    return {name: value for name, value in named.items() if not name.startswith("ema.")}, ema


def is_auxiliary(name: str) -> bool:
    """Whether an array of the `state` item belongs to an auxiliary loss: a parameter, or a moment of the optimizer."""
    return re.search(r"(^|^opt_state\..*\.)auxiliary\.", name) is not None
