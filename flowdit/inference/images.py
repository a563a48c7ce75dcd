"""From latents to PNG files: VAE decoding and captioned grids."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from flowdit.data.manifest import Manifest
from flowdit.diffusion.flow import denormalise_latents
from flowdit.fields import FieldError, about
from flowdit.models.vae import AutoencoderKL, load_vae
from flowdit.sharding import batch_sharding, batch_shards, replicated

Decode = Callable[..., UInt8[np.ndarray, "n height width 3"]]
DECODED_AT_ONCE = 16
"""Images per device and decoding call: the VAE needs far more memory than the diffusion network."""


def make_decoder(vae: AutoencoderKL, mean: Sequence[float], scale: Sequence[float], mesh: Mesh) -> Decode:
    """Return (normalised latents, batch size to compile for, by default their number) -> uint8 images, split over the mesh."""
    vae = jax.device_put(vae, replicated(mesh))

    @functools.partial(jax.jit, out_shardings=replicated(mesh))
    def decode_batch(vae, latents):
        raw = denormalise_latents(latents, jnp.asarray(mean), jnp.asarray(scale))
        images = jax.vmap(vae.decode)(raw)
        return jnp.round((jnp.clip(images, -1, 1) + 1) * 127.5).astype(jnp.uint8)

    def decode(latents: Float[Any, "n c h w"], batch_size: int | None = None) -> UInt8[np.ndarray, "n height width 3"]:
        shards, latents = batch_shards(mesh), np.asarray(latents)
        size = min(-(-(batch_size or len(latents)) // shards), DECODED_AT_ONCE) * shards
        padded = np.concatenate([latents, np.zeros((-len(latents) % size, *latents.shape[1:]), latents.dtype)])
        rows = [jax.device_put(padded[i : i + size], batch_sharding(mesh)) for i in range(0, len(padded), size)]
        images = np.concatenate([np.asarray(decode_batch(vae, part)) for part in rows])
        return images[: len(latents)].transpose(0, 2, 3, 1)

    return decode


def save_grid(
    path: epath.PathLike,
    images: UInt8[np.ndarray, "n height width 3"],
    captions: Sequence[str],
    columns: int,
    gap: int = 4,
) -> None:
    """Save a PNG of a grid in row-major order, each image with its caption below. Small images are enlarged."""
    zoom = max(1, 128 // images.shape[2])
    height, width = images.shape[1] * zoom, images.shape[2] * zoom
    font = ImageFont.load_default(11)
    texts = [wrap_caption(caption, font.getlength, width) for caption in captions]
    cell_height, cell_width = height + 2 + 14 * max(text.count("\n") + 1 for text in texts) + gap, width + gap
    rows, columns = -(-len(images) // columns), min(columns, len(images))
    canvas = Image.new("RGB", (columns * cell_width + gap, rows * cell_height + gap), "white")
    draw = ImageDraw.Draw(canvas)
    for i, (image, text) in enumerate(zip(images, texts, strict=True)):
        left, top = gap + i % columns * cell_width, gap + i // columns * cell_height
        canvas.paste(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS), (left, top))
        draw.text((left + width // 2, top + height + 1), text, "#444", font, anchor="ma", align="center", spacing=2)
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        canvas.save(file, "PNG")  # type: ignore[arg-type]


def wrap_caption(caption: str, length: Callable[[str], float], width: int, max_lines: int = 3) -> str:
    """Wrap `caption` to at most `max_lines` lines of at most `width`; longer text ends in an ellipsis."""
    lines, words = [""], caption.split()
    for word in words:
        longer = f"{lines[-1]} {word}".strip()
        if length(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > max_lines:
        lines = [*lines[: max_lines - 1], " ".join(lines[max_lines - 1 :])]
    return "\n".join(_shortened(line, length, width) for line in lines)


def _shortened(text: str, length: Callable[[str], float], width: int) -> str:
    if length(text) <= width:
        return text
    while text and length(text + "…") > width:
        text = text[:-1]
    return text + "…"


def load_matching_vae(name: str, manifest: Manifest) -> AutoencoderKL:
    """Load the VAE `name`. Raises `ValueError` if it is not the one that made the data's latents.

    The VAE of an imported model may be unknown, with an empty fingerprint: then only the layout of the latents is
    checked.
    """
    known, channels = manifest.vae, manifest.latent_shape[0]
    if not name:
        rule = f"must be given, the checkpoint has none (an AutoencoderKL folder or hub id with {channels} channels)"
        raise FieldError("vae", rule)
    with about("vae"):
        vae = load_vae(name)
    wanted = (channels, known.stride, known.shift, known.scale)
    found = (vae.config.latent_channels, vae.config.stride, vae.config.shift_factor, vae.config.scaling_factor)
    if found != wanted:
        needed, made = ("{} channels, stride {}, shift {} and scale {}".format(*layout) for layout in (wanted, found))
        raise FieldError("vae", f"must make latents of {needed}, {name!r} makes {made}")
    if known.fingerprint and vae.fingerprint != known.fingerprint:
        rule = f"must be the one that made the latents (fingerprint {known.fingerprint})"
        raise FieldError("vae", f"{rule}, {name!r} has {vae.fingerprint}")
    return vae
