"""The embedded OpenMoji images as a source."""

import functools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from flowdit.data import openmoji
from flowdit.data.captions import captions_key
from flowdit.data.rejected import Rejected
from flowdit.data.source_listing import Listing
from flowdit.data.sources.base import Row, Unit
from flowdit.data.sources.config import SourceConfig
from flowdit.data.sources.units import shuffled_units
from flowdit.fields import require
from flowdit.hashing import file_sha256


@dataclass
class OpenMojiSource:
    """The embedded images with their classes and captions; which of them are held out is fixed."""

    records_per_shard: int | None
    class_names: tuple[str, ...] | None
    key: str
    captions_key: str | None
    name: str = "openmoji"
    has_captions: bool = True
    license: str = openmoji.LICENSE
    attribution: str = openmoji.ATTRIBUTION
    listing: Listing | None = None

    def units(self) -> Sequence[Unit]:
        return list(shuffled_units(_load().held_out, 0.0, self.records_per_shard))

    def read(self, unit: Unit, rows: Collection[int] | None = None) -> Iterator[tuple[int, Row | Rejected]]:
        data = _load()
        for number, index in enumerate(unit.part.tolist()):
            if rows is None or number in rows:
                label = data.class_names[data.labels[index]]
                yield number, Row(data.names[index], data.tiles[index], label, data.captions[index])


@functools.cache
def _load() -> openmoji.OpenMoji:
    return openmoji.load()


def open_openmoji(path: str, config: SourceConfig, numbers: Collection[str]) -> OpenMojiSource:
    """The embedded images. Raises `FieldError` for settings of other sources."""
    require("source", config.source, not path, "must be openmoji, which is embedded, without a path")
    require("captions", config.captions, not config.captions, "must be empty for source=openmoji, which has its own")
    for name in ("split", "image_column", "label_column", "caption_column", "long_caption_column", "key_column"):
        value = getattr(config, name)
        require(name, value, not value, "must be empty for source=openmoji, which has no columns")
    require("keep_columns", config.keep_columns, not config.keep_columns, "must be empty for source=openmoji")
    require("filter.min_columns", list(numbers), not numbers, "must be empty for source=openmoji")
    data = _load()
    key = " ".join(file_sha256(openmoji.FOLDER / name) for name in ("sheet.webp", "table.json"))
    return OpenMojiSource(config.records_per_shard, data.class_names, key, captions_key(data.captions))
