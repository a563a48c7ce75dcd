"""Converting checkpoints of other projects to flowdit's arrays and metadata: the common part."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from flowdit.config import Config
from flowdit.data.loader import DataConfig
from flowdit.interop import layouts
from flowdit.interop.architectures import ARCHITECTURES
from flowdit.interop.layouts import Arrays, Layout
from flowdit.interop.metadata import ForeignConfig, foreign_meta
from flowdit.interop.portable import Portable, array_shapes, check_dtypes, check_shapes, checked, describe
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
    check_dtypes(found.source, tensors)
    config = Config(model=model, data=DataConfig(path=""))
    size = condition_size(found.layout, tensors)
    condition = ARCHITECTURES[model.name].condition(config, hints, size)
    meta = foreign_meta(config, condition, found.latent_shape, hints)
    meta = dataclasses.replace(meta, prediction=found.prediction, source=layout.name)
    shapes = array_shapes(describe(meta, found.source))
    wanted = layouts.tensor_shapes(layout, shapes, model.patch_size)
    with_variances = _with_variances(found, wanted)
    is_doubled = all(name in tensors and tensors[name].shape == shape for name, shape in with_variances.items())
    check_shapes(
        wanted | with_variances if is_doubled else wanted, {n: t.shape for n, t in tensors.items()}, found.source
    )
    tensors = _first_half(found, tensors) if is_doubled else tensors
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


def _with_variances(found: Found, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shapes of the final layer's tensors if it also has learned variances, in a second half of the channels."""
    names = [found.layout.theirs(f"final_linear.{part}") for part in ("weight", "bias")]
    return {name: (2 * shapes[name][0], *shapes[name][1:]) for name in names}


def _first_half(found: Found, tensors: Arrays) -> Arrays:
    """Remove the learned variances."""
    channels, patch_area = found.latent_shape[0], found.model.patch_size**2
    names = [found.layout.theirs(f"final_linear.{part}") for part in ("weight", "bias")]
    kept = f"the first {channels} of {2 * channels} output channels are kept"
    logger.info("%s: learned sigmas are dropped: %s", found.source, kept)
    halves = {n: tensors[n].reshape(patch_area, 2 * channels, -1)[:, :channels] for n in names}
    return tensors | {n: half.reshape(-1, *tensors[n].shape[1:]) for n, half in halves.items()}


def check_repeated(source: str, layout: Layout, tensors: Arrays, depth: int) -> None:
    """Raise `ValueError` if the copies of the time and class embedders in the blocks of diffusers' DiT differ."""
    for name in (name for name in tensors if layout.is_repeated(name)):
        for i in range(1, depth):
            if not np.array_equal(tensors[copy := layouts.numbered(layout, name, i)], tensors[name]):
                raise ValueError(
                    f"{source}: {copy} must equal {name}: all blocks must share one embedder "
                    "during training in torch (docs/interchange.md)"
                )
