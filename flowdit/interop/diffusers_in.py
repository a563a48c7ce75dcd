"""Reading diffusers folders of DiT, PixArt and flowdit's classes for diffusers."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np

from flowdit.checkpoint.meta import RunMeta
from flowdit.fields import FieldError, shown
from flowdit.inference.trained import Trained
from flowdit.interop import layouts
from flowdit.interop.diffusers_config import Settings, find_class, read_config
from flowdit.interop.foreign import Found, assemble, check_repeated
from flowdit.interop.layouts import Arrays, Layout
from flowdit.interop.metadata import ForeignConfig
from flowdit.interop.portable import Portable, array_shapes, check_dtypes, check_shapes, checked, describe, parse_meta
from flowdit.models import pretrained
from flowdit.models.config import ModelConfig
from flowdit.models.torch_files import read_torch_file

logger = logging.getLogger(__name__)

WEIGHTS_STEM = "diffusion_pytorch_model"
META_FILE = "flowdit.json"
META_KEY = "flowdit"
PIPELINE = "FlowDiTPipeline"
# Required settings of the scheduler, which are also diffusers' defaults.
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


def read_diffusers(folder: Path, weights: str, hints: ForeignConfig) -> Portable:
    """Read a diffusers folder, of a transformer or of a pipeline with scheduler and VAE."""
    own = folder / "transformer" if (folder / "transformer" / "config.json").is_file() else folder
    raw = pretrained.read_json(own / "config.json")
    architecture, kind = find_class(own / "config.json", raw)  # before the weights, which are slow to read
    tensors = _read_tensors(own, weights)
    layout, model, latent_shape = read_config(own / "config.json", raw, tensors)
    if (meta := _own_meta(folder)) is not None:
        return _own_export(folder, meta, layout, tensors, model, latent_shape)
    if kind is architecture.own:
        logger.warning(
            "%s has no flowdit metadata: latents are assumed to be normalised by shift and scale of the VAE", folder
        )
    prediction = hints.prediction or _scheduled_prediction(folder, tensors, layout, model, latent_shape[0])
    if hints.vae is None and (folder / "vae" / "config.json").is_file():
        hints = dataclasses.replace(hints, vae=str(folder))
    found = Found(
        source=str(folder),
        layout=layout,
        tensors=tensors,
        model=model,
        latent_shape=latent_shape,
        prediction=prediction,
    )
    return assemble(found, hints)


def _read_tensors(folder: Path, weights: str) -> Arrays:
    """Read the tensors from safetensors files or, if there are none, from torch's `.bin` files."""
    has_safetensors, has_bin = (
        any((folder / f"{WEIGHTS_STEM}{suffix}").is_file() for suffix in (kind, f"{kind}.index.json"))
        for kind in (".safetensors", ".bin")
    )
    if has_safetensors or not has_bin:
        if has_bin:
            logger.info("%s also holds %s.bin, which is ignored: the safetensors file is read", folder, WEIGHTS_STEM)
        return pretrained.read_tensors(pretrained.find_weights(folder, WEIGHTS_STEM))
    files = pretrained.find_weights(folder, WEIGHTS_STEM, suffix=".bin")
    return {name: tensor for file in files for name, tensor in read_torch_file(file, weights).tensors.items()}


def _own_meta(folder: Path) -> RunMeta | None:
    """Read the checkpoint metadata in a folder exported by flowdit, or saved again by diffusers.

    Raises `ValueError` for a flowdit pipeline without them, as the normalisation of its latents is unknown.
    """
    if (folder / META_FILE).is_file():
        return parse_meta(pretrained.read_json(folder / META_FILE), str(folder))
    file = folder / "model_index.json"
    index = pretrained.read_json(file) if file.is_file() else {}
    if isinstance(meta := index.get(META_KEY), dict):
        return parse_meta(meta, str(folder))
    if PIPELINE in (name := index.get("_class_name"), *(name if isinstance(name, list) else ())):
        raise ValueError(f"{folder} must hold {META_FILE}, like the folder that its pipeline was loaded from")
    return None


def _own_export(
    folder: Path,
    meta: RunMeta,
    layout: Layout,
    tensors: Arrays,
    model: ModelConfig,
    latent_shape: tuple[int, int, int],
) -> Portable:
    """The model of a folder exported by flowdit: tensors of the class, and checkpoint metadata."""
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
    """Raise `ValueError` naming the first field that differs between metadata and the transformer's `config.json`."""
    # The first four are not in config.json; null stands for a number in the last one.
    elsewhere = {"remat", "kernels", "scan_blocks", "null_tokens", "position_base"}
    theirs = described.config.model
    fields = [field.name for field in dataclasses.fields(model) if field.name not in elsewhere]
    pairs = {f"model.{name}": (getattr(theirs, name, None), getattr(model, name)) for name in fields}
    pairs["latent_shape"] = (described.manifest.latent_shape, latent_shape)
    pairs["model.position_base"] = (theirs.position_base_on(latent_shape), model.position_base_on(latent_shape))
    for name, (stored, expected) in pairs.items():
        if stored != expected:
            rule = f"{name} must be {expected} in flowdit's metadata, as in config.json"
            raise ValueError(f"{folder}: {rule}, got {shown(stored)}")


def _null_caption(file: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Read the null caption of a pipeline, a list for each token."""
    values = pretrained.read_json(file).get("null_caption")
    try:
        return np.asarray(values, np.float32).reshape(shape)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{file}: null_caption must hold the numbers of an array {list(shape)}") from None


def _scheduled_prediction(folder: Path, tensors: Arrays, layout: Layout, model: ModelConfig, channels: int) -> str:
    """The prediction type of the scheduler; without one, learned sigmas mean noise."""
    file = folder / "scheduler" / "scheduler_config.json"
    if file.is_file():
        return _of_schedule(file, pretrained.read_json(file))
    rows = tensors[layout.theirs("final_linear.bias")].size
    if rows == 2 * channels * model.patch_size**2:
        return "noise"
    raise FieldError("prediction", f"must be given, as {folder} has no scheduler (velocity or noise)")


def _of_schedule(file: Path, raw: dict[str, Any]) -> str:
    """Velocity for the linear path, noise for DDPM's schedule. Raises `ValueError` for other schedules."""
    name = str(raw.get("_class_name", ""))
    table = FLOW if name.startswith("FlowMatch") else DDPM
    settings = Settings(file, {field: raw.get(field, expected) for field, expected in table.items()})
    for field, expected in table.items():
        settings.require(field, expected)
    return "velocity" if table is FLOW else "noise"
