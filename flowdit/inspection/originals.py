"""Finding the images that records were made of, by their keys."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from flowdit.data.images import ImageError, cover_crop, open_image
from flowdit.data.preparation.scan import content_hash, shown_key
from flowdit.data.progress import progress_bar
from flowdit.data.sources import open_images
from flowdit.data.sources.base import MAX_FILE_BYTES, Row, Source, Unit
from flowdit.data.sources.config import SourceConfig
from flowdit.fields import called
from flowdit.inspection.survey import Example

logger = logging.getLogger(__name__)


class Original(NamedTuple):
    """The crop of an original that the latent shows; None with the reason if there is none."""

    pixels: UInt8[np.ndarray, "height width 3"] | None
    problem: str = ""


class Originals:
    """The images that a data set was made of. A file of a local folder is opened by its name.

    Other sources are read until all are found, first the parts that have the names of the records' shards. Raises
    `ValueError` for one that cannot be opened.
    """

    def __init__(self, source: str):
        self._name = source
        self._folder = Path(source.removeprefix("folder:"))
        self._source = None if self._folder.is_dir() else self._open()

    def find(self, examples: Iterable[Example], stride: int) -> dict[str, Original]:
        """The originals of records, by key, cropped as for their latents. `stride` is that of the VAE."""
        wanted = {str(example.record["key"]): example for example in examples if "key" in example.record}
        found: dict[str, Original] = {}
        for row in self._rows(wanted):
            key = shown_key(row.key)
            found[key] = _original(row, wanted[key].record, stride)
        return {key: found.get(key, Original(None, f"not in {self._name}")) for key in wanted}

    def _open(self) -> Source:
        with called({"source": "originals"}):
            return open_images(SourceConfig(source=self._name))

    def _rows(self, wanted: Mapping[str, Example]) -> Iterator[Row]:
        """The rows with the keys that are wanted, each once."""
        missing = dict(wanted)
        for key in wanted if self._source is None else ():
            if (image := _file_in(self._folder, key)) is not None:
                del missing[key]
                yield Row(key, image)
        if not missing:
            return
        source = self._source or self._open()
        with progress_bar("looking for originals", "images", len(wanted), len(missing)) as progress:
            for unit in _units(source, {example.file for example in missing.values()}):
                for _, row in source.read(unit):
                    key = shown_key(row.key) if isinstance(row, Row) else row.file
                    if missing.pop(key, None) is not None:
                        progress.update()
                        if isinstance(row, Row):
                            yield row
                    if not missing:
                        return


def oriented(example: Example, original: Original) -> Original:
    """The original as the record shows it, which may be a mirrored copy."""
    if original.pixels is None or not example.record.get("mirrored"):
        return original
    return Original(original.pixels[:, ::-1])


def _file_in(folder: Path, key: str) -> bytes | None:
    """The bytes of a file of the folder. A key is untrusted: it must not point outside."""
    path = PurePosixPath(key)
    if path.is_absolute() or ".." in path.parts:
        return None
    file = folder / path
    try:
        return file.read_bytes() if file.is_file() and file.stat().st_size <= MAX_FILE_BYTES else None
    except (OSError, ValueError):
        return None


def _units(source: Source, files: set[str]) -> list[Unit]:
    """The units of the shards first, as these were made of them."""
    units = source.units()
    likely = [any(unit.file(split) in files for split in ("train", "validation")) for unit in units]
    return [unit for unit, is_first in sorted(zip(units, likely, strict=True), key=lambda item: not item[1])]


def _original(row: Row, record: Mapping[str, Any], stride: int) -> Original:
    if "content_hash" in record and content_hash(row) != record["content_hash"]:
        return Original(None, "has changed since")
    height, width = (stride * side for side in record["latent"].shape[1:])
    try:
        return Original(np.asarray(cover_crop(open_image(row.image), height, width)))
    except ImageError as problem:
        return Original(None, str(problem))
