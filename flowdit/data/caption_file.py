"""Reading the captions of an image folder: a JSON Lines file with one object per image.

`{"file": "beach/001.jpg", "short_caption": "a dog", "long_caption": "a brown dog runs along a beach"}`: `file` is a
path within the image folder, `long_caption` may be missing or null, and other fields are ignored. A byte-order mark is
accepted.
"""

import json
import unicodedata
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from flowdit.data.records import RecordError
from flowdit.data.schema import CaptionField


def read_captions(path: Path, folder: Path, names: Sequence[str]) -> list[tuple[str, str]]:
    """Read the (short, long) captions of the images `names` within `folder`, in this order.

    Raises `ValueError` with line, field, rule and value, or with the number of images without a caption or captions
    without an image and an example of both, or if all captions are empty.
    """
    # The same letters may be stored in two forms: file names from a Mac differ from those in most caption files.
    by_form = {unicodedata.normalize("NFC", name): name for name in names}
    captions: dict[str, tuple[str, str]] = {}
    lines: dict[str, int] = {}
    known = set(names)
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
            if line.strip():
                name, caption = _parse_line(f"{path}:{number}", line)
                name = name if name in known else by_form.get(unicodedata.normalize("NFC", name), name)
                if name in captions:
                    raise ValueError(f"{path}:{number}: file: must differ from line {lines[name]}, got {name!r}")
                captions[name], lines[name] = caption, number
    except OSError as error:
        raise ValueError(f"captions: cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"captions: {path} must be UTF-8: {error}") from None
    _compare(path, folder, lines, names)
    found = [captions[name] for name in names]
    if not any(text.strip() for pair in found for text in pair):
        raise ValueError(f"captions: {path} must have captions that are not empty, all {len(found)} are empty")
    return found


def _parse_line(where: str, line: str) -> tuple[str, tuple[str, str]]:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: is not JSON: {error}") from None
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: must be an object, got {type(entry).__name__}")
    name = _text(where, entry, "file")
    long = "" if entry.get("long_caption") is None else _text(where, entry, "long_caption")
    return PurePosixPath(name).as_posix(), (_text(where, entry, "short_caption"), long)


def _text(where: str, entry: dict[str, Any], field: str) -> str:
    if (value := entry.get(field)) is None and field not in entry:
        raise ValueError(f"{where}: {field}: is missing, the line has {sorted(entry)}")
    try:
        CaptionField().check(value)
    except RecordError as error:
        raise ValueError(f"{where}: {field}: {error}") from None
    return str(value)


def _compare(path: Path, folder: Path, lines: dict[str, int], names: Sequence[str]) -> None:
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
