"""Reading files of the original repositories: facebookresearch/DiT, willisma/SiT, PixArt-alpha and PixArt-sigma."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np

from flowdit.fields import FieldError, called, content_of, listed, require, shown
from flowdit.interop import layouts
from flowdit.interop.architectures import ARCHITECTURES
from flowdit.interop.foreign import Found, assemble
from flowdit.interop.layouts import ORIGINAL_DIT, ORIGINAL_PIXART, Arrays, Layout
from flowdit.interop.metadata import ForeignConfig
from flowdit.interop.portable import Portable
from flowdit.models import pretrained
from flowdit.models.config import MODELS, ModelConfig, PixArtConfig
from flowdit.models.positions import Positions
from flowdit.models.torch_files import read_torch_file

# Heads by width in the papers; the files do not contain the number of heads.
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}


def read_original(file: Path, weights: str, hints: ForeignConfig) -> Portable:
    """Read a file of facebookresearch/DiT, willisma/SiT or PixArt-alpha / sigma: `.pt`, `.pth` or safetensors."""
    if file.suffix == ".safetensors":
        tensors, arguments = pretrained.read_tensors([file]), {}
    else:
        tensors, arguments = read_torch_file(file, weights)
    hints = _with_format(file, hints, arguments)
    layout = _original_layout(file, tensors, hints.format)
    model, latent_shape = _original_shape(file, layout, tensors, hints)
    prediction = hints.prediction or ("velocity" if hints.format == "sit" else "noise")
    found = Found(
        source=str(file),
        layout=layout,
        tensors=tensors,
        model=model,
        latent_shape=latent_shape,
        prediction=prediction,
    )
    return assemble(found, hints, fold_sit if hints.format == "sit" else None)


def _with_format(file: Path, hints: ForeignConfig, arguments: dict[str, Any]) -> ForeignConfig:
    """Add the format from the arguments in a training checkpoint. Raises `ValueError` for an unsupported SiT variant.

    SiT also supports curved paths, and networks that predict noise or scores.
    """
    name = shown(arguments.get("model")).strip("'")
    found = next((form for form in ("dit", "sit") if name.lower().startswith(f"{form}-")), None)
    if found and hints.format not in (None, found):
        raise FieldError("format", f"must be {found} for {file}, which was trained as {name}, got {hints.format}")
    for argument, needed in (("path_type", "Linear"), ("prediction", "velocity")):
        if found == "sit" and (value := arguments.get(argument, needed)) != needed:
            raise ValueError(f"{file} must be a SiT trained with {argument}={needed}, got {shown(value)}")
    return dataclasses.replace(hints, format=hints.format or found)


def _original_layout(file: Path, tensors: Arrays, given: str | None) -> Layout:
    layout = ORIGINAL_PIXART if given == "pixart" or "t_block.1.weight" in tensors else ORIGINAL_DIT
    if layout is ORIGINAL_DIT and "y_embedder.embedding_table.weight" not in tensors:
        is_diffusers = any(name.startswith("transformer_blocks.") for name in tensors)
        advice = "; a diffusers model is read as a folder, with its config.json" if is_diffusers else ""
        some = listed(sorted(tensors), 3)
        raise ValueError(f"{file} must be a checkpoint of DiT, SiT or PixArt, it holds {some}{advice}")
    if layout is ORIGINAL_DIT and given not in ("dit", "sit"):
        rule = f"must be dit or sit for {file}, whose tensors have the same names in both, got {given}"
        raise FieldError("format", rule)
    if layout is ORIGINAL_PIXART and given not in (None, "pixart"):
        raise FieldError("format", f"must be pixart for {file}, got {given}")
    return layout


def _original_shape(
    file: Path, layout: Layout, tensors: Arrays, hints: ForeignConfig
) -> tuple[ModelConfig, tuple[int, int, int]]:
    patches = tensors.get("x_embedder.proj.weight", np.zeros(0))
    if patches.ndim != 4 or 0 in patches.shape:
        raise ValueError(f"{file}: x_embedder.proj.weight must have 4 axes, got shape {list(patches.shape)}")
    dim, channels, patch_size, _ = patches.shape
    heads = hints.num_heads or HEADS.get(dim)
    if heads is None or dim % heads:
        rule = f"must be given and divide the width {dim}, which is not in the papers, got {heads}"
        raise FieldError("num_heads", rule)
    positions = _positions(file, tensors, dim)
    size = hints.latent_size or (None if positions is None else math.isqrt(len(positions)) * patch_size)
    if size is None:
        raise FieldError("latent_size", "must be given, as the file holds no position table")
    require("latent_size", size, size % patch_size == 0, f"must be divisible by the patch size {patch_size}")
    model = MODELS[layout.model](
        name=layout.model,
        depth=layouts.count_blocks(layout, tensors, str(file)),
        hidden_dim=dim,
        num_heads=heads,
        patch_size=patch_size,
        qk_norm=False,
        interpolation_scale=hints.interpolation_scale
        or _position_scale(file, layout, positions, dim, size, patch_size),
        position_base=size // patch_size,
        time_scale=1.0 if hints.format == "sit" else 1000.0,
    )
    if isinstance(model, PixArtConfig):
        null_caption = tensors.get("y_embedder.y_embedding")
        model.micro_conditioning = any(name.startswith("csize_embedder") for name in tensors)
        model.null_tokens = 1 if null_caption is None or null_caption.ndim != 2 else max(len(null_caption), 1)
    latent_shape = (channels, size, size)
    with content_of(file), called({"hidden_dim": "the width of x_embedder.proj.weight"}):
        model.check(latent_shape)
    return model, latent_shape


def _positions(file: Path, tensors: Arrays, dim: int) -> np.ndarray | None:
    """The position table (tokens, dim) of the file, or None."""
    positions = tensors.get("pos_embed")
    if positions is None:
        return None
    if positions.shape[-1:] != (dim,) or positions.ndim not in (2, 3) or positions.shape[:-2] not in ((), (1,)):
        raise ValueError(f"{file}: pos_embed must have shape [1, tokens, {dim}], got {list(positions.shape)}")
    table = positions.reshape(-1, dim)
    if len(table) != max(math.isqrt(len(table)), 1) ** 2:
        raise ValueError(f"{file}: pos_embed must be the table of a square grid, got {len(table)} tokens")
    return table


def _position_scale(
    file: Path, layout: Layout, positions: np.ndarray | None, dim: int, size: int, patch_size: int
) -> float:
    """The scale of the sin-cos table in the file; without a table for this size, PixArt's rule by size."""
    grid, scales = size // patch_size, ARCHITECTURES[layout.model].position_scales
    if positions is None or len(positions) != grid**2:
        return min(max(size / 64, min(scales)), max(scales))
    for scale in scales:
        if np.allclose(positions, Positions("sincos", scale).table(dim, grid, grid), atol=1e-2):
            return scale
    raise ValueError(f"{file}: pos_embed must be the fixed sin-cos table of its grid")


def fold_sit(arrays: Arrays) -> Arrays:
    """Fold SiT's reversed time and sign into the weights: v(x, t) here is -v(x, 1 - t) in SiT.

    SiT embeds its time s = 1 - t without a factor of 1000. With frequencies f, cos(s f) = cos(f) cos(t f) + sin(f)
    sin(t f) and sin(s f) = sin(f) cos(t f) - cos(f) sin(t f): a rotation of the rows of the first linear layer.
    """
    weight = arrays["time_embed.up.weight"].astype(np.float64)
    half = len(weight) // 2
    frequencies = np.exp(-np.log(10_000) * np.arange(half) / half)[:, None]
    cos = np.cos(frequencies)
    sin = np.sin(frequencies)
    of_cos, of_sin = np.split(weight, 2)
    rotated = np.concatenate([cos * of_cos + sin * of_sin, sin * of_cos - cos * of_sin])
    dtype = arrays["time_embed.up.weight"].dtype
    negated = {name: -arrays[name] for name in ("final_linear.weight", "final_linear.bias")}
    return arrays | negated | {"time_embed.up.weight": rotated.astype(dtype)}
