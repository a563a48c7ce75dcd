"""The mapping between tensors of other projects and our arrays: one table per format.

A table is used in both directions. Every conversion is a transposition, a concatenation or a selection, so a round trip
is bit-exact. It is numpy on the host: no network is built and no device is needed.

Layouts: diffusers' `DiTTransformer2DModel` and `PixArtTransformer2DModel`; facebookresearch/DiT and willisma/SiT, which
have the same names; PixArt-alpha/PixArt-alpha and PixArt-sigma.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from flowdit.models.config import ModelConfig, PixArtConfig
from flowdit.models.pretrained import numbers_after

Arrays = dict[str, np.ndarray]
BLOCK = "{i}"


class Field(NamedTuple):
    """Our array `ours`, and the tensors that are concatenated to it on the last axis.

    If the tensor names hold `{i}` there is one in each block, and our array has a leading depth axis.
    """

    ours: str
    theirs: tuple[str, ...]
    kind: str = "linear"

    @property
    def in_blocks(self) -> bool:
        return BLOCK in self.theirs[0]


class Layout(NamedTuple):
    """A format. `repeated` are prefixes of tensors of which every block holds an equal copy, where we have one array.

    `head_norms` are the Q/K norms of models that have them. `ignored` are prefixes of names that are not parameters:
    fixed positions and buffers.
    """

    name: str
    model: str
    fields: tuple[Field, ...]
    head_norms: tuple[Field, ...] = ()
    repeated: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    def is_repeated(self, name: str) -> bool:
        return name.startswith(self.repeated) if self.repeated else False

    def theirs(self, ours: str) -> str:
        """The name of the first tensor of our array `ours`."""
        return next(field.theirs[0] for field in self.fields if field.ours == ours)

    @property
    def block_prefix(self) -> str:
        return next(field.theirs[0] for field in self.fields if field.in_blocks).partition(BLOCK)[0]


def _linear(ours: str, *theirs: str) -> tuple[Field, Field]:
    weights, biases = (tuple(f"{name}.{part}" for name in theirs) for part in ("weight", "bias"))
    return Field(f"{ours}.weight", weights), Field(f"{ours}.bias", biases, "plain")


def _fields(*parts: Field | tuple[Field, ...]) -> tuple[Field, ...]:
    return tuple(field for part in parts for field in ((part,) if isinstance(part, Field) else part))


def _patches(theirs: str) -> tuple[Field, Field]:
    weight = Field("patch_embed.weight", (f"{theirs}.weight",), "convolution")
    return weight, Field("patch_embed.bias", (f"{theirs}.bias",), "plain")


def _mlp(ours: str, theirs: str, up: str, down: str) -> tuple[Field, ...]:
    return _linear(f"{ours}.up", f"{theirs}.{up}") + _linear(f"{ours}.down", f"{theirs}.{down}")


def _head_norms(ours: str, theirs: str) -> tuple[Field, Field]:
    return (
        Field(f"{ours}.query_norm.scale", (f"{theirs}.norm_q.weight",), "plain"),
        Field(f"{ours}.key_norm.scale", (f"{theirs}.norm_k.weight",), "plain"),
    )


def _diffusers_block(block: str) -> tuple[Field, ...]:
    return _fields(
        _linear("blocks.attention.qkv", *(f"{block}.attn1.to_{part}" for part in "qkv")),
        _linear("blocks.attention.out", f"{block}.attn1.to_out.0"),
        _mlp("blocks.mlp", f"{block}.ff.net", "0.proj", "2"),
    )


def _original_block(block: str) -> tuple[Field, ...]:
    return _fields(
        _linear("blocks.attention.qkv", f"{block}.attn.qkv"),
        _linear("blocks.attention.out", f"{block}.attn.proj"),
        _mlp("blocks.mlp", f"{block}.mlp", "fc1", "fc2"),
    )


DIFFUSERS_DIT = Layout(
    "diffusers DiTTransformer2DModel",
    "ccdit",
    _fields(
        _patches("pos_embed.proj"),
        _mlp("time_embed", "transformer_blocks.0.norm1.emb.timestep_embedder", "linear_1", "linear_2"),
        Field("class_table", ("transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight",), "plain"),
        _diffusers_block("transformer_blocks.{i}"),
        _linear("blocks.ada_ln", "transformer_blocks.{i}.norm1.linear"),
        _linear("final_ada_ln", "proj_out_1"),
        _linear("final_linear", "proj_out_2"),
    ),
    head_norms=_head_norms("blocks.attention", "transformer_blocks.{i}.attn1"),
    repeated=("transformer_blocks.0.norm1.emb.",),
    ignored=("pos_embed.pos_embed",),
)

DIFFUSERS_PIXART = Layout(
    "diffusers PixArtTransformer2DModel",
    "pixart",
    _fields(
        _patches("pos_embed.proj"),
        _mlp("time_embed", "adaln_single.emb.timestep_embedder", "linear_1", "linear_2"),
        _mlp("size_embed.side", "adaln_single.emb.resolution_embedder", "linear_1", "linear_2"),
        _mlp("size_embed.aspect", "adaln_single.emb.aspect_ratio_embedder", "linear_1", "linear_2"),
        _mlp("caption_proj", "caption_projection", "linear_1", "linear_2"),
        _linear("time_block", "adaln_single.linear"),
        _diffusers_block("transformer_blocks.{i}"),
        _linear("blocks.cross_attention.query", "transformer_blocks.{i}.attn2.to_q"),
        _linear(
            "blocks.cross_attention.key_value", "transformer_blocks.{i}.attn2.to_k", "transformer_blocks.{i}.attn2.to_v"
        ),
        _linear("blocks.cross_attention.out", "transformer_blocks.{i}.attn2.to_out.0"),
        Field("blocks.table", ("transformer_blocks.{i}.scale_shift_table",), "plain"),
        Field("final_table", ("scale_shift_table",), "plain"),
        _linear("final_linear", "proj_out"),
    ),
    head_norms=_fields(
        _head_norms("blocks.attention", "transformer_blocks.{i}.attn1"),
        _head_norms("blocks.cross_attention", "transformer_blocks.{i}.attn2"),
    ),
    ignored=("pos_embed.pos_embed",),
)

ORIGINAL_DIT = Layout(
    "original DiT or SiT",
    "ccdit",
    _fields(
        _patches("x_embedder.proj"),
        _mlp("time_embed", "t_embedder.mlp", "0", "2"),
        Field("class_table", ("y_embedder.embedding_table.weight",), "plain"),
        _original_block("blocks.{i}"),
        _linear("blocks.ada_ln", "blocks.{i}.adaLN_modulation.1"),
        _linear("final_ada_ln", "final_layer.adaLN_modulation.1"),
        _linear("final_linear", "final_layer.linear"),
    ),
    ignored=("pos_embed",),
)

ORIGINAL_PIXART = Layout(
    "original PixArt",
    "pixart",
    _fields(
        _patches("x_embedder.proj"),
        _mlp("time_embed", "t_embedder.mlp", "0", "2"),
        _mlp("size_embed.side", "csize_embedder.mlp", "0", "2"),
        _mlp("size_embed.aspect", "ar_embedder.mlp", "0", "2"),
        _mlp("caption_proj", "y_embedder.y_proj", "fc1", "fc2"),
        Field("null_caption", ("y_embedder.y_embedding",), "plain"),
        _linear("time_block", "t_block.1"),
        _original_block("blocks.{i}"),
        _linear("blocks.cross_attention.query", "blocks.{i}.cross_attn.q_linear"),
        _linear("blocks.cross_attention.key_value", "blocks.{i}.cross_attn.kv_linear"),
        _linear("blocks.cross_attention.out", "blocks.{i}.cross_attn.proj"),
        Field("blocks.table", ("blocks.{i}.scale_shift_table",), "plain"),
        Field("final_table", ("final_layer.scale_shift_table",), "plain"),
        _linear("final_linear", "final_layer.linear"),
    ),
    ignored=("pos_embed",),
)


def for_model(layout: Layout, model: ModelConfig) -> Layout:
    """The layout of a model, with or without Q/K norms (not in stock classes) and size embedding."""
    fields = layout.fields + (layout.head_norms if model.qk_norm else ())
    has_sizes = isinstance(model, PixArtConfig) and model.micro_conditioning
    absent = () if has_sizes else ("size_embed.",)
    return layout._replace(fields=tuple(field for field in fields if not field.ours.startswith(absent)))


# Each pair of functions converts one of their tensors, (out, in) for a linear layer, to ours and back. Their patch
# embedding is a convolution (out, channel, row, column); our patches are flattened as (row, column, channel).


def _flatten_convolution(x: np.ndarray) -> np.ndarray:
    return x.transpose(2, 3, 1, 0).reshape(-1, len(x))


def _unflatten_convolution(x: np.ndarray, patch_size: int) -> np.ndarray:
    return x.reshape(patch_size, patch_size, -1, x.shape[-1]).transpose(3, 2, 0, 1)


_INWARDS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "linear": np.transpose,
    "plain": np.asarray,
    "convolution": _flatten_convolution,
}
_OUTWARDS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "linear": lambda x, patch_size: x.T,
    "plain": lambda x, patch_size: x,
    "convolution": _unflatten_convolution,
}


def to_ours(layout: Layout, tensors: Mapping[str, np.ndarray], depth: int) -> Arrays:
    """Our arrays by name from their tensors. Raises `KeyError` for a missing tensor: check names first."""

    def joined(field: Field, i: int) -> np.ndarray:
        parts = [_INWARDS[field.kind](tensors[name.replace(BLOCK, str(i))]) for name in field.theirs]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)

    def array(field: Field) -> np.ndarray:
        return np.stack([joined(field, i) for i in range(depth)]) if field.in_blocks else joined(field, 0)

    return {field.ours: np.ascontiguousarray(array(field)) for field in layout.fields}


def to_theirs(layout: Layout, arrays: Mapping[str, np.ndarray], patch_size: int) -> Arrays:
    """Their tensors by name from our arrays, contiguous, with the repeated ones in every block."""
    return {name: np.ascontiguousarray(tensor) for name, tensor in _their_tensors(layout, arrays, patch_size)}


def tensor_shapes(layout: Layout, shapes: Mapping[str, tuple[int, ...]], patch_size: int) -> dict[str, tuple[int, ...]]:
    """The shapes of their tensors by name, from those of our arrays."""
    arrays = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    return {name: tensor.shape for name, tensor in _their_tensors(layout, arrays, patch_size)}


def _their_tensors(
    layout: Layout, arrays: Mapping[str, np.ndarray], patch_size: int
) -> Iterator[tuple[str, np.ndarray]]:
    depth = next(len(arrays[field.ours]) for field in layout.fields if field.in_blocks)
    for field in layout.fields:
        whole = arrays[field.ours]
        for i, array in enumerate(whole if field.in_blocks else [whole]):
            for name, part in zip(field.theirs, np.split(array, len(field.theirs), axis=-1), strict=True):
                tensor = _OUTWARDS[field.kind](part, patch_size)
                copies = range(depth) if layout.is_repeated(name) else [i]
                yield from ((numbered(layout, name, copy), tensor) for copy in copies)


def numbered(layout: Layout, name: str, i: int) -> str:
    """The name of a tensor in block `i`; names of tensors outside the blocks are unchanged."""
    return name.replace(".0.", f".{i}.", 1) if layout.is_repeated(name) else name.replace(BLOCK, str(i))


def count_blocks(layout: Layout, names: Iterable[str], source: str) -> int:
    """Number of blocks in these tensor names. Raises `ValueError` unless they are numbered 0, 1, 2, ..."""
    numbers = numbers_after(layout.block_prefix, names)
    absent = [i for i in range(max(len(numbers), 1)) if str(i) not in numbers]
    if absent:
        raise ValueError(f"{source} must hold tensors of {layout.block_prefix}{absent[0]}, none found")
    return len(numbers)
