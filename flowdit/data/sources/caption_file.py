"""Reading what a file says about the images of a folder: JSON Lines with one object per image, or CSV with a header.

`{"file": "beach/001.jpg", "short_caption": "a dog", "long_caption": "a brown dog runs along a beach"}`: `file` or
`file_name` is a path within the image folder, and a long caption may be missing or null. Which other fields are read
depends on the settings (`columns`). A byte-order mark is accepted.
"""

import csv
import dataclasses
import io
import itertools
import json
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from flowdit.data.records import RecordError
from flowdit.data.schema import CaptionField
from flowdit.data.sources.base import Row
from flowdit.data.sources.columns import Columns
from flowdit.data.sources.config import SourceConfig
from flowdit.data.sources.files import opened
from flowdit.storage import reason

FILES = ("file", "file_name")
SEEN_FIRST = 1000
"""Lines whose fields are the columns, of which a line may lack some."""
MAX_LINE = 2**21
"""Letters of a line: a short and a long caption of the largest size."""


class Table(NamedTuple):
    """Columns of a caption file, and its rows in the order of the images: rows without their image."""

    columns: Columns
    rows: list[Row]


def read_table(
    path: str,
    folder: str,
    names: Sequence[str],
    config: SourceConfig,
    numbers: Collection[str] = (),
    has_classes: bool = False,
) -> Table:
    """Read what `path` says about the images `names` within `folder`, in this order.

    `numbers` are columns that filters compare. With `has_classes` labels are read only from a column that is named.

    Raises `ValueError` with line, field, rule and value, or with the number of images without an entry or entries
    without an image and an example of both, or if all captions are empty.
    """
    # The same letters may be stored in two forms: file names from a Mac differ from those in most caption files.
    by_form = {unicodedata.normalize("NFC", name): name for name in names}
    known = set(names)
    rows: dict[str, Row] = {}
    lines: dict[str, int] = {}
    try:
        with opened(path) as binary, io.TextIOWrapper(binary, "utf-8-sig", newline="") as text:
            entries = _csv(path, text) if path.lower().endswith(".csv") else _json_lines(path, text)
            first = list(itertools.islice(entries, SEEN_FIRST))
            there = dict.fromkeys(name for _, entry in first for name in entry)
            columns = Columns.choose(config, numbers, there, path)
            if has_classes and not config.label_column:
                columns = dataclasses.replace(columns, label="")
            for number, entry in itertools.chain(first, entries):
                name, row = _row(f"{path}:{number}", entry, columns)
                name = name if name in known else by_form.get(unicodedata.normalize("NFC", name), name)
                if name in rows:
                    raise ValueError(f"{path}:{number}: file: must differ from line {lines[name]}, got {name!r}")
                rows[name], lines[name] = row, number
    except OSError as error:
        raise ValueError(f"captions: cannot read {path}: {reason(error)}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"captions: {path} must be UTF-8: {error}") from None
    _compare(path, folder, lines, names)
    found = [rows[name] for name in names]
    if columns.caption and not any(text.strip() for row in found for text in row.captions or ()):
        raise ValueError(f"captions: {path} must have captions that are not empty, all {len(found)} are empty")
    return Table(columns, found)


def _lines(path: str, text: io.TextIOWrapper) -> Iterator[str]:
    """The lines. Raises `ValueError` for one that is too long to be one of captions."""
    number = 0
    while line := text.readline(MAX_LINE):
        number += 1
        if len(line) == MAX_LINE:
            raise ValueError(f"{path}:{number}: must have fewer than {MAX_LINE} letters")
        yield line


def _json_lines(path: str, text: io.TextIOWrapper) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(_lines(path, text), 1):
        if line.strip():
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}:{number}: is not JSON: {error}") from None
            if not isinstance(entry, dict):
                raise ValueError(f"{path}:{number}: must be an object, got {type(entry).__name__}")
            yield number, entry


def _csv(path: str, text: io.TextIOWrapper) -> Iterator[tuple[int, Mapping[str, Any]]]:
    reader = csv.DictReader(_lines(path, text), strict=True)
    try:
        for entry in reader:
            if None in entry:
                columns = len(reader.fieldnames or ())
                raise ValueError(f"{path}:{reader.line_num}: must have {columns} columns, as the header, it has more")
            yield reader.line_num, {name: value for name, value in entry.items() if value is not None}
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: is not CSV: {error}") from None


def _row(where: str, entry: Mapping[str, Any], columns: Columns) -> tuple[str, Row]:
    """The image that a line is about, and what it says. Raises `ValueError`."""
    file = next((field for field in FILES if field in entry), FILES[0])
    name = PurePosixPath(_text(where, entry, file)).as_posix()
    if columns.caption:
        _text(where, entry, columns.caption)
    row = columns.row(name, b"", entry)
    if not isinstance(row, Row):
        raise ValueError(f"{where}: {row.reason}")
    return name, row


def _text(where: str, entry: Mapping[str, Any], field: str) -> str:
    if (value := entry.get(field)) is None and field not in entry:
        raise ValueError(f"{where}: {field}: is missing, the line has {sorted(entry)}")
    try:
        CaptionField().check(value)
    except RecordError as error:
        raise ValueError(f"{where}: {field}: {error}") from None
    return str(value)


def _compare(path: str, folder: str, lines: dict[str, int], names: Sequence[str]) -> None:
    known = set(names)
    bare = [name for name in names if name not in lines]
    foreign = [name for name in lines if name not in known]
    if bare:
        # Such as paths with another prefix, which show what is wrong better than an image without a caption.
        example = f"the file has {foreign[0]!r}" if foreign else f"the file has {len(lines)} captions"
        raise ValueError(
            f"captions: {path} has no caption for {len(bare)} of the {len(names)} images of {folder}, "
            f"the first is {bare[0]!r}; {example}"
        )
    if foreign:
        raise ValueError(
            f"captions: {path} has {len(foreign)} captions without an image in {folder}, "
            f"the first in line {lines[foreign[0]]}: {foreign[0]!r}; the folder has {names[0]!r}"
        )
