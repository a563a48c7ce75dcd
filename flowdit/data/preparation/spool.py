"""A file of records that are written in one order and read in another."""

import tempfile
from collections.abc import Callable, Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any

from flowdit.data.records import encode
from flowdit.data.shards import Sums, Tally, latent_sums


class Spool:
    """Records in groups, in a file without a name, which ends with the process that wrote it.

    In memory are about 100 bytes for each record. Raises `OSError` if the disk is full.
    """

    def __init__(self, folder: Path, sums_of: Callable[[Mapping[str, Any]], Sums] = latent_sums):
        self._sums_of = sums_of
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - `close` is called by the context
        self._places: dict[Hashable, list[tuple[int, int]]] = {}
        self._tallies: dict[Hashable, Tally] = {}

    def __enter__(self) -> "Spool":
        return self

    def __exit__(self, *problem: object) -> None:
        self._file.close()

    def add(self, group: Hashable, record: Mapping[str, Any]) -> None:
        """Append a record to a group."""
        data = encode(record)
        self._places.setdefault(group, []).append((self._file.tell(), len(data)))
        self._tallies.setdefault(group, Tally(self._sums_of)).add(record)
        self._file.write(data)

    def tally(self, group: Hashable) -> Tally:
        """The number and sums of the records of a group."""
        return self._tallies.get(group, Tally())

    def records(self, group: Hashable) -> Iterator[bytes]:
        """The bytes of the records of a group, in the order in which they were added."""
        for start, size in self._places.get(group, ()):
            self._file.seek(start)
            yield self._file.read(size)
