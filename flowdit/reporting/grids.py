"""Preview grids as small images within the page."""

from __future__ import annotations

import base64
import io
import logging
import warnings
from collections.abc import Sequence
from typing import NamedTuple

from etils import epath
from PIL import Image

from flowdit.errors import first_line

logger = logging.getLogger(__name__)

MOST_BYTES = 12 * 2**20
"""Of all embedded images together, before base64."""
LARGEST_FILE = 64 * 2**20
MOST_PIXELS = 40_000_000
WIDEST = 1_100
"""Width in pixels to which a grid is reduced."""
ATTEMPTS = ((85, 1.0), (70, 1.0), (60, 0.7), (50, 0.5))
"""WebP qualities and scales, until an image is small enough."""


class Grid(NamedTuple):
    """A preview grid of a step, as a data URI, and its size in pixels."""

    step: int
    uri: str
    width: int
    height: int


def spaced(steps: Sequence[int], count: int) -> list[int]:
    """`count` of the steps at most, evenly spaced, with the first and the last."""
    if len(steps) <= count:
        return list(steps)
    if count < 2:
        return list(steps[-1:]) if count else []
    return [steps[round(i * (len(steps) - 1) / (count - 1))] for i in range(count)]


def embed(grids: dict[int, epath.Path], count: int, most_bytes: int) -> list[Grid]:
    """At most `count` of the grids in about `most_bytes`. One that cannot be read is left out, with a warning."""
    steps = spaced(list(grids), count)
    embedded = []
    for step in steps:
        try:
            embedded.append(_grid(step, grids[step], most_bytes // len(steps)))
        except Exception as problem:  # Pillow raises many types of errors, and so do object stores
            logger.warning("%s left out: %s", grids[step], first_line(problem))
    return embedded


def _grid(step: int, file: epath.Path, most_bytes: int) -> Grid:
    if file.stat().length > LARGEST_FILE:
        raise ValueError(f"must have at most {LARGEST_FILE} bytes")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image = Image.open(io.BytesIO(file.read_bytes()), formats=("PNG",))
        if image.width * image.height > MOST_PIXELS:
            raise ValueError(f"must have at most {MOST_PIXELS} pixels, has {image.width} x {image.height}")
        image = image.convert("RGB")
    image.thumbnail((WIDEST, MOST_PIXELS))
    uri, *size = embedded(image, most_bytes)
    return Grid(step, uri, *size)


def embedded(image: Image.Image, most_bytes: int) -> tuple[str, int, int]:
    """An image as a data URI of at most so many bytes, before base64, with its width and height in pixels."""
    for quality, scale in ATTEMPTS:
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        encoded = io.BytesIO()
        image.resize(size).save(encoded, "WEBP", quality=quality)
        if encoded.tell() <= most_bytes:
            uri = f"data:image/webp;base64,{base64.b64encode(encoded.getvalue()).decode()}"
            return uri, *size
    raise ValueError("too large to embed")
