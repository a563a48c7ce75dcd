"""diffusers folders of `DiTTransformer2DModel` and `PixArtTransformer2DModel`, and of flowdit's own classes for diffusers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from flowdit.fields import shown
from flowdit.inference.trained import Trained
from flowdit.interop import layouts
from flowdit.interop.diffusers_config import Settings, find_class, read_config
from flowdit.interop.foreign import Found, assemble, check_dtypes, check_repeated
from flowdit.interop.layouts import Arrays, Layout
from flowdit.interop.metadata import ForeignConfig
from flowdit.interop.portable import Portable, array_shapes, check_shapes, checked, describe
from flowdit.interop.torch_files import read_torch_file
from flowdit.models import pretrained
from flowdit.models.transformer import ModelConfig

WEIGHTS_STEM = "diffusion_pytorch_model"
META_FILE = "flowdit.json"
META_KEY = "flowdit"
PIPELINE = "FlowDiTPipeline"
# What schedulers must say, which are also diffusers' defaults.
FLOW = {"num_train_timesteps": 1000, "invert_sigmas": False}
DDPM = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
    "use_flow_sigmas": False,
}


def read_diffusers(folder: Path, weights: str, said: ForeignConfig) -> Portable:
    """A diffusers folder: the transformer's own, or a pipeline's with its scheduler and VAE."""
    own = folder / "transformer" if (folder / "transformer" / "config.json").is_file() else folder
    raw = pretrained.read_json(own / "config.json")
    architecture, kind = find_class(own / "config.json", raw)  # before the weights, which take long
    notes: list[str] = []
    tensors = _read_tensors(own, weights, notes)
    layout, model, latent_shape = read_config(own / "config.json", raw, tensors)
    if (meta := _own_meta(folder)) is not None:
        return _own_export(folder, meta, layout, tensors, model, latent_shape)._replace(notes=tuple(notes))
    if kind is architecture.own:
        notes.append(
            "the folder lacks flowdit's metadata: latents are taken to be normalised by shift and scale of the VAE"
        )
    prediction = said.prediction or _scheduled_prediction(folder, tensors, layout, model, latent_shape[0])
    if said.vae is None and (folder / "vae" / "config.json").is_file():
        said = dataclasses.replace(said, vae=str(folder))
    return assemble(Found(str(folder), layout, tensors, model, latent_shape, prediction, notes), said)


def _read_tensors(folder: Path, weights: str, notes: list[str]) -> Arrays:
    """The tensors in safetensors files or, where there are none, in the `.bin` files that torch writes."""
    has_safetensors, has_bin = (
        any((folder / f"{WEIGHTS_STEM}{suffix}").is_file() for suffix in (kind, f"{kind}.index.json"))
        for kind in (".safetensors", ".bin")
    )
    if has_safetensors or not has_bin:
        if has_bin:
            notes.append(f"{folder} holds {WEIGHTS_STEM}.bin too, which is left out: the safetensors file is read")
        return pretrained.read_tensors(pretrained.find_weights(folder, WEIGHTS_STEM))
    files = pretrained.find_weights(folder, WEIGHTS_STEM, suffix=".bin")
    return {name: tensor for file in files for name, tensor in read_torch_file(file, weights, notes).tensors.items()}


def _own_meta(folder: Path) -> dict[str, Any] | None:
    """A checkpoint's metadata in a folder that flowdit wrote, or that diffusers saved of its pipeline.

    Raises `ValueError` for such a pipeline without them: how its latents are normalised would be lost.
    """
    if (folder / META_FILE).is_file():
        return pretrained.read_json(folder / META_FILE)
    file = folder / "model_index.json"
    index = pretrained.read_json(file) if file.is_file() else {}
    if isinstance(meta := index.get(META_KEY), dict):
        return meta
    if PIPELINE in (name := index.get("_class_name"), *(name if isinstance(name, list) else ())):
        raise ValueError(
            f"source: {folder} must hold {META_FILE}, as the folder does that its pipeline was loaded from"
        )
    return None


def _own_export(
    folder: Path,
    meta: dict[str, Any],
    layout: Layout,
    tensors: Arrays,
    model: ModelConfig,
    latent_shape: tuple[int, int, int],
) -> Portable:
    """What flowdit wrote: the tensors of the class, and the metadata of the checkpoint beside them."""
    described = describe(meta, str(folder))
    _check_agreement(folder, described, model, latent_shape)
    shapes = array_shapes(described)
    layout = layouts.for_model(layout, model)
    wanted = {name: shape for name, shape in shapes.items() if name != "null_caption"}
    tensor_shapes = layouts.tensor_shapes(layout, wanted, model.patch_size)
    check_shapes(tensor_shapes, {name: tensor.shape for name, tensor in tensors.items()}, str(folder))
    check_dtypes(str(folder), tensors)
    check_repeated(str(folder), layout, tensors, model.depth)
    arrays = layouts.to_ours(layout, tensors, model.depth)
    if "null_caption" in shapes:
        arrays["null_caption"] = _null_caption(folder / "model_index.json", shapes["null_caption"])
    return checked(Portable(arrays, meta), str(folder))


def _check_agreement(folder: Path, described: Trained, model: ModelConfig, latent_shape: tuple[int, int, int]) -> None:
    """Raise `ValueError` naming the first field in which the metadata differ from the transformer's `config.json`."""
    elsewhere = {"remat", "null_tokens"}  # how it is trained; the rows of the null caption
    fields = [field.name for field in dataclasses.fields(ModelConfig) if field.name not in elsewhere]
    pairs = {f"model.{name}": (getattr(described.config.model, name), getattr(model, name)) for name in fields}
    pairs["latent_shape"] = (described.manifest.latent_shape, latent_shape)
    for name, (stored, told) in pairs.items():
        if stored != told:
            rule = f"{name} must be {told} in flowdit's metadata, as config.json says"
            raise ValueError(f"source: {folder}: {rule}, got {shown(stored)}")


def _null_caption(file: Path, shape: tuple[int, ...]) -> np.ndarray:
    """The null caption of a pipeline, in which it is a list for each token."""
    values = pretrained.read_json(file).get("null_caption")
    try:
        return np.asarray(values, np.float32).reshape(shape)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"source: {file}: null_caption must hold the numbers of an array {list(shape)}") from None


def _scheduled_prediction(folder: Path, tensors: Arrays, layout: Layout, model: ModelConfig, channels: int) -> str:
    """What the scheduler beside the transformer says of its output; learned sigmas come with noise."""
    file = folder / "scheduler" / "scheduler_config.json"
    if file.is_file():
        return _of_schedule(file, pretrained.read_json(file))
    rows = tensors[layout.theirs("final_linear.bias")].size
    if rows == 2 * channels * model.patch_size**2:
        return "noise"
    raise ValueError(f"prediction: must be given, as {folder} has no scheduler that says it (velocity or noise)")


def _of_schedule(file: Path, raw: dict[str, Any]) -> str:
    """Velocity on the straight path, or noise on DDPM's. Raises `ValueError` naming the field of another schedule."""
    name = str(raw.get("_class_name", ""))
    table = FLOW if name.startswith("FlowMatch") else DDPM
    settings = Settings(file, {field: raw.get(field, expected) for field, expected in table.items()})
    for field, expected in table.items():
        settings.require(field, expected)
    return "velocity" if table is FLOW else "noise"
