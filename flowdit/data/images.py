"""Image sets with classes and captions: the embedded OpenMoji set, or a folder.

A folder has one sub-folder per class, or a caption file, or both, or neither.
"""

import errno
import logging
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int
from PIL import Image, ImageOps

from flowdit.data import openmoji
from flowdit.data.caption_file import read_captions
from flowdit.data.captions import caption_key
from flowdit.data.source_listing import Listing
from flowdit.errors import first_line
from flowdit.fields import listed, require, shortened
from flowdit.hashing import file_sha256, sha256

logger = logging.getLogger(__name__)

LASTING = (errno.EACCES, errno.EPERM)
"""Errors of reading a file that belong to the file; others may be gone at the next run, such as those of a network."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class ImageError(ValueError):
    """An image that cannot be read and is left out, because of `reason`."""

    def __init__(self, file: str, reason: str):
        super().__init__(f"{file}: cannot be read as an image: {reason}")
        self.reason = reason


@dataclass(frozen=True)
class ImageSet:
    """A set of images that are opened one at a time; `key` identifies their content.

    They have labels, (short, long) captions, both, or neither. `open` raises `ImageError` for an image that is to be
    left out. `listing` has the files of a folder, in this order.
    """

    name: str
    class_names: tuple[str, ...]
    labels: Int[np.ndarray, " images"] | None
    captions: list[tuple[str, str]] | None
    held_out: Bool[np.ndarray, " images"]
    open: Callable[[int], Image.Image]
    key: str
    license: str = ""
    attribution: str = ""
    listing: Listing | None = None

    def name_of(self, index: int) -> str:
        """The file of image `index` within its folder; bytes of a name that are not UTF-8 are escaped."""
        name = f"image {index}" if self.listing is None else self.listing.names[index]
        return name.encode(errors="backslashreplace").decode()

    def condition(self, index: int) -> dict[str, Any]:
        """Label and captions of image `index`, as fields of a record."""
        label = {} if self.labels is None else {"label": int(self.labels[index])}
        if self.captions is None:
            return label
        short, long = self.captions[index]
        return label | {"short_caption": short, "long_caption": long}

    def captions_key(self) -> str | None:
        """SHA-256 (hex) over all captions."""
        if self.captions is None:
            return None
        return sha256(caption_key(*pair) for pair in self.captions)


def load_images(source: str, held_out_fraction: float, captions: str = "") -> ImageSet:
    """Load the image set `source`: a name in `SOURCES`, `<name>:<path>` with such a name, or a folder.

    `captions` is a file as in `caption_file`. In a folder, images without class sub-folders have no labels.

    Raises `ValueError` if the folder does not exist, has neither images nor class sub-folders, a class has no image, or
    the captions do not match the images.
    """
    require("held_out_fraction", held_out_fraction, 0 <= held_out_fraction < 1, "must be in [0, 1)")
    name, _, path = source.partition(":")
    if name in SOURCES:
        return SOURCES[name](path, held_out_fraction, captions)
    return _load_folder(Path(source), held_out_fraction, Path(captions) if captions else None)


def _load_openmoji(path: str, held_out_fraction: float, captions: str) -> ImageSet:
    require("source", f"openmoji:{path}", not path, "must be openmoji, which is embedded, without a path")
    require("captions", captions, not captions, "must be empty for source=openmoji, which has its own")
    data = openmoji.load()
    return ImageSet(
        name="openmoji",
        class_names=data.class_names,
        labels=data.labels,
        captions=data.captions,
        held_out=data.held_out,
        open=lambda i: Image.fromarray(data.tiles[i]),
        key=" ".join(file_sha256(openmoji.FOLDER / name) for name in ("sheet.webp", "table.json")),
        license=openmoji.LICENSE,
        attribution=openmoji.ATTRIBUTION,
    )


SOURCES: dict[str, Callable[[str, float, str], ImageSet]] = {"openmoji": _load_openmoji}
"""Functions from (path, held-out fraction, caption file) to an image set, by name, in addition to folders."""


def _load_folder(folder: Path, held_out_fraction: float, captions: Path | None) -> ImageSet:
    if not folder.is_dir():
        names = " or ".join(map(repr, SOURCES))
        raise ValueError(f"source: must be {names} or a folder of images, there is no folder {str(folder)!r}")
    entries = list(folder.iterdir())
    has_images = any(path.suffix.lower() in SUFFIXES for path in entries)
    direct = has_images and (captions is not None or not any(_is_class(path) for path in entries))
    if direct:
        class_names, labels = (), None
        files, left_out = _scan(folder)
    else:
        class_names, files, labels, left_out = _class_files(folder)
    _tell_left_out(folder, [path for path in left_out if captions is None or path.name != captions.name])
    names = [file.relative_to(folder).as_posix() for file in files]
    listing = Listing.of(files, names)
    return ImageSet(
        name=folder.resolve().name,
        class_names=class_names,
        labels=labels,
        captions=None if captions is None else read_captions(captions, folder, names),
        held_out=np.array(
            [zlib.crc32(name.encode(errors="surrogateescape")) < held_out_fraction * 2**32 for name in names]
        ),
        open=lambda i: _open(files[i]),
        key=listing.key,
        listing=listing,
    )


def _class_files(folder: Path) -> tuple[tuple[str, ...], list[Path], np.ndarray, list[Path]]:
    """Class names, image files, their class numbers, and files that are left out."""
    classes = [path for path in sorted(folder.iterdir()) if _is_class(path)]
    if not classes:
        raise ValueError(f"source: {folder} must have images or one sub-folder of them for each class, it has neither")
    found: list[list[Path]] = []
    left_out = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".") and not path.is_dir()]
    for class_folder in classes:
        files, others = _scan(class_folder)
        if not files:
            raise ValueError(f"source: class folder {class_folder} has no images ({' '.join(SUFFIXES)})")
        found.append(files)
        left_out += others
    labels = np.repeat(np.arange(len(classes)), [len(files) for files in found])
    return tuple(path.name for path in classes), [file for files in found for file in files], labels, left_out


def _is_class(path: Path) -> bool:
    if not path.is_dir() or path.name.startswith("."):
        return False
    is_text = path.name.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in path.name)
    require("source", path.name, is_text, "must have class folders with names in UTF-8")
    return True


def _scan(folder: Path) -> tuple[list[Path], list[Path]]:
    """The images of a folder and its sub-folders in their order, and other files.

    Files whose name starts with a dot are in neither; hidden sub-folders are searched like others.
    """
    images, others = [], []
    for path in sorted(folder.rglob("*")):
        if path.name.startswith("."):
            continue
        if path.suffix.lower() in SUFFIXES and path.is_file():
            images.append(path)
        elif not path.is_dir():
            others.append(path)
    return images, others


def _tell_left_out(folder: Path, left_out: list[Path]) -> None:
    names = [path.relative_to(folder).as_posix() for path in left_out]
    images = [name for name in names if name.lower().endswith(SUFFIXES)]
    others = [name for name in names if not name.lower().endswith(SUFFIXES)]
    if images:
        where = "outside the class folders or not regular files"
        logger.warning("source: images that are %s are left out: %s", where, listed(images, 3))
    if others:
        logger.info("source: files without the suffix of an image are left out: %s", listed(others, 3))


def _open(file: Path) -> Image.Image:
    """Open the image in `file`, upright, with a white background if transparent.

    Raises `ImageError` for a damaged file, `ValueError` if the disk or network fails.
    """
    try:
        with Image.open(file) as image:
            image = _in_eight_bits(ImageOps.exif_transpose(image))
            if not image.has_transparency_data:
                return image.convert("RGB")
            white = Image.new("RGBA", image.size, "white")
            return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises many types for damaged files, and one for too many pixels
        code = error.errno if isinstance(error, OSError) else None
        if code is not None and code not in LASTING:
            raise ValueError(f"{file}: cannot be read: {os.strerror(code)}") from error
        raise ImageError(str(file), _reason(error, file)) from error


def _reason(error: Exception, file: Path) -> str:
    """The first line of an error without the path, as it may be stored."""
    text = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else first_line(error)
    return shortened(text.replace(f" {str(file)!r}", ""))


def _in_eight_bits(image: Image.Image) -> Image.Image:
    """Reduce images with more bits to their upper eight, as Pillow does for 16-bit colour images.

    Integer and float images (modes I;16, I and F) would be clipped at 255 instead.
    """
    if image.mode in ("I", "F"):
        raise ValueError(f"has pixels of 32 bits (mode {image.mode}) with unknown range: save it with 8 or 16 bits")
    transparent = image.info.get("transparency")
    if image.mode.startswith("I;16"):
        values = np.asarray(image)
        grey = Image.fromarray((values >> 8).astype(np.uint8))
        if transparent is not None:
            grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
        return grey
    if image.mode == "RGB" and isinstance(transparent, tuple) and max(transparent) > 255:
        image.info["transparency"] = tuple(part >> 8 for part in transparent)  # not reduced by Pillow
    return image


MAX_ASPECT = 8
"""Up to this aspect ratio an image is resized and then cropped, as in ADM."""


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Crop the largest central square of `image` and resize it to `size` pixels, as ADM for ImageNet
    (openai/guided-diffusion).

    Box averages halve the image first, as a bicubic resize by more than two would alias. For very long images only the
    square is resized, as the full image might not fit into memory; the order of columns and rows may differ then.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    left, top = (width - size) // 2, (height - size) // 2
    if max(image.size) <= MAX_ASPECT * min(image.size):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        return image.crop((left, top, left + size, top + size))
    x, y = image.width / width, image.height / height
    square = (left * x, top * y, (left + size) * x, (top + size) * y)
    return image.resize((size, size), Image.Resampling.BICUBIC, box=square)
