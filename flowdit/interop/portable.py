"""The common form of a model between formats: arrays on the host under flowdit's names, and checkpoint metadata.

Every reader returns a `Portable` and every writer takes one, so any format can be converted to any other.
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
from etils import epath

from flowdit.arrays import check_arrays, shape_text
from flowdit.checkpoint.averages import restore_average
from flowdit.checkpoint.meta import RunMeta, read_meta
from flowdit.checkpoint.names import from_named, named_arrays
from flowdit.checkpoint.restore import restore_weights
from flowdit.checkpoint.sampler_file import with_sampler
from flowdit.checkpoint.writer import save_weights
from flowdit.fields import content_of, listed
from flowdit.inference.trained import Trained, describe_trained
from flowdit.interop.layouts import Arrays
from flowdit.interop.metadata import MAX_SAMPLED_SIDE
from flowdit.models.pretrained import check_finite, read_tensors

METADATA_KEY = "flowdit"
DTYPES = ("float32", "float16", "bfloat16")


class Portable(NamedTuple):
    """Arrays by dotted name (blocks have a leading depth axis) and checkpoint metadata."""

    arrays: Arrays
    meta: RunMeta


def read_checkpoint(
    folder: epath.PathLike, weights: str, *, is_verified: bool = False, ema_width: float | None = None
) -> Portable:
    """Verify, unless that was done, and read a flowdit checkpoint, with or without training state.

    Returns its "ema" or "model" weights in float32, or with `ema_width` an average of that width (post-hoc EMA).
    """
    meta = with_sampler(read_meta(folder, is_verified=is_verified), folder)
    template = describe(meta, str(folder)).model
    if ema_width is not None:
        arrays = host_arrays(restore_average(epath.Path(folder), template, ema_width))
    else:
        arrays = host_arrays(restore_weights(folder, template, weights=weights))
    check_finite(arrays, str(folder))
    return Portable(arrays, meta)


def host_arrays(model: Any) -> Arrays:
    return {name: np.asarray(array) for name, array in named_arrays(model).items()}


def read_single(file: Path) -> Portable | None:
    """Read a safetensors file written by `write_single`; None if it has no flowdit metadata."""
    try:
        with safetensors.safe_open(file, framework="np") as stored:
            text = (stored.metadata() or {}).get(METADATA_KEY)
        stored = json.loads(text or "null")
    except (OSError, ValueError, safetensors.SafetensorError, RecursionError) as problem:
        raise ValueError(f"{file} is not a readable safetensors file ({problem})") from problem
    if text is None:
        return None
    meta = parse_meta(stored, str(file))
    arrays = read_tensors([file])
    check_dtypes(str(file), arrays)
    return checked(Portable(arrays, meta), str(file))


def checked(portable: Portable, source: str) -> Portable:
    """Return `portable` if metadata and arrays agree. Raises `ValueError` listing the arrays that do not."""
    described = describe(portable.meta, source)
    check_shapes(array_shapes(described), {n: a.shape for n, a in portable.arrays.items()}, source)
    check_finite(portable.arrays, source)
    return portable


def parse_meta(stored: Any, source: str) -> RunMeta:
    """Checkpoint metadata as they came out of JSON. Raises `ValueError` in one line that names the source."""
    with content_of(source), content_of("metadata"):
        return RunMeta.parse(stored)


def describe(meta: RunMeta, source: str) -> Trained:
    """Parse checkpoint metadata, with the shapes of the model's arrays instead of the model.

    Raises `ValueError` with one line for metadata that are not a flowdit checkpoint's, or are too large to sample.
    """
    with content_of(source):
        try:
            described = describe_trained(meta)
        except (OverflowError, TypeError) as problem:  # sizes that no array can have
            raise ValueError(str(problem)) from problem
        _check_limits(described)
    return described


def _check_limits(described: Trained) -> None:
    """Raise `ValueError` for values used in sampling that no tensor size confirms."""
    _, *sides = described.manifest.latent_shape
    if max(sides) > MAX_SAMPLED_SIDE:
        raise ValueError(
            f"latent_shape: must have sides of at most {MAX_SAMPLED_SIDE}, got {described.manifest.latent_shape}"
        )


def array_shapes(described: Trained) -> dict[str, tuple[int, ...]]:
    """The shapes of the model's arrays by name."""
    return {name: leaf.shape for name, leaf in named_arrays(described.model).items()}


def check_shapes(wanted: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]], source: str) -> None:
    """Raise `ValueError` with the number and first names of tensors that are missing, unexpected or misshapen."""
    told, given = ({name: shape_text(shape) for name, shape in shapes.items()} for shapes in (wanted, found))
    check_arrays(told, given, source)


def check_dtypes(source: str, tensors: Arrays) -> None:
    """Raise `ValueError` for tensors of several dtypes, or of a non-float dtype."""
    kinds: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        kinds.setdefault(str(tensor.dtype), []).append(name)
    if len(kinds) > 1 or not set(kinds) <= {"float32", "float16", "bfloat16", "float64"}:
        each = (f"{len(names)} {kind} ({listed(sorted(names), 1)})" for kind, names in sorted(kinds.items()))
        raise ValueError(f"{source}: must hold tensors of one float dtype, got {'; '.join(each)}")


def cast(arrays: Arrays, dtype: str) -> Arrays:
    """Cast to another precision. Raises `ValueError` for a value that overflows."""
    target = jnp.dtype(dtype)
    with np.errstate(over="ignore"):
        result = {name: array.astype(target, copy=False) for name, array in arrays.items()}
    for name, array in result.items():
        if not np.isfinite(array).all() and np.isfinite(arrays[name]).all():
            raise ValueError(f"dtype: {name} has values beyond the range of {dtype}; use bfloat16 or float32")
    return result


def write_checkpoint(portable: Portable, target: epath.PathLike, dtype: str) -> None:
    """Write a flowdit checkpoint of weights and metadata, without optimizer state."""
    save_weights(target, cast(portable.arrays, dtype), portable.meta, dtype)


def write_single(portable: Portable, target: Path, dtype: str) -> None:
    """Write one safetensors file: arrays under our names, metadata as JSON in its header."""
    metadata = {METADATA_KEY: json.dumps(portable.meta.dump()), "format": "np"}
    save_tensors(cast(portable.arrays, dtype), target, metadata)


def save_tensors(tensors: Arrays, file: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file readable by all users; the library restricts it to the owner."""
    safetensors.numpy.save_file(tensors, file, metadata)
    file.chmod(0o644)


def to_trained(portable: Portable, device: Any = None) -> Trained:
    """The model in float32 for sampling, on the first device or a target of `jax.device_put`."""
    trained = describe_trained(portable.meta)
    arrays = {
        name: jax.device_put(array.astype(np.float32, copy=False), device) for name, array in portable.arrays.items()
    }
    return trained._replace(model=from_named(trained.model, arrays))
