"""Finding equal hashes among any number of rows, with memory for a part of them: the others are on disk."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt64

ROWS_AT_ONCE = 2**16
"""About as many hashes are in memory at a time: 3 MB with what sorting them takes."""
MAX_PARTS = 256
"""Files; above 17 million rows they become larger."""
_ENTRY = np.dtype([("high", "<u8"), ("low", "<u8"), ("position", "<u8")])


class Repeats(NamedTuple):
    """Positions of rows, and for each the position of the first row with the same hash, which comes before it."""

    positions: Int[np.ndarray, " n"]
    firsts: Int[np.ndarray, " n"]


class HashTable:
    """Hashes of 16 bytes by the position of their row, on disk within `folder`, sorted into parts by their first bits.

    Use it as a context: the files are removed at its end.
    """

    def __init__(self, folder: Path, num_rows: int):
        self._parts = min(max(-(-num_rows // ROWS_AT_ONCE), 1), MAX_PARTS)
        self._folder = tempfile.TemporaryDirectory(dir=folder, prefix="hashes-")

    def __enter__(self) -> "HashTable":
        return self

    def __exit__(self, *problem: object) -> None:
        self._folder.cleanup()

    def _path(self, part: int) -> Path:
        return Path(self._folder.name) / str(part)

    def add(self, hashes: UInt64[np.ndarray, "n 2"], positions: Int[np.ndarray, " n"]) -> None:
        """Add rows, in ascending order of all positions."""
        entries = np.empty(len(hashes), _ENTRY)
        entries["high"], entries["low"] = hashes.T
        entries["position"] = positions
        parts = entries["high"] % np.uint64(self._parts)
        for part in np.unique(parts).tolist():
            with self._path(part).open("ab") as file:
                file.write(entries[parts == part].tobytes())

    def repeats(self) -> Iterator[Repeats]:
        """The rows whose hash an earlier row has, a part of them at a time."""
        for part in range(self._parts):
            if self._path(part).exists():
                yield _repeats(np.fromfile(self._path(part), _ENTRY))


def _repeats(entries: np.ndarray) -> Repeats:
    entries = entries[np.lexsort((entries["position"], entries["low"], entries["high"]))]
    is_first = np.ones(len(entries), bool)
    is_first[1:] = (np.diff(entries["high"]) != 0) | (np.diff(entries["low"]) != 0)
    positions = entries["position"].astype(np.int64)
    firsts = positions[np.flatnonzero(is_first)[np.cumsum(is_first) - 1]]
    return Repeats(positions[~is_first], firsts[~is_first])
