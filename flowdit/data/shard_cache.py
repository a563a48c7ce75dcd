"""Shards of an object store that are read by way of a bounded local cache (`data.shard_pool`)."""

import contextlib
import logging
import queue
import threading
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from array_record.python.array_record_module import ArrayRecordReader
from etils import epath

from flowdit.data.manifest import HASH_LIMIT_BYTES, ManifestError, Shard
from flowdit.data.mirror import fetch_shard, provide_shards
from flowdit.data.record_files import LocalFiles, ShardFiles, allow_open_files, check_files
from flowdit.data.shard_pool import ShardPool
from flowdit.fields import require
from flowdit.hashing import file_sha256, fingerprint
from flowdit.storage import file_sizes, is_remote, reason

logger = logging.getLogger(__name__)

DOWNLOADS_AHEAD = 4
"""Shards of one split that a process copies at the same time for batches to come."""


class CachedShards(ShardFiles):
    """Shards of a folder in an object store, which are in `pool` while they are read.

    `is_checked` compares the hash of every copy, `verify` also those of copies that were there before. Both are not done
    if damaged records are allowed. Sizes are always compared.
    """

    def __init__(
        self, folder: epath.PathLike, shards: Sequence[Shard], pool: ShardPool, *, is_checked: bool, verify: bool
    ):
        self._sources = [epath.Path(folder) / shard.file for shard in shards]
        self.names = self._sources
        self.bytes = [shard.bytes for shard in shards]
        allow_open_files(2 * len(shards))
        self._pool, self._shards = pool, shards
        self._is_checked = is_checked
        # A hash in a manifest is not trusted to be a file name. A copy that was not checked has a name of its own.
        ids = (shard.sha256 if is_checked else f"unchecked {folder} {shard.file} {shard.sha256}" for shard in shards)
        self._paths = [pool.path(fingerprint(i), shard.bytes) for i, shard in zip(ids, shards, strict=True)]
        self._unseen = set(range(len(shards)))  # not opened by this process so far
        self._verify = verify and is_checked
        self._fetching: dict[int, None] = {}
        self._wanted: tuple[int, ...] = ()
        self._queue: queue.SimpleQueue[tuple[int, tuple[int, ...]]] = queue.SimpleQueue()
        self._has_workers = False

    @contextlib.contextmanager
    def reading(self, file: int) -> Iterator[ArrayRecordReader]:
        if file in self._unseen:
            self._examine(file)
        while True:
            with self._pool.opened(self._paths[file]) as reader:
                if reader is not None:
                    yield reader
                    return
            self._fetch(file)

    def _examine(self, file: int) -> None:
        """Remove a copy, from before this process, that is not what it should be."""
        path, shard = self._paths[file], self._shards[file]
        with contextlib.suppress(FileNotFoundError):
            is_right = path.stat().st_size == shard.bytes
            if not is_right or (self._verify and file_sha256(path) != shard.sha256):
                logger.warning("%s: the copy %s is damaged and made again", self.names[file], path)
                self._pool.discard(path)
        self._unseen.discard(file)

    def _fetch(self, file: int, wanted: tuple[int, ...] | None = None) -> None:
        """Copy a shard for a batch that waits for it, or, as long as those are preferred, one of `wanted`."""

        def download(part: Path) -> None:
            self._fetching[file] = None
            fetch_shard(self._sources[file], part, self._shards[file], self._is_checked)
            self._unseen.discard(file)

        try:
            self._pool.add(
                self._paths[file],
                download,
                ahead=wanted is not None,
                is_wanted=lambda: wanted is None or wanted is self._wanted,
            )
        finally:
            self._fetching.pop(file, None)

    def prefer(self, now: Sequence[int], ahead: Sequence[int]) -> None:
        wanted = tuple(dict.fromkeys((*now, *ahead)))
        if wanted == self._wanted:
            return
        self._wanted = wanted
        self._pool.kept[self] = {self._paths[file] for file in wanted}
        if not self._has_workers:
            self._has_workers = True
            for _ in range(DOWNLOADS_AHEAD):
                threading.Thread(target=self._work, name="fetch-shards", daemon=True).start()
        for file in wanted:
            self._queue.put((file, wanted))

    def _work(self) -> None:
        while True:
            file, wanted = self._queue.get()
            try:
                self._fetch(file, wanted)
            except ValueError as problem:  # an error for the run once a batch needs the shard
                logger.warning("fetching ahead: %s", problem)

    def pending(self, files: Collection[int]) -> str:
        fetched = [str(self.names[file]) for file in files if file in self._fetching]
        return f"; being downloaded: {', '.join(fetched)}" if fetched else ""


