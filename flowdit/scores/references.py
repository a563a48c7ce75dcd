"""The real images that generated ones are compared with: a folder of images, a data set, or a `.npz` file."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import grain
import numpy as np
from jaxtyping import Float32, Int32, UInt8
from PIL import Image

from flowdit.data.encode_images import READ_OPTIONS
from flowdit.data.images import SOURCES, ImageSet, center_crop, load_images
from flowdit.data.loader import Batch, Source, open_source
from flowdit.data.manifest import FILE_NAME, Manifest
from flowdit.data.mirror import provide_shards
from flowdit.data.schema import CAPTION_FIELDS, LabelField, record_schema
from flowdit.fields import FieldError, about, require, require_choice
from flowdit.hashing import file_sha256, sha256
from flowdit.score_config import SPLITS
from flowdit.scores.archive import Archive, open_archive
from flowdit.scores.moments import Moments
from flowdit.storage import connect

Images = UInt8[np.ndarray, "n height width 3"]
Decode = Callable[[Float32[np.ndarray, "n c h w"]], Images]
RECORDS_AT_ONCE = 256
MAX_PIXELS = 2048**2
"""Of an image in a `.npz` file, as a batch of them is in memory."""


@dataclass(frozen=True)
class Reference:
    """Real images, or statistics of their features, or both.

    Attributes:
        description: what it is, for the result: kind, path, split.
        identity: hash of the content and of all that changes the pixels; features are cached by it.
        count: images; 0 if there are only statistics.
        images: (batch size) -> batches of them in a fixed order, of at most this size; None: there are only statistics.
        statistics: moments of Inception features; None: they have to be computed from the images.
        labels: reads the class of every image; None: there are no classes.
        class_names: the names of those classes, by number.
        captions: reads the caption of every image, the short one unless it is empty; None: there are no captions.
    """

    description: str
    identity: str
    count: int
    images: Callable[[int], Iterator[Images]] | None = None
    statistics: Moments | None = None
    labels: Callable[[], Int32[np.ndarray, " n"]] | None = None
    class_names: tuple[str, ...] = ()
    captions: Callable[[], list[str]] | None = None


def open_reference(
    name: str, model: Manifest, decode: Decode, *, split: str = "train", resize: bool = False
) -> Reference:
    """Open the images or statistics that a model's images are compared with.

    Args:
        name: folder with `dataset.json`, folder of images (or `openmoji`) as `prepare` reads them, or `.npz` file.
        model: the data description of the model: the size of its images, and its VAE.
        decode: from raw latents, as on disk, to images, with the VAE of the model; used for a data set.
        split: of a data set: "train", "validation" or "all".
        resize: crop and resize images of another size, as `prepare` does. Otherwise they are refused.

    Raises:
        FieldError: "reference": there is nothing at `name`, it cannot be read, or its images are of another size, number
            of channels or VAE than the model's. "reference_split": another name, or no images in it.
    """
    require_choice("reference_split", split, SPLITS)
    size = (model.vae.stride * model.latent_shape[1], model.vae.stride * model.latent_shape[2])
    with about("reference"):
        if name.endswith(".npz"):
            return _open_archive(Path(name), size, resize)
        if name in SOURCES:
            return _open_images(name, size, resize)
        folder = connect(name)
        if (folder / FILE_NAME).is_file():
            return _open_records(name, model, decode, split)
        rule = f"must be a folder of images, a data set with {FILE_NAME}, or a .npz file of statistics or images"
        require("reference", name, Path(name).is_dir(), rule)
        return _open_images(name, size, resize)


def _open_archive(path: Path, size: tuple[int, int], resize: bool) -> Reference:
    require("reference", str(path), path.is_file(), "must be an existing .npz file")
    archive = open_archive(path)
    identity = f"npz {file_sha256(path)}"
    if archive.shape is None:
        return Reference(f"statistics in {path}", identity, 0, statistics=archive.statistics)
    count, *found = archive.shape
    pixels = found[0] * found[1]
    require("arr_0", tuple(found[:2]), pixels <= MAX_PIXELS, f"must be images of at most {MAX_PIXELS} pixels")
    _check_size(tuple(found[:2]), size, resize, str(path))
    return Reference(
        description=f"{count} images in {path}" + ("" if archive.statistics is None else ", with statistics"),
        identity=f"{identity} at {size}",
        count=count,
        images=lambda batch_size: _archive_images(archive, batch_size, size),
        statistics=archive.statistics,
    )


def _archive_images(archive: Archive, batch_size: int, size: tuple[int, int]) -> Iterator[Images]:
    for batch in archive.images(batch_size):
        if batch.shape[1:3] == size:
            yield batch
        else:
            yield np.stack([np.asarray(center_crop(Image.fromarray(image), size[0])) for image in batch])


def _open_images(name: str, size: tuple[int, int], resize: bool) -> Reference:
    try:
        images = load_images(name, held_out_fraction=0.0)
    except ValueError as error:
        raise FieldError("reference", str(error).removeprefix("source: ")) from error
    _fitted(images, 0, size, resize)
    count, labels = len(images.held_out), images.labels
    return Reference(
        description=f"{count} images of {name}",
        identity=f"images {_content(name, images)} at {size}",
        count=count,
        images=lambda batch_size: _folder_images(images, batch_size, size, resize),
        labels=None if labels is None else lambda: labels.astype(np.int32),
        class_names=images.class_names,
        captions=None if (texts := images.captions) is None else lambda: [short or long for short, long in texts],
    )


def _content(name: str, images: ImageSet) -> str:
    """A hash of names and bytes of the files, so that a copy of the folder has the same features."""
    if images.listing is None:
        return sha256(images.key)
    entries = (f"{file}\0{file_sha256(Path(name) / file)}\n" for file in images.listing.names)
    return sha256(entry.encode(errors="surrogateescape") for entry in entries)


def _folder_images(images: ImageSet, batch_size: int, size: tuple[int, int], resize: bool) -> Iterator[Images]:
    count = len(images.held_out)
    starts = range(0, count, batch_size)

    def read(start: int) -> Images:
        return np.stack([_fitted(images, i, size, resize) for i in range(start, min(start + batch_size, count))])

    yield from grain.MapDataset.range(len(starts)).map(lambda i: read(starts[i])).to_iter_dataset(READ_OPTIONS)


def _fitted(images: ImageSet, index: int, size: tuple[int, int], resize: bool) -> UInt8[np.ndarray, "height width 3"]:
    """The pixels of an image in the model's size. Raises `ValueError` if it has another one or cannot be read."""
    image = images.open(index)
    _check_size((image.height, image.width), size, resize, images.name_of(index))
    return np.asarray(image if (image.height, image.width) == size else center_crop(image, size[0]))


