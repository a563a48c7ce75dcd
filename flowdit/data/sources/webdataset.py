"""WebDataset tars as a source: each tar is a unit."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from flowdit.data.records import RecordError
from flowdit.data.rejected import Rejected
from flowdit.data.source_listing import Listing
from flowdit.data.sources.base import MAX_FILE_BYTES, Row, Unit
from flowdit.data.sources.columns import Columns, choice, too_large
from flowdit.data.sources.config import SourceConfig
from flowdit.data.sources.files import File, find, opened, reading, source_name
from flowdit.data.sources.side_files import SEEN_FIRST, text_values
from flowdit.data.sources.tar_members import TAR_SUFFIXES, Sample, is_image, safe_name, samples
from flowdit.data.sources.units import unit_name
from flowdit.fields import listed, require


@dataclass
class TarSource:
    """The samples of tars. `image_column` is the suffix of the images, or "" for the only image of a sample."""

    files: Sequence[File]
    image_column: str
    columns: Columns
    name: str
    class_names: tuple[str, ...] | None
    has_captions: bool
    key: str
    listing: Listing | None
    license: str = ""
    attribution: str = ""

    def units(self) -> Sequence[Unit]:
        count = len(self.files)
        return [Unit(unit_name(i, count), None, i) for i in range(count)]

    def read(self, unit: Unit, rows: Collection[int] | None = None) -> Iterator[tuple[int, Row | Rejected]]:
        """The samples of a tar. Raises `ValueError` for one that is damaged."""
        file = self.files[unit.part]
        wants = (lambda number: True) if rows is None else set(rows).__contains__
        with reading(file.path), opened(file.path) as stream:
            for sample in samples(stream, file.path, wants, self._reads):
                yield sample.number, self._row(file, sample)

    def _reads(self, suffix: str) -> bool:
        if is_image(suffix):
            return not self.image_column or suffix == self.image_column
        return suffix in self.columns.names or _is_json(suffix)

    def _row(self, file: File, sample: Sample) -> Row | Rejected:
        key = f"{_stem(file.name)}/{safe_name(sample.name)}"
        images = [suffix for suffix in sample.images if self.image_column in ("", suffix)]
        if len(images) > 1:
            return Rejected(key, f"has {len(images)} images ({listed(images)}), of which image_column must name one")
        if images and sample.sizes[images[0]] > MAX_FILE_BYTES:
            return Rejected(key, too_large(sample.sizes[images[0]]))
        try:
            values = _values(sample, self.columns.names)
        except RecordError as problem:
            return Rejected(key, str(problem))
        return self.columns.row(key, sample.contents[images[0]] if images else None, values)


def open_tars(path: str, config: SourceConfig, numbers: Collection[str]) -> TarSource:
    """The tars that `path` names. Raises `ValueError` if there are none, and for columns that the first samples lack."""
    require("captions", config.captions, not config.captions, "must be empty for tars, which have their own")
    require("split", config.split, not config.split, "must be empty for tars: name those of the split")
    found = find(path)
    files = [file for file in found.files if file.name.lower().endswith(TAR_SUFFIXES)]
    if not files:
        raise ValueError(f"source: {path} has no tars ({' '.join(TAR_SUFFIXES)})")
    first = files[0].path
    with reading(first), opened(first) as stream:
        seen = list(islice(samples(stream, first, lambda number: True, _is_json), SEEN_FIRST))
    suffixes = dict.fromkeys(suffix for sample in seen for suffix in sample.sizes)
    if not any(map(is_image, suffixes)):
        raise ValueError(f"source: the first files of {first} must have an image, they are {listed(list(suffixes))}")
    image_column = choice("image_column", config.image_column.lower(), (), suffixes, first)
    there = dict.fromkeys(suffix for suffix in suffixes if not is_image(suffix) and not _is_json(suffix))
    for sample in seen:
        there |= dict.fromkeys(_values_if_any(sample))
    columns = Columns.choose(config, numbers, there, first)
    listing = Listing([file.name for file in files], [(file.size, file.changed) for file in files])
    return TarSource(
        files=files,
        image_column=image_column,
        columns=columns,
        name=source_name(path, found.folder),
        class_names=None if columns.label else (),
        has_captions=bool(columns.caption),
        key=listing.key,
        listing=listing,
    )


def _values(sample: Sample, names: Collection[str]) -> dict[str, Any]:
    """The texts and fields of a sample that `names` need. Raises `RecordError`."""
    needed = [suffix for suffix in sample.sizes if suffix in names or (_is_json(suffix) and names)]
    for suffix in needed:
        if suffix not in sample.contents:
            raise RecordError(f".{suffix}: has {sample.sizes[suffix]} bytes, too many for a text")
    return text_values({suffix: sample.contents[suffix] for suffix in needed})


def _values_if_any(sample: Sample) -> dict[str, Any]:
    try:
        return _values(sample, ("json",))
    except RecordError:
        return {}


def _is_json(suffix: str) -> bool:
    return suffix.rpartition(".")[2] == "json"


def _stem(name: str) -> str:
    return next(name[: -len(suffix)] for suffix in TAR_SUFFIXES if name.lower().endswith(suffix))
