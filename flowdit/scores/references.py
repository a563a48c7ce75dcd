"""The real images that generated ones are compared with: a source of images, a data set, or a `.npz` file."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, UInt8
from PIL import Image

from flowdit.data.images import ImageError, center_crop, open_image
from flowdit.data.loader import Batch, Source, open_split
from flowdit.data.manifest import FILE_NAME, Manifest
from flowdit.data.mirror import provide_shards
from flowdit.data.origin import columns_of
from flowdit.data.preparation.threads import read_ahead
from flowdit.data.rejected import Rejected
from flowdit.data.schema import CAPTION_FIELDS, LabelField, record_schema
from flowdit.data.sources import SOURCES, open_images
from flowdit.data.sources.base import Row, in_class_order
from flowdit.data.sources.base import Source as ImageSource
from flowdit.data.sources.config import SourceConfig
from flowdit.fields import FieldError, about, require, require_choice
from flowdit.hashing import file_sha256, sha256
from flowdit.score_config import SPLITS
from flowdit.scores.archive import Archive, open_archive
from flowdit.scores.moments import Moments
from flowdit.scores.selection import Where
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
    name: str,
    model: Manifest,
    decode: Decode,
    *,
    split: str = "train",
    resize: bool = False,
    where: Mapping[str, Any] | None = None,
) -> Reference:
    """Open the images or statistics that a model's images are compared with.

    Args:
        name: folder with `dataset.json`, images as `prepare` reads them (a folder, tars, `openmoji`), or `.npz` file.
        model: the data description of the model: the size of its images, and its VAE.
        decode: from raw latents, as on disk, to images, with the VAE of the model; used for a data set.
        split: of a data set: "train", "validation" or "all".
        resize: crop and resize images of another size, as `prepare` does. Otherwise they are refused.
        where: only images with these values of kept columns (`selection.Where`).

    Raises:
        FieldError: "reference": there is nothing at `name`, it cannot be read, or its images are of another size, number
            of channels or VAE than the model's. "reference_split": another name, or no images in it.
            "where": no image is chosen, or the images have no columns.
    """
    require_choice("reference_split", split, SPLITS)
    size = (model.vae.stride * model.latent_shape[1], model.vae.stride * model.latent_shape[2])
    chosen = Where(where)
    with about("reference"):
        if name.endswith(".npz"):
            require("where", where, not chosen, "must be null for an .npz file, which has no columns")
            return _open_archive(Path(name), size, resize)
        if name.partition(":")[0] in SOURCES:
            return _open_images(name, size, resize, chosen)
        folder = connect(name)
        if (folder / FILE_NAME).is_file():
            return _open_records(name, model, decode, split, chosen)
        rule = f"must be images as prepare reads them, a data set with {FILE_NAME}, or a .npz file"
        require("reference", name, Path(name).exists(), rule)
        return _open_images(name, size, resize, chosen)


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


def _open_images(name: str, size: tuple[int, int], resize: bool, where: Where) -> Reference:
    try:
        source = open_images(SourceConfig(source=name, held_out_fraction=0.0, keep_columns=list(where.values)))
        facts = _survey(source, size, resize, where)
    except ValueError as error:
        if isinstance(error, FieldError) and error.field == "keep_columns":
            raise FieldError("where", error.problem) from error
        raise FieldError("reference", re.sub("^(source|reference): ", "", str(error))) from error
    where.check_found(len(facts.keys), name)
    class_names = in_class_order(facts.labels) if source.class_names is None else source.class_names
    numbers = {label: number for number, label in enumerate(class_names)}
    return Reference(
        description=f"{len(facts.keys)} images of {name}{where}",
        identity=f"images {facts.identity} at {size}",
        count=len(facts.keys),
        images=lambda batch_size: _source_images(_rows(source, where), batch_size, size, resize),
        labels=(lambda: np.array([numbers[label] for label in facts.labels], np.int32)) if facts.labels else None,
        class_names=class_names,
        captions=(lambda: facts.captions) if facts.captions else None,
    )


class _Facts(NamedTuple):
    """What a source holds besides pixels, and a hash of names and bytes: a copy of a folder has the same features."""

    keys: list[str]
    labels: list[str]
    captions: list[str]
    identity: str


def _survey(source: ImageSource, size: tuple[int, int], resize: bool, where: Where) -> _Facts:
    facts = _Facts([], [], [], "")
    digests = []
    for row in _rows(source, where):
        if not facts.keys:
            _fitted(row, size, resize)  # an error of all images is found before anything is drawn
        facts.keys.append(row.key)
        digests.append(f"{row.key}\0{sha256([bytes(row.image)])}\n".encode(errors="surrogateescape"))
        facts.labels.extend([row.label] if row.label is not None else [])
        facts.captions.extend([row.captions[0] or row.captions[1]] if row.captions else [])
    return facts._replace(identity=sha256(digests))


def _rows(source: ImageSource, where: Where) -> Iterator[Row]:
    """The chosen images of a source, in the order of its units. Raises `ValueError` for one that cannot be read."""
    for unit in source.units():
        for _, row in source.read(unit):
            if isinstance(row, Rejected):
                raise ValueError(f"{row.file}: cannot be read as an image: {row.reason}")
            if where.fits(row.columns):
                yield row


def _source_images(rows: Iterator[Row], batch_size: int, size: tuple[int, int], resize: bool) -> Iterator[Images]:
    pixels = read_ahead(lambda row: _fitted(row, size, resize), rows, 2 * batch_size)
    while batch := list(itertools.islice(pixels, batch_size)):
        yield np.stack(batch)


def _fitted(row: Row, size: tuple[int, int], resize: bool) -> UInt8[np.ndarray, "height width 3"]:
    """The pixels of an image in the model's size. Raises `ValueError` if it has another one or cannot be read."""
    try:
        image = open_image(row.image)
    except ImageError as error:
        raise FieldError("reference", f"{row.key}: cannot be read as an image: {error}") from error
    _check_size((image.height, image.width), size, resize, row.key)
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