def open_shards(
    folder: epath.PathLike,
    shards: Sequence[Shard],
    pool: ShardPool | None = None,
    *,
    hashes: bool = False,
    limit: int = HASH_LIMIT_BYTES,
) -> ShardFiles:
    """The shards of a local folder, or those of an object store by way of `pool`.

    `hashes` and `limit` are those of `manifest.verify`. Raises `ValueError` naming a file that is missing or damaged, or
    has another number of records or size than in the manifest.
    """
    if pool is None or not is_remote(folder):
        paths = [Path(folder) / shard.file for shard in shards]
        check_files(paths, shards)
        return LocalFiles(paths)
    return CachedShards(folder, shards, pool, is_checked=limit > 0, verify=hashes)


def provide(
    folder: epath.PathLike,
    shards: Sequence[Shard],
    local_dir: str | None,
    pool: ShardPool | None = None,
    *,
    hashes: bool = False,
    limit: int = HASH_LIMIT_BYTES,
) -> epath.PathLike:
    """The folder of which `open_shards` opens these shards: a local one with all of them (`mirror.provide_shards`), or
    `folder` itself, if its shards are read by way of `pool`.

    Raises `ManifestError` for a shard that is missing or changed.
    """
    if pool is None or not is_remote(folder):
        return provide_shards(folder, shards, local_dir, hashes=hashes, limit=limit)
    _check_stored(folder, shards)
    return folder


def _check_stored(folder: epath.PathLike, shards: Sequence[Shard]) -> None:
    """Raise `ManifestError` unless every shard is in the folder of an object store and has its size."""
    try:
        sizes = file_sizes(epath.Path(folder))
    except OSError as problem:
        raise ManifestError(f"{folder}: cannot be listed: {reason(problem)}") from None
    for shard in shards:
        if shard.file not in sizes:
            raise ManifestError(f"{folder}/{shard.file}: is missing: the data changed since it was prepared")
        if (size := sizes[shard.file]) != shard.bytes:
            raise ManifestError(f"{folder}/{shard.file}: must have {shard.bytes} bytes, has {size}")


def largest_window(sizes: Sequence[Sequence[int]], pool: ShardPool | None) -> int | None:
    """The number of shards of which two windows and one more shard of each data set fit into the cache.

    `sizes` are the bytes of the shards of each data set, 0 of those on the local disk. None if they need no cache.
    Raises `FieldError` if the cache is too small for windows of one shard.
    """
    room = sum(map(max, sizes))
    if pool is None or not room:
        return None
    rule = f"must be at least {cache_for(1, sizes):g}, three times the largest shard"
    slots = pool.limit // room
    require("data.local_cache_gb", pool.limit / 1e9, slots >= _slots(1), rule)
    return min((slots - 1) // 2, max(map(len, sizes)))


def cache_for(window: int, sizes: Sequence[Sequence[int]]) -> float:
    """The smallest `data.local_cache_gb` for windows of so many shards, rounded up to 0.1 MB."""
    return -(-_slots(window) * sum(map(max, sizes)) // 10**5) / 10**4


def _slots(window: int) -> int:
    """Shards for which there must be room: those that are read, the next ones, and one of another split."""
    return 2 * window + 1
