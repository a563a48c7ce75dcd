"""Writing a model as a diffusers folder: transformer, scheduler, VAE, model card, and a pipeline without flowdit."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from flowdit.conditioning import kind_of
from flowdit.diffusion.auxiliary import AUXILIARY
from flowdit.diffusion.sampling import SamplerConfig
from flowdit.inference.trained import Trained, describe_trained
from flowdit.interop import layouts
from flowdit.interop.architectures import ARCHITECTURES, DiffusersClass, Size
from flowdit.interop.diffusers_in import META_FILE, META_KEY, PIPELINE, WEIGHTS_STEM
from flowdit.interop.layouts import Arrays
from flowdit.interop.portable import Portable, cast, save_tensors
from flowdit.models import pretrained
from flowdit.models.config import ModelConfig
from flowdit.models.vae import EMBEDDED

logger = logging.getLogger(__name__)

EXPORTED = Path(__file__).parent / "exported"
DDIM = {
    "_class_name": "DDIMScheduler",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "timestep_spacing": "trailing",
}


def export_diffusers(portable: Portable, target: Path, dtype: str, *, own_class: bool, vae: str | None) -> None:
    """Write the folder; call `check_representable` and `without_guidance_head` first.

    The stock classes have no Q/K norms; with `own_class` the folder contains a flowdit class that has them, which
    diffusers loads with `trust_remote_code=True`.
    """
    described = describe_trained(portable.meta)
    target.mkdir(parents=True)
    _write_transformer(portable, described, target / "transformer", dtype, own_class)
    _write_json(target / "scheduler" / "scheduler_config.json", scheduler_config(described))
    vae = vae or described.manifest.vae.name
    has_vae = _copy_vae(vae, target / "vae")
    _write_json(target / "model_index.json", model_index(portable, described, own_class, vae, has_vae))
    shutil.copy(EXPORTED / "pipeline.py", target / "pipeline.py")
    _write_json(target / META_FILE, portable.meta.dump())


def without_guidance_head(portable: Portable) -> Portable:
    """The model without its guidance head, which diffusers' classes do not have; logs that. Its velocity is the same."""
    config = portable.meta.config
    if config.model.guidance_head is None:
        return portable
    logger.info("the guidance head is left out: the pipeline has no internal guidance")
    sampler = dataclasses.replace(config.train.sampler, internal_guidance=1.0)
    config = dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, sampler=sampler),
        model=dataclasses.replace(config.model, guidance_head=None),
        auxiliary={name: _without_head(name, settings) for name, settings in config.auxiliary.items()},
    )
    meta = dataclasses.replace(portable.meta, config=config)
    return Portable({name: a for name, a in portable.arrays.items() if not name.startswith("guidance_head.")}, meta)


def _without_head(name: str, settings: Any) -> Any:
    """The stored settings of an auxiliary loss, with weight 0 if it trains the head."""
    trains_it = name in AUXILIARY and AUXILIARY[name].reads_weak
    return settings | {"weight": 0.0} if trains_it and isinstance(settings, dict) else settings


def check_representable(described: Trained, own_class: bool) -> None:
    """Raise `ValueError` listing all fields that the class, or the condition that the pipeline, does not support."""
    if described.conditioning.exported() is None:
        raise ValueError(f"to: the diffusers pipeline does not support conditioning={kind_of(described.config)}")
    if broken := _unrepresentable(described, own_class):
        can_own_class = not own_class and not _unrepresentable(described, own_class=True)
        advice = "; own_class=true writes a class that can" if can_own_class else ""
        name = diffusers_class(described.config.model, own_class).name
        raise ValueError(f"to: {name} cannot represent this model: {'; '.join(broken)}{advice}")


