"""What `prepare` left beside the shards: the images that it could not use, and its check of the VAE."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import NamedTuple

from etils import epath

from flowdit.data import rejected, vae_check
from flowdit.reporting.grids import Grid, embed

MOST_LINES = 100_000
SHOWN = 20
CHECK_BYTES = 2 * 2**20


class RejectedImages(NamedTuple):
    """The number of images, the number by reason, and the first ones as (file, reason)."""

    count: int
    reasons: Counter[str]
    first: list[tuple[str, str]]


def read_rejected(folder: epath.Path) -> RejectedImages | None:
    """What is in `rejected.jsonl`, up to a limit of lines; None without it. Lines that cannot be read are skipped."""
    path = folder / rejected.FILE_NAME
    if not path.is_file():
        return None
    count, reasons = 0, Counter[str]()
    first: list[tuple[str, str]] = []
    with path.open("r") as file:
        for line in file:
            if count == MOST_LINES:
                break
            try:
                entry = json.loads(line)
                name, reason = str(entry["file"])[:300], str(entry["reason"])[:300]
            except (ValueError, TypeError, KeyError, RecursionError):
                continue
            count += 1
            reasons[re.sub(r"\d+", "N", reason)] += 1
            if len(first) < SHOWN:
                first.append((name, reason))
    return RejectedImages(count, reasons, first)


def read_check(folder: epath.Path) -> Grid | None:
    """The sheet of the check of the VAE; None without it, or if it cannot be read."""
    sheet = folder / vae_check.FILE_NAME
    grids = embed({0: sheet}, 1, CHECK_BYTES) if sheet.is_file() else []
    return grids[0] if grids else None
