"""A diffusers transformer's `config.json` as our `ModelConfig`: what each class honours, held against its tensors.

diffusers gives a field that is missing the default of the class, ignores one that the class does not know, and cannot
load tensors of other sizes than the file says. So does this module. Sizes are compared with the tensors before anything
of that size is built.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flowdit.interop import layouts
from flowdit.interop.layouts import DIFFUSERS_DIT, DIFFUSERS_PIXART, Arrays, Layout
from flowdit.interop.portable import MAX_SAMPLED_SIDE
from flowdit.models.pretrained import shown
from flowdit.models.transformer import ModelConfig

_COMMON: dict[str, Any] = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": None,
    "num_layers": 28,
    "attention_bias": True,
    "sample_size": 32,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "norm_elementwise_affine": False,
}
_DIT = _COMMON | {"num_embeds_ada_norm": 1000, "norm_type": "ada_norm_zero", "norm_eps": 1e-5}
_PIXART = _COMMON | {
    "cross_attention_dim": 1152,
    "norm_type": "ada_norm_single",
    "norm_eps": 1e-6,
    "caption_channels": None,
    "attention_type": "default",
}
_ADDED = {"interpolation_scale": 1.0, "qk_norm": False, "mlp_ratio": 4.0, "time_scale": 1000.0}
# The fields that each class honours and that change what it computes, with its defaults. `dropout` does so in training
# alone, `upcast_attention` changes rounding at most, and `norm_num_groups` nothing.
HONOURED: dict[str, dict[str, Any]] = {
    "DiTTransformer2DModel": _DIT,
    "PixArtTransformer2DModel": _PIXART
    | {"out_channels": 8, "sample_size": 128, "interpolation_scale": None, "use_additional_conditions": None},
    "FlowDiTClassTransformer": _DIT | _ADDED | {"mlp_norm_eps": 1e-5, "time_freq_shift": 1.0},
    "FlowDiTTextTransformer": _PIXART
    | _ADDED
    | {"use_additional_conditions": False, "mlp_norm_eps": 1e-6, "time_freq_shift": 0.0},
}
OWN = ("FlowDiTClassTransformer", "FlowDiTTextTransformer")
CLASSES: dict[str, Layout] = {
    "DiTTransformer2DModel": DIFFUSERS_DIT,
    "PixArtTransformer2DModel": DIFFUSERS_PIXART,
    "FlowDiTClassTransformer": DIFFUSERS_DIT,
    "FlowDiTTextTransformer": DIFFUSERS_PIXART,
}
# What published DiT and PixArt say, older than diffusers' classes for them, and how diffusers tells them apart.
FORMER_NAME = "Transformer2DModel"
BY_NORM = {"ada_norm_zero": "DiTTransformer2DModel", "ada_norm_single": "PixArtTransformer2DModel"}


class Settings(NamedTuple):
    """The fields of a parsed JSON file of diffusers, with defaults for those that it leaves out."""

    file: Path
    values: Mapping[str, Any]

    def whole(self, name: str) -> int:
        if type(value := self.values[name]) is not int or value < 1:
            raise self.error(name, "a whole number above 0")
        return value

    def number(self, name: str, *, may_be_zero: bool = False) -> float:
        value = self.values[name]
        # NaN compares false, and an int of hundreds of digits is no float.
        if type(value) not in (int, float) or not 0 <= value < 1e100 or (value == 0 and not may_be_zero):
            raise self.error(name, "a number, not negative" if may_be_zero else "a number above 0")
        return float(value)

    def flag(self, name: str) -> bool:
        if type(value := self.values[name]) is not bool:
            raise self.error(name, "true or false")
        return value

    def require(self, name: str, *expected: Any) -> None:
        if self.values[name] not in expected:
            raise self.error(name, repr(expected[0]))

    def error(self, name: str, rule: str) -> ValueError:
        return ValueError(f"source: {self.file}: {name} must be {rule}, got {shown(self.values.get(name))}")


def class_name(file: Path, raw: Mapping[str, Any]) -> str:
    """The class that a `config.json` is of. Raises `ValueError` for one that is not read here."""
    name, norm = raw.get("_class_name"), raw.get("norm_type")
    if name == FORMER_NAME and isinstance(norm, str):
        name = BY_NORM.get(norm, name)
    if not isinstance(name, str) or name not in CLASSES:
        raise ValueError(f"source: {file.parent} must be one of {', '.join(CLASSES)}, got {shown(name)}")
    return name


def read_config(
    file: Path, raw: Mapping[str, Any], tensors: Arrays
) -> tuple[Layout, ModelConfig, tuple[int, int, int]]:
    """Layout, model and latent shape of a transformer.

    Raises `ValueError` naming the first field that asks for what is not computed here, disagrees with the tensors, or
    is of another type than diffusers takes.
    """
    name = class_name(file, raw)
    layout = CLASSES[name]
    settings = Settings(file, {field: raw.get(field, default) for field, default in HONOURED[name].items()})
    _check_kind(settings, layout)
    side = settings.whole("sample_size")
    if side > MAX_SAMPLED_SIDE:
        raise settings.error("sample_size", f"at most {MAX_SAMPLED_SIDE}")
    model = _model(settings, layout, side)
    _check_sizes(settings, layout, tensors, model)
    layout = layouts.with_head_norms(layout) if model.qk_norm else layout
    return layout, model, (settings.whole("in_channels"), side, side)


def _check_kind(settings: Settings, layout: Layout) -> None:
    """What decides which operations a block is made of."""
    settings.require("activation_fn", "gelu-approximate")
    settings.require("attention_bias", True)
    settings.require("norm_elementwise_affine", False, None)
    if layout.model == "ccdit":
        settings.require("norm_type", "ada_norm_zero")
    else:
        settings.require("norm_type", "ada_norm_single")
        settings.require("norm_eps", 1e-6)  # of the norm before attention too
        settings.require("attention_type", "default", None)


def _model(settings: Settings, layout: Layout, side: int) -> ModelConfig:
    own, is_text = "qk_norm" in settings.values, layout.model == "mmdit"
    heads = settings.whole("num_attention_heads")
    return ModelConfig(
        name=layout.model,
        depth=settings.whole("num_layers"),
        hidden_dim=heads * settings.whole("attention_head_dim"),
        num_heads=heads,
        patch_size=settings.whole("patch_size"),
        mlp_ratio=settings.number("mlp_ratio") if own else 4.0,
        qk_norm=own and settings.flag("qk_norm"),
        micro_conditioning=is_text and _is_size_conditioned(settings, side),
        interpolation_scale=_interpolation_scale(settings, layout, side),
        time_freq_shift=settings.number("time_freq_shift", may_be_zero=True) if own else float(not is_text),
        time_scale=settings.number("time_scale") if own else 1000.0,
        mlp_norm_eps=settings.number("mlp_norm_eps" if own else "norm_eps"),
    )


def _is_size_conditioned(settings: Settings, side: int) -> bool:
    name = "use_additional_conditions"
    return side == 128 if settings.values[name] is None else settings.flag(name)


def _interpolation_scale(settings: Settings, layout: Layout, side: int) -> float:
    name = "interpolation_scale"
    if name not in settings.values:
        return 1.0
    if settings.values[name] is None and layout.model == "mmdit":
        return float(max(side // 64, 1))
    return settings.number(name)


class _Size(NamedTuple):
    """`field`, as `given`, says that an axis of the tensors of our array has this size."""

    field: str
    given: Any
    size: int
    ours: str
    axis: int = 0


def _check_sizes(settings: Settings, layout: Layout, tensors: Arrays, model: ModelConfig) -> None:
    """Raise `ValueError` naming the first field that gives another size than the tensors have."""
    folder = settings.file.parent
    blocks = layouts.count_blocks(layout, tensors, str(folder))
    if model.depth != blocks:
        raise settings.error("num_layers", f"{blocks}, the number of blocks in its tensors")
    for field, given, size, ours, axis in _sizes(settings, layout, model):
        name = layouts.numbered(layout, layout.theirs(ours), 0)
        if name not in tensors:
            raise ValueError(f"source: {folder} must hold the tensor {name}")
        shape = tensors[name].shape
        if len(shape) <= axis or shape[axis] != size:
            told = f"{field} must fit the tensor {name} of shape {list(shape)}, got {shown(given)}"
            raise ValueError(f"source: {settings.file}: {told}")


def _sizes(settings: Settings, layout: Layout, model: ModelConfig) -> Iterator[_Size]:
    values, heads = settings.values, "num_attention_heads x attention_head_dim"
    yield _Size(heads, model.hidden_dim, model.hidden_dim, "patch_embed.weight")
    yield _Size("in_channels", values["in_channels"], settings.whole("in_channels"), "patch_embed.weight", 1)
    yield _Size("patch_size", model.patch_size, model.patch_size, "patch_embed.weight", 2)
    out = settings.whole("in_channels" if values["out_channels"] is None else "out_channels")
    yield _Size("out_channels", values["out_channels"], out * model.patch_size**2, "final_linear.bias")
    inner = int(model.hidden_dim * model.mlp_ratio)
    yield _Size("mlp_ratio", model.mlp_ratio, inner, "blocks.mlp.up.bias")
    if layout.model == "ccdit":
        name = "num_embeds_ada_norm"
        yield _Size(name, values[name], settings.whole(name) + 1, "class_table")
    else:
        for name, ours in (
            ("caption_channels", "caption_proj.up.weight"),
            ("cross_attention_dim", "blocks.cross_attention.key_value.weight"),
        ):
            yield _Size(name, values[name], settings.whole(name), ours, 1)
