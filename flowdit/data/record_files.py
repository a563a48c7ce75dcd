"""Random access to the records of several ArrayRecord files; errors name file and record."""

import bisect
import contextlib
import copy
import itertools
import logging
import os
import resource
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from flowdit.data.manifest import Shard
from flowdit.data.records import RecordError
from flowdit.data.skeletons import SkeletonDecoder

logger = logging.getLogger(__name__)

READERS = 64
"""Files of which a data set's batches are read at the same time, as disks and networks take their time."""


@runtime_checkable
class ShardFiles(Protocol):
    """Open files. `names` are their paths, for messages; `bytes` the room on the local disk that a copy needs, or 0."""

    names: Sequence[os.PathLike[str]]
    bytes: Sequence[int]

    def reading(self, file: int) -> contextlib.AbstractContextManager[ArrayRecordReader]:
        """The reader of a file, which stays open within. Thread-safe."""
        ...

    def prefer(self, now: Sequence[int], ahead: Sequence[int]) -> None:
        """Begin to copy what is missing of the files `now`, which are being read, and `ahead`, which come next."""

    def pending(self, files: Collection[int]) -> str:
        """Which of the files are not there yet, for a message."""
        return ""


class LocalFiles(ShardFiles):
    """Files on a local disk, which stay open once they were read from."""

    def __init__(self, paths: Sequence[Path]):
        self.names, self.bytes = paths, [0] * len(paths)
        allow_open_files(len(paths))
        self._readers: dict[int, ArrayRecordReader] = {}

    @contextlib.contextmanager
    def reading(self, file: int) -> Iterator[ArrayRecordReader]:
        if file not in self._readers:  # if two threads open it at the same time, one of theirs is kept
            self._readers.setdefault(file, open_reader(self.names[file]))
        yield self._readers[file]


class RecordFiles:
    """A sequence of files: `read` takes indices in [0, len(files)). `check` is called with every record."""

    def __init__(self, files: ShardFiles, counts: Sequence[int], check: Callable[[Mapping[str, Any]], None]):
        self.files, self._check = files, check
        self._decoder = SkeletonDecoder()
        self._ends = list(itertools.accumulate(counts))
        self._firsts, self._skipped = [0, *self._ends[:-1]], [0] * len(counts)
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="read-records")

    @property
    def counts(self) -> list[int]:
        """The records of each file."""
        return np.diff(self._ends, prepend=0).tolist()

    def part(
        self, skipped: Sequence[int], counts: Sequence[int], check: Callable[[Mapping[str, Any]], None]
    ) -> "RecordFiles":
        """The files reduced to `counts` records of each, after the first `skipped`; they share their open readers."""
        part = copy.copy(self)
        part._skipped, part._check = skipped, check
        part._ends = list(itertools.accumulate(counts))
        return part

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Read, decode and check the records at `indices`.

        Raises `RecordError` with file, record within the file, and problem.
        """
        return [self.locate(i, self._parse, data) for i, data in zip(indices, self._read_bytes(indices), strict=True)]

    def locate(self, index: int, function: Callable[..., Any], *args: Any) -> Any:
        """Call `function(*args)`; an error becomes one line with the file and number of record `index`."""
        try:
            return function(*args)
        except RecordError as error:
            raise RecordError(f"{self._where(index)}: {error}") from error.__cause__
        except RuntimeError as error:
            raise RecordError(f"{self._where(index)}: the file is damaged: {_first_clause(error)}") from None

    def _parse(self, data: bytes) -> dict[str, Any]:
        record = self._decoder.decode(data)
        self._check(record)
        return record

    def _read_bytes(self, indices: Sequence[int]) -> Sequence[bytes]:
        thread = threading.get_ident()
        _BEING_READ[thread] = (self, indices)
        try:
            return self._read_files(indices)
        except RuntimeError:  # does not name the file: read one record at a time
            return [self.locate(i, self._read_files, [i])[0] for i in indices]
        finally:
            del _BEING_READ[thread]

    def _read_files(self, indices: Sequence[int]) -> list[bytes]:
        """The bytes of records. ArrayRecord's own class for several files starts threads for every batch."""
        by_file: dict[int, list[tuple[int, int]]] = {}  # rows of the result, and numbers in the file
        for row, index in enumerate(indices):
            file, number = self._find(index)
            by_file.setdefault(file, []).append((row, number))
        result = [b""] * len(indices)

        def read(file: int) -> None:
            with self.files.reading(file) as reader:
                records = reader.read([number for _, number in by_file[file]])
            for (row, _), record in zip(by_file[file], records, strict=True):
                result[row] = record

        list((map if len(by_file) == 1 else self._pool.map)(read, by_file))
        return result

    def place(self, index: int) -> tuple[os.PathLike[str], int]:
        """The file of record `index`, and its number within the file."""
        file, number = self._find(index)
        return self.files.names[file], number

    def numbers(self, indices: Iterable[int]) -> list[int]:
        """The numbers of records of a `part` in the files as a whole."""
        return [self._firsts[file] + number for file, number in map(self._find, indices)]

    def _find(self, index: int) -> tuple[int, int]:
        file = bisect.bisect_right(self._ends, index)
        return file, self._skipped[file] + index - (self._ends[file - 1] if file else 0)

    def _where(self, index: int) -> str:
        return "{}: record {}".format(*self.place(index))

    def describe(self, indices: Sequence[int], max_files: int = 4, max_records: int = 8) -> str:
        """Files and record numbers of `indices` for a message, the first few of each."""
        by_file: dict[os.PathLike[str], list[int]] = {}
        for file, number in map(self.place, indices):
            by_file.setdefault(file, []).append(number)
        shown = [
            f"{file} records {', '.join(map(str, sorted(numbers)[:max_records]))}"
            + (f" and {len(numbers) - max_records} more" if len(numbers) > max_records else "")
            for file, numbers in list(by_file.items())[:max_files]
        ]
        rest = len(by_file) - max_files
        pending = self.files.pending({self._find(index)[0] for index in indices})
        return "; ".join(shown) + (f"; and {rest} more files" if rest > 0 else "") + pending


