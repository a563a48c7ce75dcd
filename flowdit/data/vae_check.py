"""A check of the VAE on the images of a data set, before they are encoded: how well does it reproduce them?"""

import heapq
import itertools
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Float, UInt8

from flowdit.data.encode_images import EncodeBatch
from flowdit.data.progress import progress_bar
from flowdit.image_grid import save_grid
from flowdit.models.vae import AutoencoderKL, to_pixels

logger = logging.getLogger(__name__)

FILE_NAME = "vae_check.png"
MIN_PSNR = 24.0
"""In dB. Below it, details such as eyes and lettering are visibly lost."""
MAX_PSNR = 100.0
"""In dB, in place of infinity for equal images."""
MAX_DECODED = 4
"""Images per decoding call, fewer above 256 pixels: at 512 pixels a large VAE needs about 2 GB an image."""
SHEET_PIXELS = 2**22
"""Number of pixels of the images on the sheet; it shows 8 to 64 of them, those of the lowest PSNR."""


class Pair(NamedTuple):
    """An image (left) beside its reconstruction, and the PSNR in dB. Sorts by the PSNR."""

    psnr: float
    index: int
    name: str
    pixels: UInt8[np.ndarray, "size 2*size 3"]


def check_vae(
    folder: epath.Path,
    vae: AutoencoderKL,
    encode_batch: EncodeBatch,
    images: Iterable[tuple[str, UInt8[np.ndarray, "size size 3"]]],
    *,
    count: int,
    batch_size: int,
    image_size: int,
    dtype: str,
) -> None:
    """Log mean and lowest PSNR of `images`, about `count` by their names, and write them with their reconstructions to
    `folder`.

    Latents are rounded to `dtype` as in the data set, and images to 8 bits as samples are. Warns below `MIN_PSNR`.
    Raises `OSError` if the sheet cannot be written.
    """
    shown = min(max(SHEET_PIXELS // image_size**2, 8), 64)
    values: list[float] = []
    worst: list[tuple[float, int, Pair]] = []  # a heap of those to be shown: the best of them comes first
    with progress_bar("checking the VAE", "images", count, count) as progress:
        numbered = enumerate(images)
        while batch := list(itertools.islice(numbered, batch_size)):
            for pair in _pairs(batch, vae, encode_batch, image_size, dtype):
                values.append(pair.psnr)
                heapq.heappush(worst, (-pair.psnr, -pair.index, pair))
                if len(worst) > shown:
                    heapq.heappop(worst)
            progress.update(len(batch))
    if values:
        pairs = sorted((pair for _, _, pair in worst), key=lambda pair: pair[:2])
        _write_sheet(folder / FILE_NAME, pairs, image_size)
        _report(folder / FILE_NAME, values, pairs[0].name)


def _pairs(
    images: Sequence[tuple[int, tuple[str, np.ndarray]]],
    vae: AutoencoderKL,
    encode_batch: EncodeBatch,
    image_size: int,
    dtype: str,
) -> Iterator[Pair]:
    mean, _ = encode_batch(np.stack([pixels for _, (_, pixels) in images])).ready()
    latents = mean.astype(dtype).astype(np.float32)
    at_once = max(1, min(MAX_DECODED, 256**2 * MAX_DECODED // image_size**2))
    for start in range(0, len(latents), at_once):
        part = latents[start : start + at_once]
        padded = np.pad(part, ((0, at_once - len(part)), (0, 0), (0, 0), (0, 0)))  # one shape, one compilation
        decoded = np.asarray(_decode(vae, jnp.asarray(padded))).transpose(0, 2, 3, 1)
        for (index, (name, before)), after in zip(images[start : start + at_once], decoded, strict=False):
            yield Pair(psnr(before, after), index, name, np.concatenate([before, after], axis=1))


@eqx.filter_jit
def _decode(vae: AutoencoderKL, latents: Float[Array, "n c h w"]) -> UInt8[Array, "n 3 height width"]:
    return to_pixels(jax.vmap(vae.decode)(latents))


def psnr(before: UInt8[np.ndarray, "*shape"], after: UInt8[np.ndarray, "*shape"]) -> float:
    """Peak signal-to-noise ratio of two 8-bit images in dB, at most `MAX_PSNR`."""
    mse = float(np.mean(np.square(before.astype(np.float64) - after)))
    return min(10 * math.log10(255**2 / mse), MAX_PSNR) if mse else MAX_PSNR


def _write_sheet(path: epath.Path, pairs: list[Pair], size: int) -> None:
    zoom = max(1, 128 // size)
    images = np.stack([pair.pixels for pair in pairs]).repeat(zoom, axis=1).repeat(zoom, axis=2)
    captions = [f"{pair.psnr:.1f} dB {pair.name}" for pair in pairs]
    temporary = path.with_name(path.name + ".tmp")
    save_grid(temporary, images, captions, columns=max(1, 1536 // images.shape[2]))
    temporary.replace(path)


def _report(sheet: epath.Path, values: list[float], worst: str) -> None:
    mean = float(np.mean(values))
    logger.info(
        "VAE check on %s: mean PSNR %.1f dB, worst %.1f dB (%s); images beside their reconstructions: %s",
        "1 image" if len(values) == 1 else f"{len(values)} images",
        mean,
        min(values),
        worst,
        sheet,
    )
    if mean < MIN_PSNR:
        logger.warning(
            "vae: %.1f dB is below %g: it loses details of these images, and samples cannot be better; look at %s and "
            "give another one with vae=<folder or hub id of a diffusers AutoencoderKL>",
            mean,
            MIN_PSNR,
            sheet,
        )
