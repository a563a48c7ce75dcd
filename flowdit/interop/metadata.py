"""Checkpoint metadata for a model trained elsewhere, from its files and the user's hints."""

from __future__ import annotations

import dataclasses
import logging
import math
from pathlib import Path
from typing import NamedTuple

from flowdit.checkpoint.meta import RunMeta, run_meta
from flowdit.conditioning import from_checkpoint
from flowdit.conditioning.meta import ConditioningMeta, EncoderMeta
from flowdit.conditioning.text import MAX_TOKENS
from flowdit.config import Config
from flowdit.data.manifest import Manifest, VaeInfo
from flowdit.diffusion.sampling import PREDICTIONS
from flowdit.fields import FieldError, about, require, require_choice
from flowdit.json_input import parse
from flowdit.models.config import PixArtConfig
from flowdit.models.vae import load_vae

logger = logging.getLogger(__name__)

FORMATS = ("dit", "sit", "pixart")
# The VAE of DiT, SiT and PixArt-alpha, and of nearly every other model with four channels.
SD_VAE = VaeInfo(name="", fingerprint="", shift=0.0, scale=0.18215, stride=8)


# The latents' size is not that of any tensor, but sampling allocates it. 1,024 is an image of 8,192 pixels.
MAX_SAMPLED_SIDE = 1024


@dataclasses.dataclass
class ForeignConfig:
    """The user's hints about a checkpoint, for information that is not in its files, and which of its weights to read.

    Attributes:
        format: `dit`, `sit` or `pixart`, for a file of an original repository; DiT's and SiT's tensors have the same names.
        prediction: output of the network, `velocity` or `noise`.
        latent_size: side of the latents, needed without a position table.
        num_heads: attention heads, for a width that is not in the papers.
        interpolation_scale: scale of PixArt's positions, needed without a position table.
        classes: text file with one class name per line; null: numbers.
        vae: the AutoencoderKL of the latents, a folder or hub id; null: that of the pipeline folder.
        text_encoder: the text encoder of the model, a folder or hub id.
        max_length: number of tokens of the text features.
        ema_width: width of the EMA that is made from a run's power-function averages (`train.ema_snapshot_every`), as a
            fraction of the run; null: the EMA of `train.ema_decay`.
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
    ema_width: float | None = None

    def check(self) -> None:
        """Raise `FieldError` naming the first field that breaks a rule; all of them may be left out."""
        for field, choices in (("format", FORMATS), ("prediction", PREDICTIONS)):
            if (value := getattr(self, field)) is not None:
                require_choice(field, value, choices)
        for field in ("latent_size", "num_heads", "max_length"):
            value = getattr(self, field)
            is_count = value is None or (type(value) is int and value >= 1)
            require(field, value, is_count, "must be a whole number above 0")
        for field, limit in (("latent_size", MAX_SAMPLED_SIDE), ("max_length", MAX_TOKENS)):
            value = getattr(self, field)
            require(field, value, value is None or value <= limit, f"must be at most {limit}")
        for field in ("classes", "vae", "text_encoder"):
            value = getattr(self, field)
            require(field, value, isinstance(value, str | None), "must be a text")
        for field in ("interpolation_scale", "ema_width"):
            value = getattr(self, field)
            is_positive = value is None or (type(value) in (int, float) and 0 < value < math.inf)
            require(field, value, is_positive, "must be a number above 0")


class ForeignCondition(NamedTuple):
    """The condition of an imported model: the kind (`conditioning.KINDS`), and its checkpoint metadata."""

    kind: str
    class_names: tuple[str, ...] = ()
    text: EncoderMeta | None = None


def class_condition(config: Config, hints: ForeignConfig, count: int) -> ForeignCondition:
    """Classes named by the user's file, or by number; no condition if the table holds only the null class."""
    names = _class_names(hints.classes, max(count, 0))
    return ForeignCondition("labels", names) if names else ForeignCondition("none")


def text_condition(config: Config, hints: ForeignConfig, width: int) -> ForeignCondition:
    """A text encoder with an unknown (empty) fingerprint. Sets `config.text`."""
    assert isinstance(config.model, PixArtConfig)
    text, null_tokens = config.text, config.model.null_tokens
    text.encoder = hints.text_encoder or ""
    text.max_length = hints.max_length or (null_tokens if null_tokens > 1 else 120)
    is_same = null_tokens in (1, text.max_length)
    require("max_length", hints.max_length, is_same, f"must be {null_tokens}, as the model's null caption has")
    # Without a width its tensor is missing or has no axis for it, which is found when all tensors are compared.
    meta = EncoderMeta(text.encoder, "", text.dtype, text.max_length, max(width, 1))
    return ForeignCondition("text", text=meta)


def foreign_meta(
    config: Config,
    condition: ForeignCondition,
    latent_shape: tuple[int, int, int],
    hints: ForeignConfig,
) -> RunMeta:
    """Metadata with configuration, condition and latents of a model, without data.

    Raises `ValueError` if the VAE does not match the latents.
    """
    config.conditioning = condition.kind
    manifest = _manifest(latent_shape, _vae_info(hints.vae, latent_shape[0]), condition.class_names)
    conditioning = from_checkpoint(config, manifest, ConditioningMeta(text=condition.text))
    mean, scale = ([value] * latent_shape[0] for value in (manifest.vae.shift, manifest.vae.scale))
    meta = run_meta(config, manifest, conditioning.describe(), mean, scale)
    return RunMeta.parse(meta.dump())  # as a reader will see it


def _manifest(latent_shape: tuple[int, int, int], vae: VaeInfo, class_names: tuple[str, ...]) -> Manifest:
    """A manifest without shards. Normalised latents are assumed to have zero mean and unit variance."""
    channels = latent_shape[0]
    content = {
        "latent_shape": latent_shape,
        "latent_dtype": "float32",
        "has_latent_std": False,
        "vae": dataclasses.asdict(vae),
        "image_size": latent_shape[1] * vae.stride,
        "channel_mean": (vae.shift,) * channels,
        "channel_std": (1 / vae.scale,) * channels,
        "class_names": class_names,
        "shards": (),
        "license": "",
        "attribution": "",
    }
    return parse(Manifest, content)


def _vae_info(name: str | None, channels: int) -> VaeInfo:
    if name is None:
        if channels != 4:
            raise FieldError("vae", f"must be given for latents of {channels} channels, whose scale is unknown")
        logger.warning(
            "no VAE is given: latents are assumed to be those of Stable Diffusion 1.x (scale %s)", SD_VAE.scale
        )
        return SD_VAE
    with about("vae"):
        vae = load_vae(name)
    if (made := vae.config.latent_channels) != channels:
        raise FieldError("vae", f"must make latents of {channels} channels, {name} makes {made}")
    return parse(
        VaeInfo,
        {
            "name": name,
            "fingerprint": vae.fingerprint,
            "shift": vae.config.shift_factor,
            "scale": vae.config.scaling_factor,
            "stride": vae.config.stride,
        },
    )


def _class_names(file: str | None, count: int) -> tuple[str, ...]:
    if file is None:
        return tuple(str(i) for i in range(count))
    try:
        names = [line.strip() for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as problem:
        raise FieldError("classes", f"{file} cannot be read: {problem}") from None
    if len(set(names)) != count or len(names) != count:
        rule = f"must name the {count} classes of the model, all different, {file} has {len(names)}"
        raise FieldError("classes", rule)
    return tuple(names)
