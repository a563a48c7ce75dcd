"""Checkpoints of other projects into flowdit's arrays and metadata: the part that all of them share."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from flowdit.interop import layouts
from flowdit.interop.layouts import Arrays, Layout
from flowdit.interop.metadata import ForeignConfig, foreign_meta
from flowdit.interop.portable import Portable, check_shapes, checked
from flowdit.models.ccdit import build_ccdit
from flowdit.models.mmdit import build_mmdit
from flowdit.models.pretrained import listed
from flowdit.models.transformer import ModelConfig
from flowdit.training.checkpoint import named_arrays


class Found(NamedTuple):
    """A foreign checkpoint before its weights are looked at: tensors by their names, and what is known of the shape."""

    source: str
    layout: Layout
    tensors: Arrays
    model: ModelConfig
    latent_shape: tuple[int, int, int]
    prediction: str
    notes: list[str]


def assemble(found: Found, said: ForeignConfig, fold: Callable[[Arrays], Arrays] | None = None) -> Portable:
    """Tensors, checked against the architecture one by one, under our names and with a checkpoint's metadata."""
    layout, model = found.layout, found.model
    tensors = {n: t for n, t in found.tensors.items() if not n.startswith(layout.ignored)}
    tensors = _first_half(found, tensors)
    if not model.micro_conditioning:
        layout = layouts.without(layout, "size_embed")
    check_dtypes(found.source, tensors)
    shapes = _our_shapes(found, tensors)
    check_shapes(
        layouts.tensor_shapes(layout, shapes, model.patch_size), {n: t.shape for n, t in tensors.items()}, found.source
    )
    check_repeated(found.source, layout, tensors, model.depth)
    arrays = layouts.to_ours(layout, tensors, model.depth)
    arrays = fold(arrays) if fold else arrays
    if model.name == "mmdit" and "null_caption" not in arrays:
        found.notes.append("the folder holds no null caption, which is set to 0: guide with a negative prompt")
        arrays["null_caption"] = np.zeros(shapes["null_caption"], next(iter(arrays.values())).dtype)
    if found.prediction == "noise":
        found.notes.append("the network predicts noise (DDPM): sampling makes a velocity of it")
    meta = foreign_meta(found.model, found.latent_shape, shapes, said, found.notes)
    meta |= {"prediction": found.prediction, "source": layout.name}
    return checked(Portable(arrays, meta, tuple(found.notes)), found.source)


def _first_half(found: Found, tensors: Arrays) -> Arrays:
    """Without the learned variances in the second half of the output channels, where there are any."""
    channels, patch_area = found.latent_shape[0], found.model.patch_size**2
    names = [found.layout.theirs(f"final_linear.{part}") for part in ("weight", "bias")]
    if any(name not in tensors or len(tensors[name]) != 2 * channels * patch_area for name in names):
        return tensors
    found.notes.append(f"learned sigmas are dropped: the first {channels} of {2 * channels} output channels are kept")
    halves = {n: tensors[n].reshape(patch_area, 2 * channels, -1)[:, :channels] for n in names}
    return tensors | {n: half.reshape(-1, *tensors[n].shape[1:]) for n, half in halves.items()}


def check_dtypes(source: str, tensors: Arrays) -> None:
    """Raise `ValueError` for tensors of several dtypes, or of one that no model is trained in."""
    kinds: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        kinds.setdefault(str(tensor.dtype), []).append(name)
    if len(kinds) > 1 or not set(kinds) <= {"float32", "float16", "bfloat16", "float64"}:
        each = (f"{len(names)} {kind} ({listed(sorted(names), 1)})" for kind, names in sorted(kinds.items()))
        raise ValueError(f"source: {source} must hold tensors of one float dtype, got {'; '.join(each)}")


def _our_shapes(found: Found, tensors: Arrays) -> dict[str, tuple[int, ...]]:
    """The shapes of our arrays, from the configuration and the sizes of the class table or the text."""
    model, shape, layout = found.model, found.latent_shape, found.layout
    model.check(shape)
    if model.name == "ccdit":
        classes = len(tensors.get(layout.theirs("class_table"), ())) - 1
        template = jax.eval_shape(lambda: build_ccdit(model, shape, max(classes, 1), key=jax.random.key(0)))
    else:
        projection = tensors.get(layout.theirs("caption_proj.up.weight"), np.zeros((0, 1)))
        template = jax.eval_shape(lambda: build_mmdit(model, shape, projection.shape[-1], key=jax.random.key(0)))
    return {name: leaf.shape for name, leaf in named_arrays(template).items()}


def check_repeated(source: str, layout: Layout, tensors: Arrays, depth: int) -> None:
    """Raise `ValueError` where blocks differ in the time and class embedders that diffusers' DiT keeps in each."""
    for name in (name for name in tensors if layout.is_repeated(name)):
        for i in range(1, depth):
            if not np.array_equal(tensors[copy := layouts.numbered(layout, name, i)], tensors[name]):
                raise ValueError(
                    f"source: {source}: {copy} must equal {name}: one embedder serves all blocks, and is to be shared "
                    "before a model is trained on in torch (docs/interchange.md)"
                )
