"""A model between formats: its arrays on the host by flowdit's names, and the metadata of a checkpoint.

Every reader makes one and every writer takes one, so any format that comes in can go out as any other.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from flowdit.checkpoint.meta import read_meta
from flowdit.checkpoint.names import from_named, named_arrays
from flowdit.checkpoint.restore import restore_weights
from flowdit.checkpoint.writer import save_slim
from flowdit.diffusion.sampling import PREDICTIONS
from flowdit.fields import shortened, shown
from flowdit.inference.trained import Trained, describe_trained
from flowdit.interop.layouts import Arrays
from flowdit.models.pretrained import check_finite, listed, read_tensors

METADATA_KEY = "flowdit"
DTYPES = ("float32", "float16", "bfloat16")
# No tensor has these sizes, which take memory when a sample is drawn. 1,024 are images of 8,192 pixels.
MAX_SAMPLED_SIDE = 1024


class Portable(NamedTuple):
    """Arrays by dotted name (blocks lead with the depth axis), checkpoint metadata, and what to tell the user."""

    arrays: Arrays
    meta: dict[str, Any]
    notes: tuple[str, ...] = ()


def read_checkpoint(folder: Path, weights: str) -> Portable:
    """A flowdit checkpoint, whole or slim, verified; its "ema" or "model" weights in float32."""
    meta = read_meta(folder)
    arrays = host_arrays(restore_weights(folder, describe(meta, str(folder)).model, weights=weights))
    check_finite(arrays, f"source: {folder}")
    return Portable(arrays, meta)


def host_arrays(model: Any) -> Arrays:
    return {name: np.asarray(array) for name, array in named_arrays(model).items()}


def read_single(file: Path) -> Portable | None:
    """One safetensors file as `write_single` makes it; None if it carries no flowdit metadata."""
    try:
        with safetensors.safe_open(file, framework="np") as stored:
            text = (stored.metadata() or {}).get(METADATA_KEY)
        meta = json.loads(text or "null")
    except (OSError, ValueError, safetensors.SafetensorError, RecursionError) as problem:
        raise ValueError(f"source: {file} is not a readable safetensors file ({problem})") from problem
    if text is None:
        return None
    return checked(Portable(read_tensors([file]), meta), str(file))


def checked(portable: Portable, source: str) -> Portable:
    """The same, once metadata and arrays agree. Raises `ValueError` telling of the arrays that do not fit."""
    described = describe(portable.meta, source)
    check_shapes(array_shapes(described), {n: a.shape for n, a in portable.arrays.items()}, source)
    check_finite(portable.arrays, f"source: {source}")
    return portable


def describe(meta: dict[str, Any], source: str) -> Trained:
    """What checkpoint metadata tell, with the shapes of the model's arrays in place of the model.

    Raises `ValueError` in one line for what is not a flowdit checkpoint's, or would be too large to sample.
    """
    try:
        described = describe_trained(meta)
        _check_limits(described)
    except (ValueError, OverflowError, TypeError) as problem:
        raise ValueError(f"source: {source}: {shortened(str(problem), 300)}") from problem
    return described


def _check_limits(described: Trained) -> None:
    """Raise `ValueError` for what samples with this model would be made of, where no tensor has its size."""
    channels, *sides = described.manifest.latent_shape
    if max(sides) > MAX_SAMPLED_SIDE:
        raise ValueError(
            f"latent_shape: must have sides of at most {MAX_SAMPLED_SIDE}, got {described.manifest.latent_shape}"
        )
    for name, values in (("latent_mean", described.mean), ("latent_scale", described.scale)):
        if len(values) != channels or not np.isfinite(np.asarray(values, np.float64)).all():
            raise ValueError(f"{name}: must hold {channels} finite numbers, got {shown(values)}")
    if described.prediction not in PREDICTIONS:
        raise ValueError(f"prediction: must be one of {', '.join(PREDICTIONS)}, got {shown(described.prediction)}")


def array_shapes(described: Trained) -> dict[str, tuple[int, ...]]:
    """The shapes of the arrays of a model that was described."""
    return {name: leaf.shape for name, leaf in named_arrays(described.model).items()}


def check_shapes(wanted: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]], source: str) -> None:
    """Raise `ValueError` telling how many tensors are missing, unexpected or of another shape, with the first."""
    misfits = [f"{n} {list(found[n])} for {list(wanted[n])}" for n in wanted if n in found and found[n] != wanted[n]]
    faults = {
        "missing": wanted.keys() - found.keys(),
        "unexpected": found.keys() - wanted.keys(),
        "of another shape": misfits,
    }
    lines = [f"{len(names)} {fault}: {listed(sorted(names))}" for fault, names in faults.items() if names]
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


def to_trained(portable: Portable, device: Any = None) -> Trained:
    """The model in float32 on the first device, or wherever `jax.device_put` takes it, ready to sample."""
    trained = describe_trained(portable.meta)
    arrays = {
        name: jax.device_put(array.astype(np.float32, copy=False), device) for name, array in portable.arrays.items()
    }
    return trained._replace(model=from_named(trained.model, arrays))
