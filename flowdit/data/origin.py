"""The fields of a record that say where it comes from. Data sets of earlier versions do not have them."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from flowdit.data.records import RecordError
from flowdit.data.schema import CaptionField, SizeField

EVERYWHERE = ("key", "content_hash", "image_size", "crop")
"""Fields that either all records of a data set have or none."""
HASH_BYTES = 16
COLUMN = "columns."
"""What the names of kept columns begin with."""
HELD_OUT = "held_out"
"""The kept column that says which part of the validation split a record is of (`Manifest.validation_parts`)."""
PART = f"{COLUMN}{HELD_OUT}"


def check_origin(record: Mapping[str, Any]) -> None:
    """Raise `RecordError("field: rule, value")` for the first of these fields that breaks a rule.

    - `key`: name of the image within its source.
    - `content_hash`: BLAKE2b of the file, 16 bytes.
    - `image_size`: (height, width) of the original in pixels.
    - `crop`: (top, left, height, width), the part of the original that the latent shows, in its pixels.
    - `mirrored`: True, only in a mirrored copy.
    - `columns.<name>`: a value that was carried along, such as a licence.
    """
    for name, check in _CHECKS.items():
        if name in record:
            try:
                check(record[name])
            except RecordError as error:
                raise RecordError(f"{name}: {error}") from None
    for name, value in columns_of(record).items():
        if not (value is None or isinstance(value, str | bool | int | float)):
            rule = "must be a text, a number, true, false or none"
            raise RecordError(f"{COLUMN}{name}: {rule}, got {type(value).__name__}")
    if "crop" in record and "image_size" in record:
        _check_inside(record["crop"], record["image_size"])


def key_of(record: Mapping[str, Any]) -> bytes | None:
    """What no two records of a data set share: the key, and whether it is the mirrored copy. None without a key."""
    key = record.get("key")
    return None if key is None else key.encode() + (b"\0mirrored" if record.get("mirrored") else b"")


def columns_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """The kept columns of a record, by name."""
    return {name.removeprefix(COLUMN): value for name, value in record.items() if name.startswith(COLUMN)}


def integers(value: Any, count: int) -> list[int]:
    """`count` integers from a list, a tuple or an array. Raises `RecordError`."""
    if isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype.kind in "iu":
        value = value[: count + 1].tolist()
    is_list = isinstance(value, list | tuple) and len(value) == count
    if not is_list or not all(isinstance(each, int | np.integer) and not isinstance(each, bool) for each in value):
        raise RecordError(f"must be {count} integers, got {str(value)[:60]}")
    return [int(each) for each in value]


def _check_key(value: Any) -> None:
    CaptionField().check(value)
    if not value:
        raise RecordError("must not be empty")


def _check_hash(value: Any) -> None:
    if not isinstance(value, bytes) or len(value) != HASH_BYTES:
        shown = f"{len(value)} bytes" if isinstance(value, bytes) else type(value).__name__
        raise RecordError(f"must be {HASH_BYTES} bytes, got {shown}")


def _check_crop(value: Any) -> None:
    top, left, height, width = integers(value, 4)
    if min(top, left) < 0 or min(height, width) < 1:
        raise RecordError(f"must be a top and left of at least 0, a height and width of at least 1, got {value}")


def _check_mirrored(value: Any) -> None:
    if value is not True:
        raise RecordError(f"must be True where it is given, got {str(value)[:60]}")


def _check_inside(crop: Any, size: Any) -> None:
    top, left, height, width = integers(crop, 4)
    image = integers(size, 2) if isinstance(size, list | tuple | np.ndarray) else [int(size)] * 2
    if top + height > image[0] or left + width > image[1]:
        raise RecordError(f"crop: must be within image_size={tuple(image)}, got {(top, left, height, width)}")


_CHECKS = {
    "key": _check_key,
    "content_hash": _check_hash,
    "image_size": SizeField((1, 1)).check,
    "crop": _check_crop,
    "mirrored": _check_mirrored,
}
