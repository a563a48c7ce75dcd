"""Converting checkpoints of other projects to flowdit's arrays and metadata: the common part."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from flowdit.config import Config
from flowdit.data.loader import DataConfig
from flowdit.fields import listed
from flowdit.interop import layouts
from flowdit.interop.architectures import ARCHITECTURES
from flowdit.interop.layouts import Arrays, Layout
from flowdit.interop.metadata import ForeignConfig, foreign_meta
from flowdit.interop.portable import Portable, array_shapes, check_shapes, checked, describe
from flowdit.models.config import ModelConfig

logger = logging.getLogger(__name__)


class Found(NamedTuple):
    """A checkpoint of another project before conversion: tensors by their original names, and the model's shape."""

    source: str
    layout: Layout
    tensors: Arrays
    model: ModelConfig
    latent_shape: tuple[int, int, int]
    prediction: str


def assemble(found: Found, hints: ForeignConfig, fold: Callable[[Arrays], Arrays] | None = None) -> Portable:
    """Check the tensors against the architecture, rename them and add checkpoint metadata."""
    model = found.model
    layout = layouts.for_model(found.layout, model)
    tensors = {n: t for n, t in found.tensors.items() if not n.startswith(layout.ignored)}
    tensors = _first_half(found, tensors)
    check_dtypes(found.source, tensors)
    config = Config(model=model, data=DataConfig(path=""))
    size = condition_size(found.layout, tensors)
    condition = ARCHITECTURES[model.name].condition(config, hints, size)
    meta = foreign_meta(config, condition, found.latent_shape, hints)
    meta = dataclasses.replace(meta, prediction=found.prediction, source=layout.name)
    shapes = array_shapes(describe(meta, found.source))
    check_shapes(
        layouts.tensor_shapes(layout, shapes, model.patch_size), {n: t.shape for n, t in tensors.items()}, found.source
    )
    check_repeated(found.source, layout, tensors, model.depth)
    arrays = layouts.to_ours(layout, tensors, model.depth)
    arrays = fold(arrays) if fold else arrays
    if "null_caption" in shapes and "null_caption" not in arrays:
        logger.warning("%s holds no null caption, which is set to 0: use a negative prompt for guidance", found.source)
        arrays["null_caption"] = np.zeros(shapes["null_caption"], next(iter(arrays.values())).dtype)
    if found.prediction == "noise":
        logger.info("%s: the network predicts noise (DDPM): sampling converts it to a velocity", found.source)
    return checked(Portable(arrays, meta), found.source)


def condition_size(layout: Layout, tensors: Arrays) -> int:
    """Number of classes or width of the text, from the size of a tensor; 0 without that tensor."""
    size = ARCHITECTURES[layout.model].sizes[0]
    shape = np.shape(tensors.get(layout.theirs(size.ours), ()))
    return shape[size.axis] - size.more if len(shape) > size.axis else 0


def _first_half(found: Found, tensors: Arrays) -> Arrays:
    """Remove the learned variances in the second half of the output channels, if any."""
    channels, patch_area = found.latent_shape[0], found.model.patch_size**2
    names = [found.layout.theirs(f"final_linear.{part}") for part in ("weight", "bias")]
    if any(name not in tensors or len(tensors[name]) != 2 * channels * patch_area for name in names):
        return tensors
    kept = f"the first {channels} of {2 * channels} output channels are kept"
    logger.info("%s: learned sigmas are dropped: %s", found.source, kept)
    halves = {n: tensors[n].reshape(patch_area, 2 * channels, -1)[:, :channels] for n in names}
    return tensors | {n: half.reshape(-1, *tensors[n].shape[1:]) for n, half in halves.items()}


def check_dtypes(source: str, tensors: Arrays) -> None:
    """Raise `ValueError` for tensors of several dtypes, or of a non-float dtype."""
    kinds: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        kinds.setdefault(str(tensor.dtype), []).append(name)
    if len(kinds) > 1 or not set(kinds) <= {"float32", "float16", "bfloat16", "float64"}:
        each = (f"{len(names)} {kind} ({listed(sorted(names), 1)})" for kind, names in sorted(kinds.items()))
        raise ValueError(f"{source} must hold tensors of one float dtype, got {'; '.join(each)}")


def check_repeated(source: str, layout: Layout, tensors: Arrays, depth: int) -> None:
    """Raise `ValueError` if the copies of the time and class embedders in the blocks of diffusers' DiT differ."""
    for name in (name for name in tensors if layout.is_repeated(name)):
        for i in range(1, depth):
            if not np.array_equal(tensors[copy := layouts.numbered(layout, name, i)], tensors[name]):
                raise ValueError(
                    f"{source}: {copy} must equal {name}: all blocks must share one embedder "
                    "during training in torch (docs/interchange.md)"
                )
