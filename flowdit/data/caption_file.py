"""Reading the captions of an image folder: a JSON Lines file with one object per image.

`{"file": "beach/001.jpg", "short_caption": "a dog", "long_caption": "a brown dog runs along a beach"}`: `file` is a
path within the image folder, `long_caption` is optional, and other fields are ignored.
"""

import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from flowdit.data.records import RecordError
from flowdit.data.schema import CaptionField


def read_captions(path: Path, folder: Path, names: Sequence[str]) -> list[tuple[str, str]]:
    """Read the (short, long) captions of the images `names` within `folder`, in this order.

    Raises `ValueError` with line, field, rule and value, or with the number of images without a caption or captions
    without an image, and the first of them.
    """
    captions: dict[str, tuple[str, str]] = {}
    lines: dict[str, int] = {}
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
            if line.strip():
                name, caption = _parse_line(f"{path}:{number}", line)
                if name in captions:
                    raise ValueError(f"{path}:{number}: file: must differ from line {lines[name]}, got {name!r}")
                captions[name], lines[name] = caption, number
    except OSError as error:
        raise ValueError(f"captions: cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"captions: {path} must be UTF-8: {error}") from None
    _compare(path, folder, lines, names)
    return [captions[name] for name in names]


def _parse_line(where: str, line: str) -> tuple[str, tuple[str, str]]:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: is not JSON: {error}") from None
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: must be an object, got {type(entry).__name__}")
    name = _text(where, entry, "file")
    return PurePosixPath(name).as_posix(), (
        _text(where, entry, "short_caption"),
        _text(where, entry, "long_caption", ""),
    )


def _text(where: str, entry: dict[str, Any], field: str, default: str | None = None) -> str:
    if (value := entry.get(field, default)) is None and field not in entry:
        raise ValueError(f"{where}: {field}: is missing, the line has {sorted(entry)}")
    try:
        CaptionField().check(value)
    except RecordError as error:
        raise ValueError(f"{where}: {field}: {error}") from None
    return str(value)


def _compare(path: Path, folder: Path, lines: dict[str, int], names: Sequence[str]) -> None:
    if bare := [name for name in names if name not in lines]:
        raise ValueError(
            f"captions: {path} has no caption for {len(bare)} images of {folder}, the first is {bare[0]!r}"
        )
    known = set(names)
    if foreign := [name for name in lines if name not in known]:
        raise ValueError(
            f"captions: {path} has {len(foreign)} captions without an image in {folder}, "
            f"the first in line {lines[foreign[0]]}: {foreign[0]!r}"
        )
