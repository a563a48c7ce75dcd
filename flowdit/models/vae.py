"""The frozen image autoencoder: the `AutoencoderKL` family of diffusers, read from its files without torch.

Attributes have the names of the diffusers state dict, so a parameter's path in the tree is its key in the file.
Everything acts on one example, (channels, height, width); callers `vmap`. Latents here are raw network outputs: callers
apply the shift and scale of the configuration.

Source: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (arXiv:2112.10752), and
diffusers' `models/autoencoders/autoencoder_kl.py`, the reference of the tests.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from flowdit import hashing
from flowdit.fields import require
from flowdit.json_input import STRICT, STRICT_PART, Count, Listed, Positive, parse
from flowdit.models import pretrained
from flowdit.models.vae_blocks import DownBlock, MidBlock, UpBlock, chain, conv, norm

ASSETS = Path(__file__).parents[1] / "assets"
EMBEDDED = {"openmoji": ASSETS / "vae", "emoji": ASSETS / "emoji_vae"}
WEIGHTS_STEM = "diffusion_pytorch_model"
# Stable Diffusion 1.x was saved before diffusers renamed its attention projections.
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# Fields that say whether there are tensors, by the beginning of their names.
OPTIONAL_PARTS = {
    "mid_block_add_attention": "encoder.mid_block.attentions.",
    "use_quant_conv": "quant_conv.",
    "use_post_quant_conv": "post_quant_conv.",
}
LOGVAR_RANGE = (-30.0, 20.0)


@dataclass(frozen=True, config=STRICT)
class VaeConfig:
    """The fields of a diffusers `config.json` of an `AutoencoderKL`, with diffusers' defaults."""

    block_out_channels: Annotated[Listed[Count], Field(min_length=1)] = (64,)
    layers_per_block: Count = 1
    latent_channels: Count = 4
    norm_num_groups: Count = 32
    in_channels: Count = 3
    out_channels: Count = 3
    mid_block_add_attention: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    scaling_factor: Positive = 0.18215
    shift_factor: float = 0.0

    @model_validator(mode="after")
    def _check(self) -> "VaeConfig":
        widths, groups = self.block_out_channels, self.norm_num_groups
        are_multiples = not any(width % groups for width in widths)
        require("block_out_channels", list(widths), are_multiples, f"must be multiples of norm_num_groups={groups}")
        return self

    @property
    def stride(self) -> int:
        """Pixels per latent cell along each side."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_diffusers(cls, raw: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> "VaeConfig":
        """Parse a diffusers `config.json`.

        Args:
            raw: the file's content.
            shapes: of the tensors in the weight files. Other sizes are refused before a network is built.

        Raises:
            ValueError: naming the first field that is invalid, of another architecture, or does not match the tensors.
        """
        blocks = parse(_Architecture, raw)
        content = {field.name: raw[field.name] for field in dataclasses.fields(cls) if field.name in raw}
        if content.get("shift_factor", 0) is None:
            content["shift_factor"] = 0.0
        config = parse(cls, content)
        widths, layers = config.block_out_channels, config.layers_per_block
        found = len(pretrained.numbers_after("encoder.down_blocks.", shapes))
        rule = f"must be a list of {found}, as in its tensors"
        require("block_out_channels", list(widths), len(widths) == found, rule)
        found = len(pretrained.numbers_after("encoder.down_blocks.0.resnets.", shapes))
        require("layers_per_block", layers, layers == found, f"must be {found}, as in its tensors")
        for name, prefix in OPTIONAL_PARTS.items():
            is_there = any(key.startswith(prefix) for key in shapes)
            rule = f"must be {str(is_there).lower()}, as in its tensors"
            require(name, value := getattr(config, name), value == is_there, rule)
        pretrained.check_sizes(config, ("block_out_channels", "latent_channels", "in_channels", "out_channels"), shapes)
        for name in ("down_block_types", "up_block_types"):
            kinds = list(getattr(blocks, name))
            require(name, kinds, len(kinds) == len(widths), f"must be a list of {len(widths)}")
        return config


@dataclass(frozen=True, config=STRICT_PART)
class _Architecture:
    """What the file must say of what is computed. Per-channel affines would take the place of `scaling_factor`."""

    class_name: Annotated[Literal["AutoencoderKL"], Field(alias="_class_name")]
    act_fn: Literal["silu"] = "silu"
    latents_mean: None = None
    latents_std: None = None
    down_block_types: Listed[Literal["DownEncoderBlock2D"]] = ("DownEncoderBlock2D",)
    up_block_types: Listed[Literal["UpDecoderBlock2D"]] = ("UpDecoderBlock2D",)


class Posterior(NamedTuple):
    """The encoder's diagonal Gaussian over raw latents."""

    mean: Float[Array, "latent_channels height width"]
    std: Float[Array, "latent_channels height width"]