_RANDOM_ACCESS = {
    "options": "readahead_buffer_size:0",
    "file_reader_buffer_size": 32768,
}  # as ArrayRecordDataSource has


def open_reader(path: os.PathLike[str]) -> ArrayRecordReader:
    """A reader of single records."""
    return ArrayRecordReader(os.fspath(path), **_RANDOM_ACCESS)


_BEING_READ: dict[int, tuple[RecordFiles, Sequence[int]]] = {}


def being_read() -> dict[int, str]:
    """Files and record numbers that the threads of this process are reading at this moment, by thread identifier."""
    return {thread: files.describe(indices) for thread, (files, indices) in _BEING_READ.copy().items()}


def allow_open_files(count: int) -> None:
    """Raise this process's limit of open files, often 1,024: all shards stay open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = soft + count
    if soft != resource.RLIM_INFINITY:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(OSError, ValueError):  # reading the shard says which file cannot be opened
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


class BadRecords:
    """The different bad records found so far, of which `limit` are allowed.

    With a limit of None none is allowed, and the error does not mention the option. Thread-safe.
    """

    def __init__(self, limit: int | None):
        self.limit, self._lock = limit, threading.Lock()
        self._problems: dict[str, None] = {}  # in the order of their discovery
        self._num_reported = 0

    def __len__(self) -> int:
        return len(self._problems)

    def add(self, problem: RecordError) -> None:
        """Add a bad record. Raises its error if it exceeds the limit."""
        with self._lock:
            if str(problem) in self._problems:
                return
            if len(self) < (self.limit or 0):
                self._problems[str(problem)] = None
                return
            found = len(self) + 1
        option = "" if self.limit is None else f" (bad records: {found}, data.max_bad_records={self.limit})"
        raise RecordError(f"{problem}{option}") from problem.__cause__

    def take_new(self) -> list[str]:
        """The errors added since the last call."""
        with self._lock:
            new, self._num_reported = list(self._problems)[self._num_reported :], len(self._problems)
        return new


def check_files(paths: Sequence[Path], shards: Sequence[Shard]) -> None:
    """Raise `ValueError` naming a file that is missing or damaged, or has another number of records."""
    with ThreadPoolExecutor(16) as pool:  # opening thousands of shards on a network disk one by one is slow
        list(pool.map(_check_file, paths, shards))


def _check_file(path: Path, shard: Shard) -> None:
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        reader = ArrayRecordReader(os.fspath(path))
        count = reader.num_records()
        options = reader.writer_options_string()
        reader.close()
    except RuntimeError as error:
        raise ValueError(f"{path}: must be a complete ArrayRecord file: {_first_clause(error)}") from None
    if count != shard.records:
        raise ValueError(f"{path}: must hold {shard.records} records as in the manifest, got {count}")
    if "group_size:" in options and "group_size:1," not in f"{options},":
        logger.warning("%s: has records in groups, which are read as a whole: write it with group_size:1", path)


def _first_clause(error: Exception) -> str:
    return str(error).split(";")[0].split("\n")[0]
