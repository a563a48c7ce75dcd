"""diffusers folders of `DiTTransformer2DModel` and `PixArtTransformer2DModel`, and of flowdit's own classes for diffusers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flowdit.interop import layouts
from flowdit.interop.foreign import Found, assemble, check_dtypes, check_repeated
from flowdit.interop.layouts import DIFFUSERS_DIT, DIFFUSERS_PIXART, Arrays, Layout
from flowdit.interop.metadata import ForeignConfig
from flowdit.interop.portable import Portable, check_shapes, checked, model_shapes
from flowdit.models import pretrained
from flowdit.models.transformer import ModelConfig

WEIGHTS_STEM = "diffusion_pytorch_model"
META_FILE = "flowdit.json"
CLASSES = {
    "DiTTransformer2DModel": DIFFUSERS_DIT,
    "PixArtTransformer2DModel": DIFFUSERS_PIXART,
    "FlowDiTClassTransformer": DIFFUSERS_DIT,
    "FlowDiTTextTransformer": DIFFUSERS_PIXART,
}


def read_diffusers(folder: Path, said: ForeignConfig) -> Portable:
    """A diffusers folder: the transformer's own, or a pipeline's with its scheduler and VAE."""
    own = folder / "transformer" if (folder / "transformer" / "config.json").is_file() else folder
    raw = pretrained.read_json(own / "config.json")
    layout = CLASSES.get(raw.get("_class_name", ""))
    if layout is None:
        raise ValueError(f"source: {own} must be one of {', '.join(CLASSES)}, got {raw.get('_class_name')!r}")
    tensors = pretrained.read_tensors(pretrained.find_weights(own, WEIGHTS_STEM))
    model, latent_shape = _diffusers_shape(own, layout, _Raw(own / "config.json", raw))
    if model.qk_norm:
        layout = layouts.with_head_norms(layout)
    if (folder / META_FILE).is_file():
        return _own_export(folder, layout, tensors, model)
    prediction = said.prediction or _scheduled_prediction(folder, tensors, layout, model, latent_shape[0])
    if said.vae is None and (folder / "vae" / "config.json").is_file():
        said = dataclasses.replace(said, vae=str(folder))
    return assemble(Found(str(folder), layout, tensors, model, latent_shape, prediction, []), said)


def _own_export(folder: Path, layout: Layout, tensors: Arrays, model: ModelConfig) -> Portable:
    """What flowdit wrote: the tensors of the class, and the metadata of the checkpoint beside them."""
    meta = pretrained.read_json(folder / META_FILE)
    layout = layout if model.micro_conditioning else layouts.without(layout, "size_embed")
    shapes = model_shapes(meta, str(folder))
    wanted = {name: shape for name, shape in shapes.items() if name != "null_caption"}
    tensor_shapes = layouts.tensor_shapes(layout, wanted, model.patch_size)
    check_shapes(tensor_shapes, {name: tensor.shape for name, tensor in tensors.items()}, str(folder))
    check_dtypes(str(folder), tensors)
    check_repeated(str(folder), layout, tensors, model.depth)
    arrays = layouts.to_ours(layout, tensors, model.depth)
    if "null_caption" in shapes:
        arrays["null_caption"] = _null_caption(folder / "model_index.json", shapes["null_caption"])
    return checked(Portable(arrays, meta), str(folder))


def _null_caption(file: Path, shape: tuple[int, ...]) -> np.ndarray:
    """The null caption of a pipeline, in which it is a list for each token."""
    values = pretrained.read_json(file).get("null_caption")
    try:
        return np.asarray(values, np.float32).reshape(shape)
    except (TypeError, ValueError):
        raise ValueError(f"source: {file}: null_caption must hold the numbers of an array {list(shape)}") from None


class _Raw(NamedTuple):
    """A parsed `config.json`; what it does not hold has the default that diffusers gives it."""

    file: Path
    values: Mapping[str, Any]

    def number(self, name: str, default: int | float | None, kind: type = int) -> Any:
        value = self.values.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            raise ValueError(f"source: {self.file}: {name} must be a number, got {value!r}")
        return kind(value)

    def require(self, name: str, expected: Any, default: Any = None) -> None:
        if (value := self.values.get(name, default)) != expected:
            raise ValueError(f"source: {self.file}: {name} must be {expected!r}, got {value!r}")


def _diffusers_shape(own: Path, layout: Layout, raw: _Raw) -> tuple[ModelConfig, tuple[int, int, int]]:
    is_text = layout.model == "mmdit"
    for name, expected in (("activation_fn", "gelu-approximate"), ("attention_bias", True)):
        raw.require(name, expected, expected)
    raw.require("norm_elementwise_affine", False, False)
    kind = "ada_norm_single" if is_text else "ada_norm_zero"
    raw.require("norm_type", kind, kind)
    heads, size = raw.number("num_attention_heads", 16), raw.number("sample_size", 128 if is_text else 32)
    own_class = raw.values["_class_name"].startswith("FlowDiT")
    eps = raw.number("norm_eps", 1e-6 if is_text else 1e-5, float)
    if is_text and not own_class:
        raw.require("norm_eps", 1e-6, 1e-6)
    model = ModelConfig(
        name=layout.model,
        depth=raw.number("num_layers", 28),
        hidden_dim=heads * raw.number("attention_head_dim", 72),
        num_heads=heads,
        patch_size=raw.number("patch_size", 2),
        mlp_ratio=raw.number("mlp_ratio", 4, float) if own_class else 4.0,
        qk_norm=own_class and bool(raw.values.get("qk_norm", False)),
        micro_conditioning=is_text and _micro_conditioned(raw.values, size),
        interpolation_scale=_diffusers_scale(raw, size) if is_text else raw.number("interpolation_scale", 1, float),
        time_freq_shift=raw.number("time_freq_shift", 0 if is_text else 1, float),
        time_scale=raw.number("time_scale", 1000, float) if own_class else 1000.0,
        mlp_norm_eps=raw.number("mlp_norm_eps", eps, float) if own_class else eps,
    )
    return model, (raw.number("in_channels", 4), size, size)


def _micro_conditioned(values: Mapping[str, Any], size: int) -> bool:
    told = values.get("use_additional_conditions")
    return size == 128 if told is None else bool(told)


def _diffusers_scale(raw: _Raw, size: int) -> float:
    told = raw.values.get("interpolation_scale")
    return float(max(size // 64, 1)) if told is None else raw.number("interpolation_scale", None, float)


def _scheduled_prediction(folder: Path, tensors: Arrays, layout: Layout, model: ModelConfig, channels: int) -> str:
    """What the scheduler beside the transformer says of its output; learned sigmas come with noise."""
    file = folder / "scheduler" / "scheduler_config.json"
    if file.is_file():
        return _of_schedule(file, _Raw(file, pretrained.read_json(file)))
    rows = tensors.get(layout.theirs("final_linear.bias"), np.zeros(0)).size
    if rows == 2 * channels * model.patch_size**2:
        return "noise"
    raise ValueError(f"prediction: must be given, as {folder} has no scheduler that says it (velocity or noise)")


def _of_schedule(file: Path, raw: _Raw) -> str:
    if str(raw.values.get("_class_name", "")).startswith("FlowMatch"):
        return "velocity"
    raw.require("prediction_type", "epsilon", "epsilon")
    for name, expected, default in (
        ("num_train_timesteps", 1000, 1000),
        ("beta_schedule", "linear", "linear"),
        ("beta_start", 0.0001, 0.0001),
        ("beta_end", 0.02, 0.02),
    ):
        raw.require(name, expected, default)
    return "noise"
