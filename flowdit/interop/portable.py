"""A model between formats: its arrays on the host by flowdit's names, and the metadata of a checkpoint.

Every reader makes one and every writer takes one, so any format that comes in can go out as any other.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from omegaconf.errors import OmegaConfBaseException

from flowdit.interop.layouts import Arrays
from flowdit.training.checkpoint import from_named, named_arrays, read_meta, save_slim
from flowdit.training.trained import Trained, describe_trained, load_trained

METADATA_KEY = "flowdit"
DTYPES = ("float32", "float16", "bfloat16")


class Portable(NamedTuple):
    """Arrays by dotted name (blocks lead with the depth axis), checkpoint metadata, and what to tell the user."""

    arrays: Arrays
    meta: dict[str, Any]
    notes: tuple[str, ...] = ()


def read_checkpoint(folder: Path, weights: str) -> Portable:
    """A flowdit checkpoint, whole or slim, verified; its "ema" or "model" weights in float32."""
    meta = read_meta(folder)
    return Portable(host_arrays(load_trained(folder, weights=weights).model), meta)


def host_arrays(model: Any) -> Arrays:
    return {name: np.asarray(array) for name, array in named_arrays(model).items()}


def read_single(file: Path) -> Portable | None:
    """One safetensors file as `write_single` makes it; None if it carries no flowdit metadata."""
    try:
        with safetensors.safe_open(file, framework="np") as stored:
            metadata = stored.metadata() or {}
            if METADATA_KEY not in metadata:
                return None
            arrays = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        meta = json.loads(metadata[METADATA_KEY])
    except (OSError, ValueError, safetensors.SafetensorError, TypeError, AttributeError) as problem:
        raise ValueError(f"source: {file} is not a readable safetensors file ({problem})") from problem
    return checked(Portable(arrays, meta), str(file))


def checked(portable: Portable, source: str) -> Portable:
    """The same, once metadata and arrays agree. Raises `ValueError` listing every array that does not fit."""
    check_shapes(model_shapes(portable.meta, source), {n: a.shape for n, a in portable.arrays.items()}, source)
    return portable


def model_shapes(meta: dict[str, Any], source: str) -> dict[str, tuple[int, ...]]:
    """The shapes of the arrays of the model that checkpoint metadata describe."""
    try:
        described = describe_trained(meta)
    except (KeyError, TypeError, AttributeError, OmegaConfBaseException) as problem:
        raise ValueError(
            f"source: {source} has metadata that are not a flowdit checkpoint's ({problem!r})"
        ) from problem
    return {name: leaf.shape for name, leaf in named_arrays(described.model).items()}


def check_shapes(wanted: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]], source: str) -> None:
    """Raise `ValueError` listing all tensors that are missing, unexpected, or of another shape."""
    misfits = {n: f"{n} {list(found[n])} for {list(wanted[n])}" for n in wanted if n in found and found[n] != wanted[n]}
    faults = {
        "missing": wanted.keys() - found.keys(),
        "unexpected": found.keys() - wanted.keys(),
        "of another shape": set(misfits),
    }
    lines = [
        f"{len(names)} {fault}: {', '.join(misfits.get(n, n) for n in sorted(names))}"
        for fault, names in faults.items()
        if names
    ]
    if lines:
        raise ValueError(f"source: {source} must hold the tensors of its architecture, but {'; '.join(lines)}")


def cast(arrays: Arrays, dtype: str) -> Arrays:
    """In another precision. Raises `ValueError` for a value that the dtype cannot hold."""
    target = jnp.dtype(dtype)
    with np.errstate(over="ignore"):
        result = {name: array.astype(target, copy=False) for name, array in arrays.items()}
    for name, array in result.items():
        if not np.isfinite(array).all() and np.isfinite(arrays[name]).all():
            raise ValueError(f"dtype: {name} has values beyond the range of {dtype}; take bfloat16 or float32")
    return result


def write_checkpoint(portable: Portable, target: Path, dtype: str) -> None:
    """An ordinary flowdit checkpoint of weights and metadata, without optimizer state."""
    save_slim(target, cast(portable.arrays, dtype), portable.meta, dtype)


def write_single(portable: Portable, target: Path, dtype: str) -> None:
    """One safetensors file: the arrays under our names, the metadata as JSON in its header."""
    metadata = {METADATA_KEY: json.dumps(portable.meta), "format": "np"}
    save_tensors(cast(portable.arrays, dtype), target, metadata)


def save_tensors(tensors: Arrays, file: Path, metadata: dict[str, str]) -> None:
    """A safetensors file that others may read: the library's own are the owner's alone."""
    safetensors.numpy.save_file(tensors, file, metadata)
    file.chmod(0o644)


def to_trained(portable: Portable) -> Trained:
    """The model on the first device in float32, ready to sample."""
    trained = describe_trained(portable.meta)
    arrays = {name: jnp.asarray(array, jnp.float32) for name, array in portable.arrays.items()}
    return trained._replace(model=from_named(trained.model, arrays))
