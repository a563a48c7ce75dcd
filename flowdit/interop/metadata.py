"""A checkpoint's metadata for a model that was trained elsewhere, from what its files and its user say."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from flowdit.checkpoint.meta import FORMAT, run_meta
from flowdit.conditioning import from_checkpoint
from flowdit.config import Config
from flowdit.data.manifest import Manifest, VaeInfo
from flowdit.diffusion.sampling import PREDICTIONS
from flowdit.fields import require, require_choice
from flowdit.models.vae import load_vae

FORMATS = ("dit", "sit", "pixart")
# What DiT, SiT and PixArt-alpha were trained on, and nearly every other model of four channels.
SD_VAE = VaeInfo(name="", fingerprint="", shift=0.0, scale=0.18215, stride=8)


@dataclasses.dataclass
class ForeignConfig:
    """What the user says of a checkpoint whose files do not say it.

    format: "dit", "sit" or "pixart", for a file of an original repository; DiT's and SiT's tensors have the same names.
    prediction: "velocity" or "noise", what the network returns.
    latent_size: side of the latents, where no table of positions tells it.
    num_heads: attention heads, for a width that is none of the papers'.
    interpolation_scale: of PixArt's positions, where no table of positions tells it.
    classes: text file with the name of a class on each line; numbers without it.
    vae: the AutoencoderKL of the latents, a folder or hub id; that of a pipeline folder is found by itself.
    text_encoder, max_length: the encoder whose features the model reads, and their number.
    """

    format: str | None = None
    prediction: str | None = None
    latent_size: int | None = None
    num_heads: int | None = None
    interpolation_scale: float | None = None
    classes: str | None = None
    vae: str | None = None
    text_encoder: str | None = None
    max_length: int | None = None

    def check(self) -> None:
        """Raise `FieldError` naming the first field that breaks a rule; all of them may be left out."""
        for field, choices in (("format", FORMATS), ("prediction", PREDICTIONS)):
            if (value := getattr(self, field)) is not None:
                require_choice(field, value, choices)
        for field in ("latent_size", "num_heads", "max_length"):
            value = getattr(self, field)
            is_count = value is None or (type(value) is int and value >= 1)
            require(field, value, is_count, "must be a whole number above 0")
        for field in ("classes", "vae", "text_encoder"):
            value = getattr(self, field)
            require(field, value, isinstance(value, str | None), "must be a text")
        scale = self.interpolation_scale
        is_positive = scale is None or (type(scale) in (int, float) and 0 < scale < math.inf)
        require("interpolation_scale", scale, is_positive, "must be a number above 0")


class ForeignCondition(NamedTuple):
    """What a model from elsewhere is conditioned on: the kind (`conditioning.KINDS`), and what a checkpoint says of it."""

    kind: str
    class_names: tuple[str, ...] = ()
    text: dict[str, Any] | None = None


def class_condition(config: Config, said: ForeignConfig, count: int) -> ForeignCondition:
    """Classes by the names in the user's file, or by their numbers; none where the table holds the null class alone."""
    names = _class_names(said.classes, max(count, 0))
    return ForeignCondition("labels", names) if names else ForeignCondition("none")


def text_condition(config: Config, said: ForeignConfig, width: int) -> ForeignCondition:
    """An encoder that was not seen: its fingerprint is empty. `config` is told which one it is."""
    text, null_tokens = config.text, config.model.null_tokens
    text.encoder = said.text_encoder or ""
    text.max_length = said.max_length or (null_tokens if null_tokens > 1 else 120)
    known = {"name": text.encoder, "fingerprint": "", "dtype": text.dtype, "max_length": text.max_length}
    return ForeignCondition("text", text=known | {"width": width})


def foreign_meta(
    config: Config,
    condition: ForeignCondition,
    latent_shape: tuple[int, int, int],
    said: ForeignConfig,
    notes: list[str],
) -> dict[str, Any]:
    """Configuration, condition and latents of a model; there is no data to tell of.

    Raises `ValueError` for a VAE that does not make such latents.
    """
    config.conditioning = condition.kind
    manifest = _manifest(latent_shape, _vae_info(said.vae, latent_shape[0], notes), condition.class_names)
    conditioning = from_checkpoint(config, manifest, {"text": condition.text})
    mean, scale = ([value] * latent_shape[0] for value in (manifest.vae.shift, manifest.vae.scale))
    meta = run_meta(config, manifest, conditioning, mean, scale)
    return json.loads(json.dumps(meta | {"format": FORMAT, "step": 0}))  # tuples as lists: what a reader will see


def _manifest(latent_shape: tuple[int, int, int], vae: VaeInfo, class_names: tuple[str, ...]) -> Manifest:
    """A manifest without shards. Normalised latents are taken to have zero mean and unit variance."""
    channels = latent_shape[0]
    return Manifest(
        latent_shape=latent_shape,
        latent_dtype="float32",
        has_latent_std=False,
        vae=vae,
        image_size=latent_shape[1] * vae.stride,
        channel_mean=(vae.shift,) * channels,
        channel_std=(1 / vae.scale,) * channels,
        class_names=class_names,
        shards=(),
        license="",
        attribution="",
    )


def _vae_info(name: str | None, channels: int, notes: list[str]) -> VaeInfo:
    if name is None:
        if channels != 4:
            raise ValueError(f"vae: must be given for latents of {channels} channels, whose scale is not known")
        notes.append(f"no VAE is named: latents are taken to be those of Stable Diffusion 1.x (scale {SD_VAE.scale})")
        return SD_VAE
    vae = load_vae(name)
    if vae.config.latent_channels != channels:
        raise ValueError(f"vae: must make latents of {channels} channels, {name} makes {vae.config.latent_channels}")
    return VaeInfo(name, vae.fingerprint, vae.config.shift_factor, vae.config.scaling_factor, vae.config.stride)


def _class_names(file: str | None, count: int) -> tuple[str, ...]:
    if file is None:
        return tuple(str(i) for i in range(count))
    try:
        names = [line.strip() for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as problem:
        raise ValueError(f"classes: {file} cannot be read: {problem}") from None
    if len(set(names)) != count or len(names) != count:
        raise ValueError(f"classes: must name the {count} classes of the model, all different, {file} has {len(names)}")
    return tuple(names)