def _open_records(name: str, model: Manifest, decode: Decode, split: str, where: Where) -> Reference:
    manifest = Manifest.read(name)
    _check_latents(name, manifest, model)
    splits = [part for part in ("train", "validation") if split in (part, "all") and manifest.num_records(part)]
    require("reference_split", split, len(splits) > 0, f"must be a split of {name} that has images")
    folder = provide_shards(name, [shard for part in splits for shard in manifest.shards_of(part)], None)
    labelled = {"label": LabelField(manifest.num_classes)} if manifest.num_classes else {}
    captioned = CAPTION_FIELDS if manifest.has_captions else {}
    schema = record_schema(manifest.latent_shape, {**labelled, **captioned}, manifest.has_latent_std)
    by_shape = [open_split(folder, manifest, part, schema=schema) for part in splits]
    sources = [found[model.latent_shape] for found in by_shape if model.latent_shape in found]
    rule = f"must be a split of {name} that has images of the model's size"
    require("reference_split", split, len(sources) > 0, rule)
    chosen = [_Chosen(source, _rows_of(source, where)) for source in sources]
    count = sum(len(part.rows) for part in chosen)
    where.check_found(count, f"the {split} split of {name}")

    def labels() -> Int32[np.ndarray, " n"]:
        return np.concatenate([batch["label"] for batch in _batches(chosen)])

    @functools.cache
    def captions() -> list[str]:
        pairs = [zip(batch["short_caption"], batch["long_caption"], strict=True) for batch in _batches(chosen)]
        return [short or long for batch in pairs for short, long in batch]

    part = f"{f' of {list(model.latent_shape)}' if manifest.buckets else ''}{where}"
    return Reference(
        description=f"{count} images of {name}, {split} split, decoded from latents{part}",
        identity=f"records {manifest.id} {split}{part}, decoded by {manifest.vae.fingerprint}",
        count=count,
        images=lambda batch_size: (decode(batch["latent"]) for batch in _batches(chosen, batch_size)),
        labels=labels if labelled else None,
        class_names=manifest.class_names,
        captions=captions if captioned else None,
    )


def _check_latents(name: str, manifest: Manifest, model: Manifest) -> None:
    """Raise `FieldError` unless the VAE of the model decodes some of the latents to images of the model's size."""
    stride, theirs = model.vae.stride, manifest.vae.stride
    if stride != theirs or model.latent_shape not in manifest.bucket_shapes:
        ours, *found = (" x ".join(map(str, shape)) for shape in (model.latent_shape, *manifest.bucket_shapes))
        rule = f"must have latents of {ours} with stride {stride}, as the model draws"
        raise FieldError("reference", f"{rule}, {name} has {' or '.join(found)} with stride {theirs}")
    prints = [data.vae.fingerprint for data in (model, manifest)]
    if all(prints) and prints[0] != prints[1]:
        rule = f"must have latents of the model's VAE (fingerprint {prints[0]})"
        raise FieldError("reference", f"{rule}, those of {name} are of {prints[1]}")


class _Chosen(NamedTuple):
    """Records of a source, by their indices."""

    source: Source
    rows: Sequence[int]


def _rows_of(source: Source, where: Where) -> Sequence[int]:
    """The indices of the records that are chosen."""
    every = range(len(source))
    if not where:
        return every
    batches = (every[start : start + RECORDS_AT_ONCE] for start in range(0, len(every), RECORDS_AT_ONCE))
    return [
        i
        for some in batches
        for i, record in zip(some, source.read(some), strict=True)
        if where.fits(columns_of(record))
    ]


def _batches(chosen: Sequence[_Chosen], batch_size: int = RECORDS_AT_ONCE) -> Iterator[Batch]:
    for source, rows in chosen:
        for start in range(0, len(rows), batch_size):
            yield source.read_batch(rows[start : start + batch_size])
