"""A source for tests: rows in a list."""

import io
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from flowdit.data.rejected import Rejected
from flowdit.data.source_listing import Listing
from flowdit.data.sources import register_source
from flowdit.data.sources.base import Row, Unit


def picture(width: int, height: int, seed: int, kind: str = "PNG") -> bytes:
    """An image of noise in a colour of its own."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 60, (height, width, 3)) + rng.integers(0, 190, 3)
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, kind)
    return buffer.getvalue()


@dataclass
class ListSource:
    """Rows in units of `size`, of which each has both splits. `asked` counts the rows that were read."""

    rows: Sequence[Row | Rejected]
    size: int = 8
    class_names: tuple[str, ...] | None = None
    has_captions: bool = False
    key: str = "list"
    name: str = "list"
    license: str = ""
    attribution: str = ""
    listing: Listing | None = None
    asked: list[int] = field(default_factory=list)

    def units(self) -> Sequence[Unit]:
        count = -(-len(self.rows) // self.size)
        return [Unit(f"{i:05d}-of-{count:05d}", None, i * self.size) for i in range(count)]

    def read(self, unit: Unit, rows: Collection[int] | None = None) -> Iterator[tuple[int, Row | Rejected]]:
        for number, row in enumerate(self.rows[unit.part : unit.part + self.size]):
            if rows is None or number in rows:
                self.asked.append(unit.part + number)
                yield number, row


def as_source(monkeypatch, source: ListSource) -> str:
    """The value of `source` that gives this one."""
    monkeypatch.setattr("flowdit.data.sources.SOURCES", {})
    register_source("list", lambda path, config, numbers: source)
    return "list:"
