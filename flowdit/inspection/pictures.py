"""Decoded latents beside their originals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from flowdit.data.manifest import Manifest
from flowdit.data.vae_check import psnr
from flowdit.inference.images import Decode, make_decoder
from flowdit.inspection.originals import Original, oriented
from flowdit.inspection.survey import Example
from flowdit.models.vae import AutoencoderKL
from flowdit.reporting.grids import MOST_BYTES, embedded
from flowdit.sharding import MeshConfig, make_mesh

DECODED_AT_ONCE = 4
"""Images per call of the VAE up to 256 pixels, fewer above: a large one needs about 2 GB for an image of 512."""
WIDEST = 384
"""Pixels to which the longer side of an image is reduced on the page."""
Pixels = UInt8[np.ndarray, "height width 3"]


class Picture(NamedTuple):
    """A record with its decoded latent, and its original. `psnr` is in dB."""

    example: Example
    decoded: Pixels
    original: Original | None
    psnr: float | None


def make_pictures(
    manifest: Manifest, network: AutoencoderKL, examples: Sequence[Example], originals: Mapping[str, Original]
) -> list[Picture]:
    """Decode the latents of records with the VAE that made them."""
    zeros, ones = [0.0] * manifest.latent_shape[0], [1.0] * manifest.latent_shape[0]
    decode = make_decoder(network, zeros, ones, make_mesh(MeshConfig()))  # raw latents have no mean and scale
    pictures = []
    for example, decoded in zip(examples, _decoded(decode, examples, manifest.vae.stride), strict=True):
        original = originals.get(str(example.record.get("key")))
        if original is not None:
            original = oriented(example, original)
        before = None if original is None else original.pixels
        likeness = None if before is None else psnr(before, decoded)
        pictures.append(Picture(example, decoded, original, likeness))
    return pictures


def _decoded(decode: Decode, examples: Sequence[Example], stride: int) -> list[Pixels]:
    """Images in the order of the examples; each shape is compiled once."""
    images: dict[int, Pixels] = {}
    shapes = dict.fromkeys(example.record["latent"].shape for example in examples)
    for shape in shapes:
        rows = [i for i, example in enumerate(examples) if example.record["latent"].shape == shape]
        at_once = int(np.clip(DECODED_AT_ONCE * 256**2 // (shape[1] * shape[2] * stride**2), 1, DECODED_AT_ONCE))
        for start in range(0, len(rows), at_once):
            part = rows[start : start + at_once]
            latents = np.stack([examples[i].record["latent"].astype(np.float32) for i in part])
            images |= dict(zip(part, decode(latents, at_once), strict=True))
    return [images[i] for i in range(len(examples))]


def data_uri(pixels: Pixels, share: int) -> tuple[str, int, int]:
    """An image as a data URI, with width and height; `share` images together have at most `MOST_BYTES`."""
    image = Image.fromarray(np.ascontiguousarray(pixels))
    if max(image.size) > WIDEST:
        image.thumbnail((WIDEST, WIDEST))
    elif max(image.size) < WIDEST // 2:
        zoom = WIDEST // 2 // max(image.size)
        image = image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)
    return embedded(image, MOST_BYTES // max(share, 1))
