"""A bounded part of the local disk for shards of object stores, shared by all processes of a machine.

Shards are copied when a batch needs them, or ahead of that, and the least recently used ones are removed for them. The
folder is the only thing that the processes share. A shard that is being read, and one that is being copied, has a lock
(`flock`) on its file; nobody removes a locked file, and the locks of a process that was killed end with it.
"""

import contextlib
import fcntl
import functools
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from array_record.python.array_record_module import ArrayRecordReader

from flowdit.data.mirror import cache_folder
from flowdit.data.record_files import open_reader
from flowdit.fields import FieldError
from flowdit.storage import reason

DOWNLOADS = 8
"""Shards that a process copies at the same time for batches that wait for them."""
POLL_SECONDS = 0.02
IDLE_SECONDS = 2.0
"""Time after which a shard that is not read is closed, and may be removed by another process."""


@dataclass
class _Open:
    """A shard that is open in this process, with a shared lock on its file."""

    reader: ArrayRecordReader
    lock: int
    users: int = 0
    used: float = field(default_factory=time.monotonic)

    def close(self) -> None:
        self.reader.close()
        os.close(self.lock)


class ShardPool:
    """The folder, of which at most `limit` bytes are used, and the shards in it that this process has open.

    A file `<name>-<bytes>.array_record` is complete. One that ends in `.part` is being copied, and counts as if it were
    complete. Thread-safe.
    """

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit = folder, limit
        self._readers: dict[Path, _Open] = {}
        self._mutex = threading.Lock()  # of `_readers`
        self._downloads = threading.BoundedSemaphore(DOWNLOADS)
        self.kept: dict[object, Collection[Path]] = {}
        """By user: shards that are read now or soon. Others are removed before them."""
        with _errors_of(folder):
            folder.mkdir(parents=True, exist_ok=True)
            used = self._used()
            free = shutil.disk_usage(folder).free
        if limit - used > free:
            rule = f"must be at most {(free + used) / 1e9:.3g}, the free space of {folder} with what it holds"
            raise FieldError("data.local_cache_gb", f"{rule}, got {limit / 1e9:.6g}")
        threading.Thread(target=self._close_idle_ones, name="close-shards", daemon=True).start()

    def path(self, name: str, size: int) -> Path:
        return self.folder / f"{name}-{size}.array_record"

    @contextlib.contextmanager
    def opened(self, path: Path) -> Iterator[ArrayRecordReader | None]:
        """The reader of a shard, which is not removed within; None if it is not there."""
        with self._mutex:
            shard = self._readers.get(path) or self._open(path)
            if shard is not None:
                shard.users += 1
        if shard is None:
            yield None
            return
        try:
            os.utime(shard.lock)
            yield shard.reader
        finally:
            with self._mutex:
                shard.users -= 1
                shard.used = time.monotonic()

    def _open(self, path: Path) -> _Open | None:
        try:
            lock = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(lock, fcntl.LOCK_SH)
            if os.fstat(lock).st_nlink:  # it was not removed before it was locked
                self._readers[path] = _Open(open_reader(path), lock)
                return self._readers[path]
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)
        return None

    def _close_idle_ones(self) -> None:
        while True:
            time.sleep(IDLE_SECONDS / 2)
            before = time.monotonic() - IDLE_SECONDS
            with self._mutex:
                for path in [path for path, shard in self._readers.items() if not shard.users and shard.used < before]:
                    self._readers.pop(path).close()

    def add(
        self, path: Path, download: Callable[[Path], Any], *, ahead: bool = False, is_wanted: Callable[[], bool]
    ) -> None:
        """Copy a shard to `path` by `download(file)`, unless it is there or another process or thread copies it.

        Waits for that one, and for room while all other shards are being read, as long as `is_wanted`. With `ahead` no
        shard that is kept is removed. Raises what `download` raises, and then nothing is left of the file.
        """
        while is_wanted() and not path.exists():
            with contextlib.nullcontext() if ahead else self._downloads:
                with _errors_of(self.folder):
                    part = self._begin(path, ahead)
                if part is not None:
                    file, lock = part
                    try:
                        download(file)
                        with _errors_of(self.folder), self._locked():
                            file.replace(path)
                    finally:
                        file.unlink(missing_ok=True)
                        os.close(lock)
                    return
            time.sleep(POLL_SECONDS)

    def _begin(self, path: Path, ahead: bool) -> tuple[Path, int] | None:
        """The locked file to copy to, for which there is room; None if it has to be tried again."""
        part = path.with_name(f"{path.name}.part")
        with self._locked():
            if path.exists() or not self._remove_abandoned(part) or not self._make_room(_size(path), ahead):
                return None
            lock = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            fcntl.flock(lock, fcntl.LOCK_EX)
            return part, lock

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """While the contents of the folder are changed."""
        with (self.folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _files(self) -> list[Path]:
        return [file for file in self.folder.iterdir() if _NAME.fullmatch(file.name)]

    def _used(self) -> int:
        return sum(map(_size, self._files()))

    def _remove_abandoned(self, part: Path) -> bool:
        """Remove what killed processes have left of copies. Whether `part` is not being copied."""
        left = [file for file in self._files() if file.suffix == ".part" and not _remove_unless_locked(file)]
        return part not in left

    def _make_room(self, size: int, ahead: bool) -> bool:
        excess = self._used() + size - self.limit
        if excess <= 0:
            return True
        kept = {path for paths in self.kept.copy().values() for path in paths}
        files = [file for file in self._files() if file.suffix != ".part" and not (ahead and file in kept)]
        for file in sorted(files, key=lambda file: (file in kept, file.stat().st_mtime_ns)):
            if self._close(file) and _remove_unless_locked(file):
                excess -= _size(file)
            if excess <= 0:
                return True
        return False

    def _close(self, path: Path) -> bool:
        """Close a shard in this process; False if it is being read."""
        with self._mutex:
            shard = self._readers.get(path)
            if shard is not None and not shard.users:
                self._readers.pop(path).close()
            return shard is None or not shard.users

    def discard(self, path: Path) -> None:
        """Remove a shard that is damaged, once nobody reads it."""
        with _errors_of(self.folder):
            while path.exists():
                with self._locked():
                    if self._close(path) and path.exists() and _remove_unless_locked(path):
                        return
                time.sleep(POLL_SECONDS)


_NAME = re.compile(r"\w+-(\d+)\.array_record(\.part)?")


def _size(path: Path) -> int:
    found = _NAME.fullmatch(path.name)
    return int(found[1]) if found else 0


def _remove_unless_locked(file: Path) -> bool:
    try:
        lock = os.open(file, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    finally:
        os.close(lock)
    return True


@contextlib.contextmanager
def _errors_of(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as problem:
        raise FieldError("data.local_dir", f"{folder} cannot be used: {reason(problem)}") from None


def shard_pool(local_dir: str | None, limit_gb: float | None) -> ShardPool | None:
    """The bounded cache of this machine in `local_dir` (`DataConfig.local_dir`), one for a process; None without limit."""
    return None if limit_gb is None else _pool_of(cache_folder(local_dir) / "shards", int(limit_gb * 1e9))


_pool_of = functools.cache(ShardPool)
