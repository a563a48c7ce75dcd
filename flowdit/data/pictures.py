"""Pictures and their classes, before any VAE: the embedded OpenMoji set, or a folder with one sub-folder a class."""

import hashlib
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int
from PIL import Image, ImageOps

from flowdit.data import openmoji
from flowdit.data.manifest import file_sha256

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True)
class Pictures:
    """A labelled set of pictures that are opened one at a time; `key` changes whenever the pictures do."""

    name: str
    class_names: tuple[str, ...]
    labels: Int[np.ndarray, " pictures"]
    held_out: Bool[np.ndarray, " pictures"]
    open: Callable[[int], Image.Image]
    key: str
    license: str = ""
    attribution: str = ""


def load_pictures(source: str, held_out_fraction: float) -> Pictures:
    """The pictures of `source`: "openmoji" (whose held-out pictures are fixed) or a folder.

    Raises `ValueError` if there is no such folder, or it has no class sub-folders, or one of them has no picture.
    """
    if source == "openmoji":
        return _load_openmoji()
    if not 0 <= held_out_fraction < 1:
        raise ValueError(f"held_out_fraction: must be in [0, 1), got {held_out_fraction}")
    return _load_folder(Path(source), held_out_fraction)


def _load_openmoji() -> Pictures:
    data = openmoji.load()
    return Pictures(
        name="openmoji",
        class_names=data.class_names,
        labels=data.labels,
        held_out=data.held_out,
        open=lambda i: Image.fromarray(data.tiles[i]),
        key=" ".join(file_sha256(openmoji.FOLDER / name) for name in ("sheet.webp", "table.json")),
        license=openmoji.LICENSE,
        attribution=openmoji.ATTRIBUTION,
    )


def _load_folder(folder: Path, held_out_fraction: float) -> Pictures:
    if not folder.is_dir():
        raise ValueError(f"source: must be 'openmoji' or a folder of pictures, there is no folder {str(folder)!r}")
    classes = [path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    if not classes:
        raise ValueError(f"source: {folder} must have one sub-folder of pictures for each class, it has no sub-folders")
    files, labels = [], []
    for label, class_folder in enumerate(classes):
        found = list(_picture_files(class_folder))
        if not found:
            raise ValueError(f"source: class folder {class_folder} has no pictures ({' '.join(SUFFIXES)})")
        files += found
        labels += [label] * len(found)
    names = [file.relative_to(folder).as_posix() for file in files]
    return Pictures(
        name=folder.resolve().name,
        class_names=tuple(path.name for path in classes),
        labels=np.array(labels),
        held_out=np.array([zlib.crc32(name.encode()) < held_out_fraction * 2**32 for name in names]),
        open=lambda i: _open(files[i]),
        key=_listing_hash(files, names),
    )


def _picture_files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file():
            yield path


def _listing_hash(files: list[Path], names: list[str]) -> str:
    digest = hashlib.sha256()
    for file, name in zip(files, names, strict=True):
        stat = file.stat()
        digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _open(file: Path) -> Image.Image:
    """The picture in `file`, upright and on white where it is transparent."""
    try:
        with Image.open(file) as image:
            image = ImageOps.exif_transpose(image)
            if not image.has_transparency_data:
                return image.convert("RGB")
            white = Image.new("RGBA", image.size, "white")
            return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    except Exception as error:  # Pillow's decoders raise many types on damaged files
        raise ValueError(f"{file}: cannot be read as a picture: {error}") from error


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The largest central square of `image` at `size` pixels, as ADM crops ImageNet (openai/guided-diffusion).

    Halving by box averages comes first, because a bicubic resize by more than two would alias.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))