def _check_size(found: tuple[int, ...], size: tuple[int, int], resize: bool, where: str) -> None:
    if found == size:
        return
    rule = f"must have images of {size[1]} x {size[0]} pixels, as the model draws"
    value = f"{found[1]} x {found[0]} in {where}"
    if size[0] != size[1]:  # `prepare` crops to squares
        raise FieldError("reference", f"{rule}, got {value}")
    if not resize:
        raise FieldError("reference", f"{rule}, got {value}; reference_resize=true crops and resizes as prepare does")


def _open_records(name: str, model: Manifest, decode: Decode, split: str) -> Reference:
    manifest = Manifest.read(name)
    _check_latents(name, manifest, model)
    splits = [part for part in ("train", "validation") if split in (part, "all") and manifest.num_records(part)]
    require("reference_split", split, len(splits) > 0, f"must be a split of {name} that has images")
    folder = provide_shards(name, [shard for part in splits for shard in manifest.shards_of(part)], None)
    labelled = {"label": LabelField(manifest.num_classes)} if manifest.num_classes else {}
    captioned = CAPTION_FIELDS if manifest.has_captions else {}
    schema = record_schema(manifest.latent_shape, {**labelled, **captioned}, manifest.has_latent_std)
    sources = [open_source(folder, manifest, part, schema=schema) for part in splits]
    count = sum(len(source) for source in sources)

    def labels() -> Int32[np.ndarray, " n"]:
        return np.concatenate([batch["label"] for batch in _batches(sources)])

    @functools.cache
    def captions() -> list[str]:
        pairs = [zip(batch["short_caption"], batch["long_caption"], strict=True) for batch in _batches(sources)]
        return [short or long for batch in pairs for short, long in batch]

    return Reference(
        description=f"{count} images of {name}, {split} split, decoded from latents",
        identity=f"records {manifest.id} {split}, decoded by {manifest.vae.fingerprint}",
        count=count,
        images=lambda batch_size: (decode(batch["latent"]) for batch in _batches(sources, batch_size)),
        labels=labels if labelled else None,
        class_names=manifest.class_names,
        captions=captions if captioned else None,
    )


def _check_latents(name: str, manifest: Manifest, model: Manifest) -> None:
    """Raise `FieldError` unless the VAE of the model decodes the latents to images of the model's size."""
    ours, theirs = ((data.vae.stride, *data.latent_shape) for data in (model, manifest))
    if theirs != ours:
        stride, channels, height, width = ours
        rule = f"must have latents of {channels} x {height} x {width} with stride {stride}, as the model draws"
        found = f"{theirs[1]} x {theirs[2]} x {theirs[3]} with stride {theirs[0]}"
        raise FieldError("reference", f"{rule}, {name} has {found}")
    prints = [data.vae.fingerprint for data in (model, manifest)]
    if all(prints) and prints[0] != prints[1]:
        rule = f"must have latents of the model's VAE (fingerprint {prints[0]})"
        raise FieldError("reference", f"{rule}, those of {name} are of {prints[1]}")


def _batches(sources: Sequence[Source], batch_size: int = RECORDS_AT_ONCE) -> Iterator[Batch]:
    for source in sources:
        for start in range(0, len(source), batch_size):
            yield source.read_batch(range(start, min(start + batch_size, len(source))))
