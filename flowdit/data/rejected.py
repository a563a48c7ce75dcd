"""The images that are left out of a data set because they cannot be read, in `rejected.jsonl`."""

import json
import math
from collections.abc import Iterable

from etils import epath
from pydantic.dataclasses import dataclass

from flowdit.json_input import STRICT

FILE_NAME = "rejected.jsonl"


@dataclass(frozen=True, config=STRICT)
class Rejected:
    """A line of the file: the image within its folder, and why it cannot be read."""

    file: str
    reason: str


class RejectedImages:
    """The images left out so far, each once, of which `max_rejected` (a fraction of all, rounded up) are allowed."""

    def __init__(self, folder: epath.Path, num_images: int, max_rejected: float, found: Iterable[Rejected]):
        self._path = folder / FILE_NAME
        self._num_images = num_images
        self._fraction = max_rejected
        self._reasons: dict[str, str] = {}
        for image in found:
            self._reasons[image.file] = image.reason
        self.write()
        self._check()

    def __len__(self) -> int:
        return len(self._reasons)

    def add(self, image: Rejected) -> None:
        """Add an image and write it to the file. Raises `ValueError` if there are too many."""
        if image.file in self._reasons:  # found in an earlier run, or another of this name
            return
        self._reasons[image.file] = image.reason
        with self._path.open("ab") as file:
            file.write(_line(image.file, image.reason))
        self._check()

    def write(self) -> None:
        """Write the file anew, sorted by name; remove it if there are none."""
        if not self._reasons:
            self._path.unlink(missing_ok=True)
            return
        temporary = self._path.with_name(FILE_NAME + ".tmp")
        temporary.write_bytes(b"".join(_line(*item) for item in sorted(self._reasons.items())))
        temporary.replace(self._path)

    def summary(self) -> str:
        return f"{len(self)} of {self._num_images} images cannot be read and are left out: see {self._path}"

    def _check(self) -> None:
        allowed = math.ceil(self._fraction * self._num_images)
        if len(self) > allowed:
            raise ValueError(
                f"max_rejected: at most {allowed} of {self._num_images} images may be unreadable ({self._fraction:g}), "
                f"found {len(self)} so far: see {self._path}; repair or remove them, or set a higher max_rejected"
            )


def _line(file: str, reason: str) -> bytes:
    return json.dumps({"file": file, "reason": reason}, ensure_ascii=False).encode() + b"\n"


def count_rejected(folder: epath.Path) -> int:
    """Number of images that were left out of the data set in `folder`."""
    path = folder / FILE_NAME
    if not path.exists():
        return 0
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(2**20), b""))