class Encoder(eqx.Module):
    """Encodes an image to mean and log variance of the latents, stacked along the channels."""

    conv_in: eqx.nn.Conv2d
    down_blocks: list[DownBlock]
    mid_block: MidBlock
    conv_norm_out: eqx.nn.GroupNorm
    conv_out: eqx.nn.Conv2d

    def __init__(self, config: VaeConfig):
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = conv(config.in_channels, widths[0])
        self.down_blocks = [
            DownBlock(before, width, config.layers_per_block, groups, is_last=is_last)
            for before, width, is_last in _steps(widths)
        ]
        self.mid_block = MidBlock(widths[-1], groups, has_attention=config.mid_block_add_attention)
        self.conv_norm_out = norm(widths[-1], groups)
        self.conv_out = conv(widths[-1], 2 * config.latent_channels)

    def __call__(self, image: Float[Array, "channels height width"]) -> Float[Array, "moments _ _"]:
        x = chain([self.conv_in, *self.down_blocks, self.mid_block], image)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class Decoder(eqx.Module):
    """Decodes latents to an image."""

    conv_in: eqx.nn.Conv2d
    mid_block: MidBlock
    up_blocks: list[UpBlock]
    conv_norm_out: eqx.nn.GroupNorm
    conv_out: eqx.nn.Conv2d

    def __init__(self, config: VaeConfig):
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = conv(config.latent_channels, widths[0])
        self.mid_block = MidBlock(widths[0], groups, has_attention=config.mid_block_add_attention)
        self.up_blocks = [
            UpBlock(before, width, config.layers_per_block + 1, groups, is_last=is_last)
            for before, width, is_last in _steps(widths)
        ]
        self.conv_norm_out = norm(widths[-1], groups)
        self.conv_out = conv(widths[-1], config.out_channels)

    def __call__(self, latent: Float[Array, "latent_channels height width"]) -> Float[Array, "channels _ _"]:
        x = chain([self.conv_in, self.mid_block, *self.up_blocks], latent)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


def _steps(widths: tuple[int, ...]) -> Iterator[tuple[int, int, bool]]:
    """Width before, width after and whether it is the last, for each resolution."""
    for i, width in enumerate(widths):
        yield widths[max(i - 1, 0)], width, i == len(widths) - 1


class AutoencoderKL(eqx.Module):
    """Encoder and decoder between images in [-1, 1] and raw latents; `load_vae` reads one with its weights.

    It computes in the dtype of its parameters and returns float32. `fingerprint` identifies the files it was read from.
    """

    encoder: Encoder
    decoder: Decoder
    quant_conv: eqx.nn.Conv2d | None
    post_quant_conv: eqx.nn.Conv2d | None
    config: VaeConfig = eqx.field(static=True)
    fingerprint: str = eqx.field(static=True)

    def __init__(self, config: VaeConfig, fingerprint: str = ""):
        channels = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = conv(2 * channels, 2 * channels, 1) if config.use_quant_conv else None
        self.post_quant_conv = conv(channels, channels, 1) if config.use_post_quant_conv else None
        self.config = config
        self.fingerprint = fingerprint

    def encode(self, image: Float[Array, "channels height width"]) -> Posterior:
        """The posterior over raw latents, (latent_channels, height / stride, width / stride), of one image in [-1, 1].

        Diffusion models are trained on `(latent - shift_factor) * scaling_factor`, computed by the caller. Raises
        `ValueError` if the number of channels differs from the network's, or the sides are not divisible by the stride.
        """
        stride, channels = self.config.stride, self.config.in_channels
        if image.shape[0] != channels or image.shape[1] % stride or image.shape[2] % stride:
            raise ValueError(f"image must have {channels} channels and sides divisible by {stride}, not {image.shape}")
        moments = self.encoder(image.astype(self.encoder.conv_in.weight.dtype))
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2)
        return Posterior(mean, jnp.exp(0.5 * jnp.clip(logvar, *LOGVAR_RANGE)))

    def decode(self, latent: Float[Array, "latent_channels height width"]) -> Float[Array, "channels _ _"]:
        """The image of one *raw* latent, about [-1, 1] (not clipped) and `stride` times as large along each side.

        The caller inverts shift and scale: `latent = scaled / scaling_factor + shift_factor`. Raises `ValueError` if
        the number of channels differs from the network's.
        """
        if latent.shape[0] != self.config.latent_channels:
            raise ValueError(f"latent must have {self.config.latent_channels} channels, not shape {latent.shape}")
        latent = latent.astype(self.decoder.conv_in.weight.dtype)
        if self.post_quant_conv is not None:
            latent = self.post_quant_conv(latent)
        return self.decoder(latent).astype(jnp.float32)


def to_pixels(images: Float[Array, "*shape"]) -> UInt8[Array, "*shape"]:
    """Images of about [-1, 1], clipped, as 8-bit values."""
    return jnp.round((jnp.clip(images, -1, 1) + 1) * 127.5).astype(jnp.uint8)


def load_vae(name: str | Path, dtype: DTypeLike = jnp.float32) -> AutoencoderKL:
    """Read an `AutoencoderKL` in diffusers format, its parameters cast to `dtype`.

    Args:
        name: "openmoji" (the embedded network), a local folder, or a Hugging Face hub id. Folder and repository may
            hold the network itself or a pipeline with a `vae` folder.
        dtype: of the parameters and of the computation.

    Raises:
        ValueError: nothing found under that name, another architecture, damaged files, or tensors that do not match
            the configuration (the first of them are listed).
    """
    folder = pretrained.find_folder("vae", name, embedded=EMBEDDED, subfolder="vae", stem=WEIGHTS_STEM)
    config_file = folder / "config.json"
    weight_files = pretrained.find_weights(folder, WEIGHTS_STEM)
    fingerprint = hashing.files_fingerprint(config_file, *weight_files)
    config = _read_config(config_file, pretrained.read_shapes(weight_files))
    shapes = eqx.filter_eval_shape(AutoencoderKL, config, fingerprint)
    tensors = {_current_name(key): tensor for key, tensor in pretrained.read_tensors(weight_files).items()}
    return pretrained.fill(shapes, tensors, dtype, source=folder)


def _read_config(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> VaeConfig:
    raw = pretrained.read_json(file)
    try:
        return VaeConfig.from_diffusers(raw, shapes)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _current_name(key: str) -> str:
    return ".".join(OLD_NAMES.get(part, part) for part in key.split("."))
