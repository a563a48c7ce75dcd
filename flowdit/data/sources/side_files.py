"""Small files that belong to an image by their name: `001.txt`, `001.json`, `001.cls` beside `001.jpg`."""

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import PurePosixPath
from typing import Any

from flowdit.data.records import RecordError
from flowdit.data.rejected import Rejected
from flowdit.data.sources.base import Row
from flowdit.data.sources.columns import MAX_TEXT_BYTES, Columns
from flowdit.data.sources.config import SourceConfig
from flowdit.data.sources.files import read_whole
from flowdit.fields import shortened

TEXT_SUFFIXES = ("txt", "caption", "cls", "json")
SEEN_FIRST = 8
"""Images whose files are read to see which columns there are."""


@dataclass(frozen=True)
class SideFiles:
    """The columns of the files beside the images of a folder; `names` are those files."""

    folder: str
    names: frozenset[str]
    columns: Columns

    def row(self, name: str, key: str, image: bytes) -> Row | Rejected:
        """The row of the image `name`. Raises `OSError`."""
        try:
            return self.columns.row(key, image, _values(self.folder, self.names, name))
        except RecordError as problem:
            return Rejected(key, str(problem))


def find_side_files(
    folder: str, others: Collection[str], images: Collection[str], config: SourceConfig, numbers: Collection[str]
) -> SideFiles:
    """The files beside `images` out of the `others` of a folder. Raises `ValueError` if there are none."""
    suffixes = tuple(f".{suffix}" for suffix in TEXT_SUFFIXES)
    names = frozenset(name for name in others if name.lower().endswith(suffixes))
    with_files = (image for image in images if any(name in names for name in _beside(image)))
    there: dict[str, Any] = {}
    for image in islice(with_files, SEEN_FIRST):
        try:
            there |= _values(folder, names, image)
        except RecordError:
            continue
    if not there:
        raise ValueError(
            f"captions: {folder} has no image with a file beside it ({' '.join(suffixes)}) that can be read"
        )
    return SideFiles(folder, names, Columns.choose(config, numbers, there, f"the files beside the images of {folder}"))


def _beside(image: str) -> Iterator[str]:
    yield from (str(PurePosixPath(image).with_suffix(f".{suffix}")) for suffix in TEXT_SUFFIXES)


def _values(folder: str, names: Collection[str], image: str) -> dict[str, Any]:
    contents = {}
    for name in _beside(image):
        if name in names:
            contents[name.rpartition(".")[2]] = read_whole(f"{folder}/{name}", MAX_TEXT_BYTES)
    return text_values(contents)


def text_values(contents: Mapping[str, bytes]) -> dict[str, Any]:
    """The columns of the files of a sample by their suffixes: texts, and the fields of a JSON object.

    Raises `RecordError` for a file that is too large, no text or not JSON.
    """
    texts: dict[str, Any] = {}
    fields: dict[str, Any] = {}
    for suffix, content in contents.items():
        if len(content) > MAX_TEXT_BYTES:
            raise RecordError(f".{suffix}: must have up to {MAX_TEXT_BYTES} bytes")
        try:
            text = content.decode("utf-8-sig").strip()
            if suffix.rpartition(".")[2] != "json":
                texts[suffix] = text
            elif isinstance(parsed := json.loads(text), dict):
                fields |= parsed
            else:
                texts[suffix] = parsed
        except UnicodeDecodeError:
            raise RecordError(f".{suffix}: must be text in UTF-8") from None
        except (ValueError, RecursionError) as problem:
            raise RecordError(f".{suffix}: is not JSON: {shortened(str(problem))}") from None
    return fields | texts
