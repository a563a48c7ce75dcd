"""The numbers of tokens of captions, from the text features of a data set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from etils import epath

from flowdit.data import text_cache
from flowdit.data.captions import CAPTIONS
from flowdit.data.manifest import Manifest, read_manifest
from flowdit.data.plan import former_ids
from flowdit.data.record_files import LocalFiles, RecordFiles
from flowdit.data.records import RecordError
from flowdit.data.text_cache import CacheManifest
from flowdit.data.verification import DEFAULT_CACHE
from flowdit.fields import require
from flowdit.storage import connect, is_remote

MOST_RECORDS = 500
"""Records whose features are read: those of T5Gemma have 0.5 MB a caption."""


class Tokens(NamedTuple):
    """The manifest of the features, and the numbers of tokens of some captions, by field."""

    manifest: CacheManifest
    lengths: dict[str, list[int]]


def read_tokens(
    folder: epath.Path, manifest: Manifest, given: str | None, places: Sequence[tuple[str, int]]
) -> Tokens | None:
    """The numbers of tokens of evenly spaced records of `places`; None without text features.

    Features in an object store are not read, as that would copy them. Raises `ValueError` for those of other data.
    """
    texts = connect(given) if given else folder / DEFAULT_CACHE
    if not (texts / text_cache.FILE_NAME).is_file():
        require("text_cache", given, not given, f"must be a folder with {text_cache.FILE_NAME}")
        return None
    cache = read_manifest(CacheManifest, texts / text_cache.FILE_NAME)
    cache.check_made_from(texts, manifest, former_ids(folder))
    lengths: dict[str, list[int]] = {name: [] for name in CAPTIONS}
    count = 0 if is_remote(texts) else min(MOST_RECORDS, len(places))
    counts = {shard.file: shard.records for shard in cache.shards}
    chosen: dict[str, list[int]] = {}
    for i in range(count):
        file, number = places[i * len(places) // count]
        chosen.setdefault(file, []).append(number)
    for file, numbers in chosen.items():
        files = RecordFiles(LocalFiles([Path(texts / file)]), [counts[file]], lambda entry: None)
        for number in numbers:
            for which, name in enumerate(CAPTIONS):
                if tokens := _tokens(files, len(CAPTIONS) * number + which):
                    lengths[name].append(tokens)
    return Tokens(cache, lengths)


def _tokens(files: RecordFiles, entry: int) -> int:
    """The number of tokens of a caption; 0 for an empty one, and for a record that `flowdit.verify` reports."""
    try:
        features = files.read([entry])[0].get("features")
    except RecordError:
        return 0
    return len(features) if isinstance(features, np.ndarray) and features.ndim == 2 else 0
