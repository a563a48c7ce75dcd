"""Reading a diffusers transformer's `config.json` as our `ModelConfig`, and checking it against the tensors.

As in diffusers, missing fields have the default of the class, unknown fields are ignored, and tensors of other sizes
than the file's are refused. Sizes are compared with the tensors before anything of that size is allocated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from flowdit.fields import called, content_of, shown
from flowdit.interop import layouts
from flowdit.interop.architectures import ARCHITECTURES, Architecture, DiffusersClass
from flowdit.interop.layouts import Arrays, Layout
from flowdit.interop.metadata import MAX_SAMPLED_SIDE
from flowdit.json_input import parse_value
from flowdit.models.config import MODELS, ModelConfig

CLASSES = {kind.name: (architecture, kind) for architecture in ARCHITECTURES.values() for kind in architecture.classes}
# The class name in published DiT and PixArt files, older than diffusers' classes; the norm distinguishes them.
SHARED_NAME = "Transformer2DModel"
BY_NORM = {architecture.constants["norm_type"][0]: architecture.stock.name for architecture in ARCHITECTURES.values()}
MAY_BE_ZERO = ("time_freq_shift",)
WIDTH = "num_attention_heads x attention_head_dim"
_THEIR_NAMES = {"depth": "num_layers", "hidden_dim": WIDTH, "num_heads": "num_attention_heads"}


_COUNT = Annotated[int, Field(strict=True, ge=1, lt=2**31)]
_COUNT_OR_ZERO = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
_POSITIVE = Annotated[float, Field(strict=True, allow_inf_nan=False, gt=0, lt=1e30)]
_NOT_NEGATIVE = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0, lt=1e30)]
_FLAG = Annotated[bool, Field(strict=True)]


class Settings(NamedTuple):
    """The fields of a parsed diffusers JSON file, with defaults for missing ones."""

    file: Path
    values: Mapping[str, Any]

    def count(self, name: str, *, may_be_zero: bool = False) -> int:
        return self._parsed(name, _COUNT_OR_ZERO if may_be_zero else _COUNT)

    def number(self, name: str, *, may_be_zero: bool = False) -> float:
        return self._parsed(name, _NOT_NEGATIVE if may_be_zero else _POSITIVE)

    def flag(self, name: str) -> bool:
        return self._parsed(name, _FLAG)

    def require(self, name: str, *expected: Any) -> None:
        if self.values[name] not in expected:
            raise self.error(name, f"must be {expected[0]!r}")

    def error(self, name: str, rule: str) -> ValueError:
        return ValueError(f"{self.file}: {name}: {rule}, got {shown(self.values.get(name))}")

    def _parsed(self, name: str, kind: Any) -> Any:
        with content_of(self.file), content_of(name):
            return parse_value(kind, self.values[name])


def find_class(file: Path, raw: Mapping[str, Any]) -> tuple[Architecture, DiffusersClass]:
    """Find the class of a `config.json`. Raises `ValueError` for an unsupported class."""
    name, norm = raw.get("_class_name"), raw.get("norm_type")
    if name == SHARED_NAME and isinstance(norm, str):
        name = BY_NORM.get(norm, name)
    if not isinstance(name, str) or name not in CLASSES:
        raise ValueError(f"{file}: _class_name: must be one of {', '.join(CLASSES)}, got {shown(name)}")
    return CLASSES[name]


def read_config(
    file: Path, raw: Mapping[str, Any], tensors: Arrays
) -> tuple[Layout, ModelConfig, tuple[int, int, int]]:
    """Read layout, model and latent shape of a transformer.

    Raises `ValueError` naming the first field that is not supported, contradicts the tensors, or has the wrong type.
    """
    architecture, kind = find_class(file, raw)
    settings = Settings(file, {field: raw.get(field, default) for field, default in kind.honoured.items()})
    for field, values in architecture.constants.items():
        settings.require(field, *values)
    side = settings.count("sample_size")
    if side > MAX_SAMPLED_SIDE:
        raise settings.error("sample_size", f"must be at most {MAX_SAMPLED_SIDE}")
    nulls = {name: value for name, value in architecture.nulls(side).items() if settings.values[name] is None}
    settings = Settings(file, {**settings.values, **nulls})
    model = _model(settings, architecture, kind)
    if side % model.patch_size:
        raise settings.error("sample_size", f"must be divisible by patch_size={model.patch_size}")
    # diffusers' positions span those of `sample_size` at any other size.
    model.position_base = side // model.patch_size
    latent_shape = (settings.count("in_channels"), side, side)
    _check_sizes(settings, architecture, tensors, model)
    _check_flags(settings, kind, architecture.layout, tensors, model)
    with content_of(file), called(_THEIR_NAMES | dict(kind.fields)):
        model.check(latent_shape)
    return architecture.layout, model, latent_shape


def _model(settings: Settings, architecture: Architecture, kind: DiffusersClass) -> ModelConfig:
    model_class = MODELS[architecture.layout.model]

    def value_of(ours: str, name: str) -> Any:
        is_flag = isinstance(getattr(model_class, ours), bool)
        return settings.flag(name) if is_flag else settings.number(name, may_be_zero=ours in MAY_BE_ZERO)

    heads = settings.count("num_attention_heads")
    model = model_class(
        name=architecture.layout.model,
        depth=settings.count("num_layers"),
        hidden_dim=heads * settings.count("attention_head_dim"),
        num_heads=heads,
        patch_size=settings.count("patch_size"),
    )
    return dataclasses.replace(
        model, **kind.fixed, **{ours: value_of(ours, name) for ours, name in kind.fields.items()}
    )


class _Claim(NamedTuple):
    """The size of an axis of our array `ours` according to `field`, whose value is `given`."""

    field: str
    given: Any
    size: int
    ours: str
    axis: int = 0


def _check_sizes(settings: Settings, architecture: Architecture, tensors: Arrays, model: ModelConfig) -> None:
    """Raise `ValueError` naming the first field whose size differs from the tensors."""
    folder, layout = settings.file.parent, architecture.layout
    blocks = layouts.count_blocks(layout, tensors, str(folder))
    if model.depth != blocks:
        raise settings.error("num_layers", f"must be {blocks}, the number of blocks in its tensors")
    for field, given, size, ours, axis in _sizes(settings, architecture, model):
        name = layouts.numbered(layout, layout.theirs(ours), 0)
        if name not in tensors:
            raise ValueError(f"{folder}: must hold the tensor {name}")
        shape = tensors[name].shape
        if len(shape) <= axis or shape[axis] != size:
            rule = f"must fit the tensor {name} of shape {list(shape)}, got {shown(given)}"
            raise ValueError(f"{settings.file}: {field}: {rule}")


def _check_flags(settings: Settings, kind: DiffusersClass, layout: Layout, tensors: Arrays, model: ModelConfig) -> None:
    """Raise `ValueError` naming the first field that says that there are tensors which are absent, or the reverse."""

    def names(**flag: bool) -> set[str]:
        fields = layouts.for_model(layout, dataclasses.replace(model, **flag)).fields
        return {layouts.numbered(layout, name, 0) for field in fields for name in field.theirs}

    for ours, theirs in kind.fields.items():
        if isinstance(value := getattr(model, ours), bool):
            is_found = not names(**{ours: True}).difference(names(**{ours: False})).isdisjoint(tensors)
            if value != is_found:
                raise settings.error(theirs, f"must be {str(is_found).lower()}, as in its tensors")


def _sizes(settings: Settings, architecture: Architecture, model: ModelConfig) -> Iterator[_Claim]:
    values = settings.values
    yield _Claim(WIDTH, model.hidden_dim, model.hidden_dim, "patch_embed.weight")
    yield _Claim("in_channels", values["in_channels"], settings.count("in_channels"), "patch_embed.weight", 1)
    yield _Claim("patch_size", model.patch_size, model.patch_size, "patch_embed.weight", 2)
    out = settings.count("in_channels" if values["out_channels"] is None else "out_channels")
    yield _Claim("out_channels", values["out_channels"], out * model.patch_size**2, "final_linear.bias")
    inner = int(model.hidden_dim * model.mlp_ratio)
    yield _Claim("mlp_ratio", model.mlp_ratio, inner, "blocks.mlp.up.bias")
    for field, ours, axis, more in architecture.sizes:
        yield _Claim(field, values[field], settings.count(field, may_be_zero=more > 0) + more, ours, axis)
