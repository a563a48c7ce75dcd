"""Images: decoding what users have, and cropping it to a size."""

import contextlib
import io
import re
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageChops, ImageOps

from flowdit.errors import first_line
from flowdit.fields import shortened

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MAX_PIXELS = 2 * 89_478_485
"""Above it Pillow refuses an image, as a small file can declare a size that does not fit into memory."""
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TGA", "TIFF", "WEBP")
"""Of Pillow's formats those of pixels. Others run programs, as EPS does."""
ANIMATED = ("AVIF", "GIF", "PNG", "WEBP")
"""Formats whose further frames are a film. Those of MPO and TIFF are previews and pages, and the first is the image."""
Pixels = UInt8[np.ndarray, "height width 3"]


class ImageError(ValueError):
    """Why an image cannot be used; it is left out."""


def open_image(data: bytes | Pixels, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image: upright, with 8 bits a channel, and on white if transparent.

    Raises `ImageError` with the reason if it is damaged, no image, animated, or has more than `max_pixels`.
    """
    if isinstance(data, np.ndarray):
        return Image.fromarray(data)
    with _decoding(), _opened(data, max_pixels) as image:
        is_jpeg = image.format in ("JPEG", "MPO")
        image = _in_eight_bits(ImageOps.exif_transpose(image), image)
        if image.mode == "CMYK" and is_jpeg and "adobe" not in image.info:
            image = ImageChops.invert(image)  # Pillow takes every JPEG of inks for one of Adobe's, which are inverted
        if not image.has_transparency_data:
            return image.convert("RGB")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def image_size(data: bytes | Pixels, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Height and width of the upright image, from its header. Raises `ImageError` as `open_image`, but for damage."""
    if isinstance(data, np.ndarray):
        return data.shape[0], data.shape[1]
    with _decoding(), _opened(data, max_pixels) as image:
        width, height = image.size
        return (width, height) if _is_turned(image, data) else (height, width)


def _is_turned(image: Image.Image, data: bytes) -> bool:
    """Whether the camera was held on its side. Pillow decodes a PNG whole to find that out, even if nothing says so."""
    if image.format == "PNG" and not any(mark in data for mark in (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")):
        return False
    is_turned = image.getexif().get(ORIENTATION, 1) >= 5
    if image.format == "TIFF":  # whose size is already that of the upright image in newer versions of Pillow
        return is_turned and image.width == getattr(image, "tag_v2", {}).get(WIDTH)
    return is_turned


ORIENTATION, WIDTH = 0x0112, 0x0100
"""Tags of EXIF and TIFF. From an orientation of 5, width and height change places."""


@contextlib.contextmanager
def _decoding() -> Iterator[None]:
    """Turn errors of Pillow into `ImageError`: it raises many types for damaged files."""
    try:
        yield
    except (MemoryError, ImageError):
        raise
    except Exception as error:
        text = re.sub(r" <_io.BytesIO object at \w+>", "", first_line(error))  # an address differs in every run
        raise ImageError(shortened(text)) from error


def _opened(data: bytes, max_pixels: int) -> Image.Image:
    Image.init()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `max_pixels` is the rule
        image = Image.open(io.BytesIO(data), formats=[name for name in FORMATS if name in Image.OPEN])
    if (pixels := image.width * image.height) > max_pixels:
        raise ImageError(f"has {pixels} pixels, more than max_pixels={max_pixels}")
    if image.format in ANIMATED and getattr(image, "is_animated", False):
        raise ImageError(f"is animated: {getattr(image, 'n_frames', 2)} frames")
    return image


def _in_eight_bits(image: Image.Image, opened: Image.Image) -> Image.Image:
    """Reduce images with more bits to their upper eight, as Pillow does for 16-bit colour images.

    Integer and float images (modes I;16, I and F) would be clipped at 255 instead. `opened` is the image as it was opened,
    with the format and tags of its file.
    """
    if image.mode == "I" and opened.format == "PPM":  # a PGM of 16 bits
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"has pixels of 32 bits (mode {image.mode}) with unknown range: save it with 8 or 16 bits")
    transparent = image.info.get("transparency")
    if image.mode.startswith("I;16"):
        values, tags = np.asarray(image), getattr(opened, "tag_v2", {})
        eight = (values >> (tags.get(BITS_PER_SAMPLE, (16,))[0] - 8)).astype(np.uint8)
        grey = Image.fromarray(255 - eight if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO else eight)
        if transparent is not None:
            grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
        return grey
    if image.mode == "RGB" and isinstance(transparent, tuple) and max(transparent) > 255:
        image.info["transparency"] = tuple(part >> 8 for part in transparent)  # not reduced by Pillow
    return image


BITS_PER_SAMPLE, PHOTOMETRIC = 258, 262
WHITE_IS_ZERO = 0
"""Tags of a TIFF, and a value of the latter."""

MAX_ASPECT = 8
"""Up to this ratio between its sides an image is resized and then cropped, as in ADM."""


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Crop the largest central square of `image` and resize it to `size` pixels, as ADM for ImageNet
    (openai/guided-diffusion).
    """
    return cover_crop(image, size, size)


def cover_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """Resize `image` so that it just covers (height, width) and cut out the centre; for a square, as ADM does.

    Box averages halve the image first, as a bicubic resize by more than two would alias. For very long images only the
    part to be seen is resized, as the full image might not fit into memory; the order of columns and rows may differ
    then.
    """
    fit = _fit(image.size, height, width)
    for size in fit.halves:
        image = image.resize(size, Image.Resampling.BOX)
    across, down = image.width / width, image.height / height
    if max(across, down) <= MAX_ASPECT * min(across, down):
        image = image.resize(fit.resized, Image.Resampling.BICUBIC)
        return image.crop((fit.left, fit.top, fit.left + width, fit.top + height))
    x, y = image.width / fit.resized[0], image.height / fit.resized[1]
    part = (fit.left * x, fit.top * y, (fit.left + width) * x, (fit.top + height) * y)
    return image.resize((width, height), Image.Resampling.BICUBIC, box=part)


def seen_part(size: tuple[int, int], height: int, width: int) -> tuple[int, int, int, int]:
    """The part of an image of `size` (height, width) that `cover_crop` keeps: top, left, height, width in its pixels."""
    fit = _fit((size[1], size[0]), height, width)
    x, y = size[1] / fit.resized[0], size[0] / fit.resized[1]
    top, left = round(fit.top * y), round(fit.left * x)
    return top, left, round((fit.top + height) * y) - top, round((fit.left + width) * x) - left


class _Fit(NamedTuple):
    """How an image is made to cover a size: halved to each of `halves`, then `resized`, both (width, height)."""

    halves: list[tuple[int, int]]
    resized: tuple[int, int]
    left: int
    top: int


def _fit(size: tuple[int, int], height: int, width: int) -> _Fit:
    """For an image of `size` (width, height)."""
    halves = []
    while size[0] >= 2 * width and size[1] >= 2 * height:
        size = (size[0] // 2, size[1] // 2)
        halves.append(size)
    scale = max(width / size[0], height / size[1])
    resized = (round(size[0] * scale), round(size[1] * scale))
    return _Fit(halves, resized, (resized[0] - width) // 2, (resized[1] - height) // 2)