def _unrepresentable(described: Trained, own_class: bool) -> list[str]:
    """Every field that the class does not support, as "field must be ..., got ..."."""
    model, shape = described.config.model, described.manifest.latent_shape
    rules = [("the latents' width", shape[2], shape[1])]
    if model.position_base is not None:  # at `sample_size` theirs is that of the latents
        rules += [("model.position_base", model.position_base, shape[1] // model.patch_size)]
    fixed = diffusers_class(model, own_class).fixed
    rules += [(f"model.{field}", getattr(model, field), needed) for field, needed in fixed.items()]
    return [f"{field} must be {needed}, got {found}" for field, found, needed in rules if found != needed]


def diffusers_class(model: ModelConfig, own_class: bool) -> DiffusersClass:
    architecture = ARCHITECTURES[model.name]
    return architecture.own if own_class else architecture.stock


def transformer_config(described: Trained, own_class: bool, tensors: Arrays) -> dict[str, Any]:
    """The transformer's `config.json`."""
    model, (channels, side, _) = described.config.model, described.manifest.latent_shape
    architecture, kind = ARCHITECTURES[model.name], diffusers_class(model, own_class)

    def size(of: Size) -> int:
        name = layouts.numbered(architecture.layout, architecture.layout.theirs(of.ours), 0)
        return tensors[name].shape[of.axis] - of.more

    fields = {
        "_class_name": kind.name,
        "attention_head_dim": model.hidden_dim // model.num_heads,
        "dropout": 0.0,
        "in_channels": channels,
        "norm_num_groups": 32,
        "num_attention_heads": model.num_heads,
        "num_layers": model.depth,
        "out_channels": channels,
        "patch_size": model.patch_size,
        "sample_size": side,
        "upcast_attention": False,
    }
    fields |= {field: values[0] for field, values in architecture.constants.items()}
    fields |= {of.field: size(of) for of in architecture.sizes}
    return fields | {theirs: getattr(model, ours) for ours, theirs in kind.fields.items()}


def _write_transformer(portable: Portable, described: Trained, folder: Path, dtype: str, own_class: bool) -> None:
    model = described.config.model
    layout = layouts.for_model(ARCHITECTURES[model.name].layout, model)
    tensors = layouts.to_theirs(layout, cast(portable.arrays, dtype), model.patch_size)
    _write_json(folder / "config.json", transformer_config(described, own_class, tensors))
    save_tensors(tensors, folder / f"{WEIGHTS_STEM}.safetensors", {"format": "pt"})
    if own_class:
        shutil.copy(EXPORTED / "flowdit_transformer.py", folder / "flowdit_transformer.py")


def scheduler_config(described: Trained) -> dict[str, Any]:
    """The scheduler of the previews in training; DDIM for a network that predicts noise."""
    if described.prediction == "noise":
        return DDIM
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "shift": described.config.train.sampler.time_shift,
    }


def model_index(portable: Portable, described: Trained, own_class: bool, vae: str, has_vae: bool) -> dict[str, Any]:
    """`model_index.json`: components and values of the pipeline."""
    manifest, exported = described.manifest, described.conditioning.exported()
    assert exported is not None  # `check_representable`
    sampler: SamplerConfig = described.config.train.sampler
    kind = diffusers_class(described.config.model, own_class)
    index = {
        "_class_name": ["pipeline", PIPELINE],
        "_diffusers_version": "0.42.0",
        "transformer": ["flowdit_transformer" if own_class else "diffusers", kind.name],
        "scheduler": ["diffusers", scheduler_config(described)["_class_name"]],
        "vae": ["diffusers", "AutoencoderKL"] if has_vae else [None, None],
        "tokenizer": [None, None],
        "text_encoder": [None, None],
        "latents_mean": list(described.mean),
        "latents_scale": list(described.scale),
        **exported.values,
        "vae_name": vae,
        "image_size": [manifest.image_size, manifest.image_size],
        "guidance": sampler.guidance,
        "guidance_low": sampler.guidance_low,
        "guidance_high": sampler.guidance_high,
        "steps": sampler.steps,
        META_KEY: portable.meta.dump(),
    }
    if (null_caption := portable.arrays.get("null_caption")) is not None:
        # JSON represents float32 values exactly
        index["null_caption"] = np.atleast_2d(null_caption).astype("float32").tolist()
    return index


def _copy_vae(name: str, target: Path) -> bool:
    """Copy an embedded or local VAE and return True; a VAE on the hub is not copied."""
    if name not in EMBEDDED and not (name and Path(name).is_dir()):
        return False
    source = pretrained.find_folder("vae", name, embedded=EMBEDDED, subfolder="vae", stem=WEIGHTS_STEM)
    files = [source / "config.json", *pretrained.find_weights(source, WEIGHTS_STEM)]
    index = source / f"{WEIGHTS_STEM}.safetensors.index.json"
    target.mkdir()
    for file in [*files, index] if index.is_file() else files:
        shutil.copyfile(file, target / file.name)
    return True


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
