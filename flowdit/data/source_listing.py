"""The listing of an image folder beside its data set, which names the files that changed since then.

`source_files.jsonl.gz`: a line with the key of the listing, then `[name, bytes, modified in ns]` for each file. A
million files take about 15 MB. It is written and read line by line.
"""

import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etils import epath

from flowdit.fields import listed
from flowdit.hashing import sha256

FILE_NAME = "source_files.jsonl.gz"
MAX_LINE = 2**16
"""Bytes. A longer line is no entry: paths have at most 4096 bytes."""
BUFFER = 2**20
DAMAGE = (OSError, EOFError, ValueError, RecursionError, zlib.error)
"""Errors of a file that is missing, cut or not such a listing."""


@dataclass(frozen=True)
class Listing:
    """The image files of a folder by their names within it, with (bytes, modified in ns) of each."""

    names: Sequence[str]
    stats: Sequence[tuple[int, int]]

    @classmethod
    def of(cls, files: Sequence[Path], names: Sequence[str]) -> "Listing":
        stats = [file.stat() for file in files]
        return cls(names, [(stat.st_size, stat.st_mtime_ns) for stat in stats])

    @property
    def key(self) -> str:
        """SHA-256 (hex) over names, sizes and times."""
        entries = zip(self.names, self.stats, strict=True)
        # Names in an encoding of the disk other than UTF-8 are hashed as their bytes.
        return sha256(f"{name}\0{size}\0{time}\n".encode(errors="surrogateescape") for name, (size, time) in entries)

    def write(self, folder: epath.Path, key: str) -> None:
        """Write the file into `folder` atomically, unless it holds this listing."""
        path = folder / FILE_NAME
        if _stored_key(path) == key:
            return
        temporary = path.with_name(path.name + ".tmp")
        with (
            temporary.open("wb") as raw,
            gzip.GzipFile("", "wb", 1, raw, mtime=0) as zipped,
            io.BufferedWriter(zipped, BUFFER) as file,  # type: ignore[arg-type]
        ):
            for entry in ([key], *([name, *stat] for name, stat in zip(self.names, self.stats, strict=True))):
                file.write(json.dumps(entry).encode() + b"\n")
        temporary.replace(path)

    def changes(self, folder: epath.Path, key: str) -> str | None:
        """What changed since the listing in `folder` was written: "1 added (red/new.png), 2 modified (a.png, b.png)".

        None if there is none of that key, it is damaged, or nothing changed.
        """
        path = folder / FILE_NAME
        if _stored_key(path) != key:
            return None
        now = dict(zip(self.names, self.stats, strict=True))
        seen = set()
        added = _Names()
        removed = _Names()
        modified = _Names()
        try:
            for name, *stat in _entries(path):
                if name not in now:
                    removed.add(name)
                elif name not in seen:
                    seen.add(name)
                    if now[name] != tuple(stat):
                        modified.add(name)
        except DAMAGE:
            return None
        for name in self.names:
            if name not in seen:
                added.add(name)
        counted = (("added", added), ("removed", removed), ("modified", modified))
        return ", ".join(f"{names.count} {what} ({names})" for what, names in counted if names.count) or None


class _Names:
    """The number of names and the first three of them."""

    def __init__(self) -> None:
        self.count, self.first = 0, []

    def add(self, name: str) -> None:
        self.count += 1
        if len(self.first) < 3:
            self.first.append(name)

    def __str__(self) -> str:
        return listed(self.first) + (", ..." if self.count > len(self.first) else "")


def _lines(path: epath.Path) -> Iterator[Any]:
    with path.open("rb") as raw, gzip.open(raw, "rb") as zipped, io.BufferedReader(zipped, BUFFER) as file:
        while line := file.readline(MAX_LINE):
            yield json.loads(line)


def _entries(path: epath.Path) -> Iterator[tuple[str, int, int]]:
    """The entries after the key. Raises `ValueError` for other content."""
    lines = _lines(path)
    next(lines)
    for entry in lines:
        if not isinstance(entry, list) or [type(part) for part in entry] != [str, int, int]:
            raise ValueError(f"{path}: must hold [name, bytes, time]")
        name, size, time = entry
        yield name, size, time


def _stored_key(path: epath.Path) -> Any:
    """The key of a listing, None if there is none or it is damaged."""
    try:
        entry = next(_lines(path), None)
    except DAMAGE:
        return None
    return entry[0] if isinstance(entry, list) and len(entry) == 1 else None
