"""Files of tables, read by pyarrow in parts: Parquet by its groups of rows, Arrow streams by their batches."""

import contextlib
import importlib
import importlib.util
import itertools
import json
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from flowdit.data.sources.files import is_address, opened
from flowdit.errors import first_line
from flowdit.fields import FieldError

BUFFER = 2**20
"""Bytes of a column that are read at the same time."""


class Feature(NamedTuple):
    """What Hugging Face `datasets` say about a column: its kind, and the names of the classes of a ClassLabel."""

    kind: str
    names: tuple[str, ...] = ()


@runtime_checkable
class Table(Protocol):
    """A file of blocks of rows. `schema` is pyarrow's."""

    schema: Any

    def block_rows(self) -> list[int]:
        """The number of rows of each block."""
        ...

    def rows(
        self, start: int, stop: int | None, names: Sequence[str], wanted: Collection[int] | None
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """The columns `names` of the rows of blocks `start` to `stop`, numbered from 0; only those `wanted`, if given."""
        ...


class _Parquet:
    def __init__(self, stream: Any):
        # The defaults would read all columns of a group of rows ahead.
        self._file = library("pyarrow.parquet").ParquetFile(stream, pre_buffer=False, buffer_size=BUFFER)
        self.schema = self._file.schema_arrow

    def block_rows(self) -> list[int]:
        metadata = self._file.metadata
        return [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]

    def rows(
        self, start: int, stop: int | None, names: Sequence[str], wanted: Collection[int] | None
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        number = 0
        for block, count in list(enumerate(self.block_rows()))[start:stop]:
            if wanted is None or any(number <= row < number + count for row in wanted):
                first = number
                # One row at a time, as a few bytes of a dictionary can stand for many large values.
                for batch in self._file.iter_batches(1, [block], list(names), use_threads=False):
                    yield from _rows(batch, first, names, wanted)
                    first += batch.num_rows
            number += count


class _Stream:
    """A stream has no table of contents: what is before a block is passed over."""

    def __init__(self, stream: Any):
        self._reader = library("pyarrow").ipc.open_stream(stream)
        self.schema = self._reader.schema

    def block_rows(self) -> list[int]:
        return [batch.num_rows for batch in self._reader]

    def rows(
        self, start: int, stop: int | None, names: Sequence[str], wanted: Collection[int] | None
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        number = 0
        for batch in itertools.islice(self._reader, start, stop):
            batch.validate(full=True)  # offsets come from the file, and are not checked by reading it
            yield from _rows(batch, number, names, wanted)
            number += batch.num_rows


def _rows(
    batch: Any, first: int, names: Sequence[str], wanted: Collection[int] | None
) -> Iterator[tuple[int, dict[str, Any]]]:
    columns = {name: batch.column(name) for name in names}
    for i in range(batch.num_rows):
        if wanted is None or first + i in wanted:
            yield first + i, {name: _value(column[i]) for name, column in columns.items()}


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except ValueError:  # text that is not UTF-8, a time that Python has not
        return b""


@contextlib.contextmanager
def open_table(path: str) -> Iterator[Table]:
    """A file `*.parquet` or `*.arrow`. Raises `ValueError` with one line if it is damaged, also within; `OSError` if it
    cannot be read."""
    arrow = library("pyarrow")
    is_parquet = path.lower().partition("?")[0].endswith(".parquet")
    try:
        if is_parquet or is_address(path):
            with opened(path) as stream:
                yield _Parquet(stream) if is_parquet else _Stream(stream)
        else:
            with arrow.memory_map(path) as stream:
                yield _Stream(stream)
    except (arrow.ArrowException, OSError) as problem:
        if isinstance(problem, OSError) and (problem.errno or is_address(path)):  # of the disk or the store
            raise
        kind = "Parquet file" if is_parquet else "Arrow stream"
        raise ValueError(f"{path}: is damaged or no {kind}: {first_line(problem)}") from None


def features(schema: Any) -> dict[str, Feature]:
    """What the metadata of Hugging Face `datasets` in a schema says about its columns; nothing if there is none."""
    try:
        stored = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return {name: _feature(entry) for name, entry in stored.items() if isinstance(entry, dict)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _feature(entry: dict[str, Any]) -> Feature:
    names = entry.get("names") if entry.get("_type") == "ClassLabel" else None
    are_names = isinstance(names, list) and all(isinstance(name, str) and name.isprintable() for name in names)
    return Feature(str(entry.get("_type")), tuple(names) if are_names and names is not None else ())


def library(name: str) -> Any:
    """A module of pyarrow. Raises `FieldError` with the command that installs it."""
    if importlib.util.find_spec("pyarrow") is None:
        raise FieldError("source", "needs the package pyarrow: pip install 'flowdit[parquet]'")
    return importlib.import_module(name)
