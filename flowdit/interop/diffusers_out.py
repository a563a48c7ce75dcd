"""A model as a diffusers folder: transformer, scheduler, VAE, model card, and a pipeline that runs without flowdit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from flowdit.diffusion.sampling import SamplerConfig
from flowdit.interop import layouts
from flowdit.interop.diffusers_config import CLASSES
from flowdit.interop.diffusers_in import META_FILE, META_KEY, PIPELINE, WEIGHTS_STEM
from flowdit.interop.layouts import Layout
from flowdit.interop.portable import Portable, cast, save_tensors
from flowdit.models import pretrained
from flowdit.models.transformer import ModelConfig
from flowdit.models.vae import EMBEDDED
from flowdit.training.trained import Trained, describe_trained

EXPORTED = Path(__file__).parent / "exported"
STOCK = {"ccdit": "DiTTransformer2DModel", "mmdit": "PixArtTransformer2DModel"}
OWN = {"ccdit": "FlowDiTClassTransformer", "mmdit": "FlowDiTTextTransformer"}
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


class Rule(NamedTuple):
    """A field that a class cannot represent unless it has one value."""

    field: str
    found: Any
    needed: Any


def export_diffusers(portable: Portable, target: Path, dtype: str, *, own_class: bool, vae: str | None) -> None:
    """Write the folder, once `check_representable` has nothing against it.

    The stock classes have no Q/K norms; with `own_class` the folder carries a class of flowdit's that has them, and
    diffusers loads it with `trust_remote_code=True`.
    """
    described = describe_trained(portable.meta)
    target.mkdir(parents=True)
    _write_transformer(portable, described, target / "transformer", dtype, own_class)
    _write_json(target / "scheduler" / "scheduler_config.json", scheduler_config(described))
    vae = vae or described.manifest.vae.name
    has_vae = _copy_vae(vae, target / "vae")
    _write_json(target / "model_index.json", model_index(portable, described, own_class, vae, has_vae))
    shutil.copy(EXPORTED / "pipeline.py", target / "pipeline.py")
    _write_json(target / META_FILE, portable.meta)


def check_representable(described: Trained, own_class: bool) -> None:
    """Raise `ValueError` listing every field for which the class has no place."""
    model, shape = described.config.model, described.manifest.latent_shape
    is_text = model.name == "mmdit"
    rules = [Rule("the latents' width", shape[2], shape[1])]
    if not own_class:
        fixed = {"qk_norm": False, "mlp_ratio": 4.0, "time_scale": 1000.0, "time_freq_shift": 0.0 if is_text else 1.0}
        fixed |= {"mlp_norm_eps": 1e-6} if is_text else {"interpolation_scale": 1.0}
        rules += [Rule(f"model.{field}", getattr(model, field), needed) for field, needed in fixed.items()]
    broken = [f"{rule.field} must be {rule.needed}, got {rule.found}" for rule in rules if rule.found != rule.needed]
    if broken:
        name = (OWN if own_class else STOCK)[model.name]
        advice = "" if own_class else "; own_class=true writes a class that has it"
        raise ValueError(f"to: {name} cannot represent this model: {'; '.join(broken)}{advice}")


def transformer_config(described: Trained, own_class: bool) -> dict[str, Any]:
    """The transformer's `config.json`."""
    model, (channels, side, _) = described.config.model, described.manifest.latent_shape
    common = {
        "_class_name": (OWN if own_class else STOCK)[model.name],
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": model.hidden_dim // model.num_heads,
        "dropout": 0.0,
        "in_channels": channels,
        "norm_elementwise_affine": False,
        "norm_num_groups": 32,
        "num_attention_heads": model.num_heads,
        "num_layers": model.depth,
        "out_channels": channels,
        "patch_size": model.patch_size,
        "sample_size": side,
        "upcast_attention": False,
    }
    return (
        common
        | (_text_config(described) if model.name == "mmdit" else _class_config(described))
        | _own(model, own_class)
    )


def _text_config(described: Trained) -> dict[str, Any]:
    model, text = described.config.model, described.text
    assert text is not None
    return {
        "caption_channels": text["width"],
        "cross_attention_dim": model.hidden_dim,
        "interpolation_scale": model.interpolation_scale,
        "norm_eps": 1e-6,
        "norm_type": "ada_norm_single",
        "num_embeds_ada_norm": 1000,
        "use_additional_conditions": model.micro_conditioning,
    }


def _class_config(described: Trained) -> dict[str, Any]:
    return {
        "norm_eps": described.config.model.mlp_norm_eps,
        "norm_type": "ada_norm_zero",
        "num_embeds_ada_norm": described.manifest.num_classes,
    }


def _own(model: ModelConfig, own_class: bool) -> dict[str, Any]:
    fields = ("qk_norm", "mlp_ratio", "mlp_norm_eps", "time_freq_shift", "time_scale", "interpolation_scale")
    return {field: getattr(model, field) for field in fields} if own_class else {}


def export_layout(model: ModelConfig) -> Layout:
    """The tensors of the transformer's file for this model."""
    layout = CLASSES[STOCK[model.name]]
    layout = layouts.with_head_norms(layout) if model.qk_norm else layout
    return layout if model.micro_conditioning else layouts.without(layout, "size_embed")


def _write_transformer(portable: Portable, described: Trained, folder: Path, dtype: str, own_class: bool) -> None:
    model = described.config.model
    _write_json(folder / "config.json", transformer_config(described, own_class))
    tensors = layouts.to_theirs(export_layout(model), cast(portable.arrays, dtype), model.patch_size)
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
    """`model_index.json`: the pipeline's parts, and its values."""
    model, manifest, text = described.config.model, described.manifest, described.text
    sampler: SamplerConfig = described.config.train.sampler
    stock = ["diffusers", STOCK[model.name]]
    null_caption = None if text is None else portable.arrays["null_caption"].reshape(-1, text["width"])
    return {
        "_class_name": ["pipeline", PIPELINE],
        "_diffusers_version": "0.42.0",
        "transformer": ["flowdit_transformer", OWN[model.name]] if own_class else stock,
        "scheduler": ["diffusers", scheduler_config(described)["_class_name"]],
        "vae": ["diffusers", "AutoencoderKL"] if has_vae else [None, None],
        "tokenizer": [None, None],
        "text_encoder": [None, None],
        "latents_mean": list(described.mean),
        "latents_scale": list(described.scale),
        # float32 values survive JSON, whose numbers are written in full
        "null_caption": None if null_caption is None else null_caption.astype("float32").tolist(),
        "max_length": None if text is None else text["max_length"],
        "text_encoder_name": None if text is None else text["name"],
        # by number: the hub takes a list of texts here for the name of a part
        "class_names": {str(i): name for i, name in enumerate(manifest.class_names)} or None,
        "vae_name": vae,
        "image_size": [manifest.image_size, manifest.image_size],
        "guidance": sampler.guidance,
        "guidance_low": sampler.guidance_low,
        "guidance_high": sampler.guidance_high,
        "steps": sampler.steps,
        META_KEY: portable.meta,
    }


def _copy_vae(name: str, target: Path) -> bool:
    """A VAE that lies on this machine is copied; one of the hub is referred to."""
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
