"""From latents to PNG files: VAE decoding and captioned grids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from flowdit.diffusion.flow import denormalise_latents
from flowdit.models.vae import AutoencoderKL

Decode = Callable[[Float[np.ndarray, "batch c h w"]], UInt8[np.ndarray, "batch height width 3"]]


def make_decoder(vae: AutoencoderKL, mean: Sequence[float], scale: Sequence[float], batch_size: int = 16) -> Decode:
    """Normalised latents -> pictures as bytes, `batch_size` at a time (the VAE needs far more memory than the DiT)."""

    @jax.jit
    def decode_batch(vae, latents):
        raw = denormalise_latents(latents, jnp.asarray(mean), jnp.asarray(scale))
        images = jax.vmap(vae.decode)(raw)
        return jnp.round((jnp.clip(images, -1, 1) + 1) * 127.5).astype(jnp.uint8)

    def decode(latents):
        count = len(latents)
        padded = np.concatenate([latents, np.zeros((-count % batch_size, *latents.shape[1:]), latents.dtype)])
        parts = [decode_batch(vae, padded[i : i + batch_size]) for i in range(0, len(padded), batch_size)]
        return np.concatenate([np.asarray(part) for part in parts])[:count].transpose(0, 2, 3, 1)

    return decode


def save_grid(
    path: Path, images: UInt8[np.ndarray, "n height width 3"], captions: Sequence[str], columns: int, gap: int = 4
) -> None:
    """A grid in row-major order, each picture with its caption below. Small pictures are enlarged to be seen."""
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
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path)


def wrap_caption(caption: str, length: Callable[[str], float], width: int, max_lines: int = 3) -> str:
    """`caption` in at most `max_lines` lines of at most `width`; what does not fit ends in an ellipsis."""
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
