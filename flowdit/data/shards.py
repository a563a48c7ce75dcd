"""Writing one ArrayRecord shard atomically.

A shard is written under a temporary name and renamed; then a sidecar file marks it as complete and describes it. Two
processes may write the same shard: their records are equal, and the temporary names differ.
"""

import dataclasses
import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from jaxtyping import Float64
from pydantic import Field
from pydantic.dataclasses import dataclass

from flowdit.data.manifest import Shard, write_json
from flowdit.data.records import encode
from flowdit.data.rejected import Rejected
from flowdit.hashing import file_sha256
from flowdit.json_input import STRICT, Count, InputError, Listed, parse_file

Sums = dict[str, Any]
"""Numbers or arrays of numbers by name."""


@dataclass(frozen=True, config=STRICT)
class Sidecar:
    """Description of a finished shard; `sums` are totals over its records, `buckets` the records of each bucket."""

    records: Annotated[int, Field(ge=0)]
    bytes: Count
    sha256: str
    sums: Sums
    rejected: Listed[Rejected] = ()
    buckets: Listed[Annotated[int, Field(ge=0)]] = ()


def latent_sums(record: Mapping[str, Any]) -> Sums:
    """Sums over the latent's positions per channel, for the channel statistics."""
    flat = record["latent"].reshape(len(record["latent"]), -1).astype(np.float64)
    return {"values_per_channel": flat.shape[1], "channel": flat.sum(1), "channel_square": np.square(flat).sum(1)}


class Tally:
    """The number of records and the sums over them, of a group that is written together."""

    def __init__(self, sums_of: Callable[[Mapping[str, Any]], Sums] = latent_sums):
        self._sums_of = sums_of
        self.records, self.sums = 0, {}

    def add(self, record: Mapping[str, Any]) -> None:
        """Count a record."""
        self.records += 1
        self._add(self._sums_of(record))

    def include(self, other: "Tally") -> None:
        """Count the records of another group."""
        self.records += other.records
        self._add(other.sums)

    def _add(self, sums: Sums) -> None:
        self.sums = self.sums | {name: self.sums.get(name, 0) + part for name, part in sums.items()}


def write_shard(
    path: epath.PathLike,
    records: Iterable[Mapping[str, Any]],
    sums_of: Callable[[Mapping[str, Any]], Sums] = latent_sums,
) -> Sidecar:
    """Write `records` to `path`, and its sidecar. Raises `OSError` on failure."""
    tally = Tally(sums_of)

    def encoded() -> Iterator[bytes]:
        for record in records:
            tally.add(record)
            yield encode(record)

    return write_encoded(path, encoded(), tally)


def write_encoded(
    path: epath.PathLike,
    records: Iterable[bytes],
    tally: Tally,
    *,
    rejected: Sequence[Rejected] = (),
    buckets: Sequence[int] = (),
) -> Sidecar:
    """The same for the bytes of records, which `tally` has counted when the last one was drawn.

    The sidecar lists the images that were left out, `rejected`.
    """
    path = Path(path)  # ArrayRecord writes local files
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        _write_file(temporary, records)
        sums = {name: np.asarray(total).tolist() for name, total in tally.sums.items()}
        size, digest = temporary.stat().st_size, file_sha256(temporary)
        sidecar = Sidecar(tally.records, size, digest, sums, tuple(rejected), tuple(buckets))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    description = temporary.with_name(temporary.name.replace(".tmp", ".json"))
    write_json(epath.Path(description), dataclasses.asdict(sidecar))
    os.replace(description, _sidecar_path(path))
    return sidecar


def _write_file(path: Path, records: Iterable[bytes]) -> None:
    # One record per group, as records are read at random and groups are read as a whole.
    writer = _writing(ArrayRecordWriter, os.fspath(path), "group_size:1")
    try:
        for record in records:
            _writing(writer.write, record)
    finally:
        _writing(writer.close)


def _writing(function: Any, *args: Any) -> Any:
    """Call `function(*args)`, converting ArrayRecord's errors, such as a full disk, to `OSError`."""
    try:
        return function(*args)
    except (RuntimeError, ValueError) as error:
        raise OSError(str(error).split(";")[0]) from None


def finished_sidecar(path: epath.PathLike) -> Sidecar:
    """The sidecar of a finished shard."""
    sidecar = read_sidecar(path)
    assert sidecar is not None, path
    return sidecar


def read_sidecar(path: epath.PathLike) -> Sidecar | None:
    """The sidecar of the shard at `path`, or None if the shard is not finished."""
    try:
        sidecar = parse_file(Sidecar, _sidecar_path(path))
        return sidecar if Path(path).stat().st_size == sidecar.bytes else None  # a local file, as above
    except FileNotFoundError:
        return None
    except InputError as problem:
        cause = problem.__cause__
        if isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError):
            raise cause from None  # a fault of the disk, not an unfinished shard
        return None


def described(shard: Shard, sidecar: Sidecar) -> Shard:
    """The entry of a finished shard that goes with `shard` of a data set: the same name and split."""
    return dataclasses.replace(shard, buckets=(), records=sidecar.records, bytes=sidecar.bytes, sha256=sidecar.sha256)


def remove_sidecar(path: epath.PathLike) -> None:
    _sidecar_path(path).unlink(missing_ok=True)


def remove_temporary(folder: epath.PathLike) -> None:
    """Remove what killed processes left of shards that they were writing. No other process may be writing one."""
    for path in Path(folder).glob("*.array_record.*"):
        if re.search(r"\.[0-9a-f]{32}\.(tmp|json)(\.tmp)?$", path.name):
            path.unlink(missing_ok=True)


def _sidecar_path(path: epath.PathLike) -> epath.Path:
    path = epath.Path(path)
    return path.with_name(path.name + ".json")


def channel_statistics(sidecars: Iterable[Sidecar]) -> tuple[Float64[np.ndarray, " channels"], ...]:
    """Mean and standard deviation of each channel over all shards, of which one must have records."""
    parts = [part for part in sidecars if part.records]
    values = sum(part.sums["values_per_channel"] for part in parts)
    mean = np.sum([part.sums["channel"] for part in parts], axis=0) / values
    mean_square = np.sum([part.sums["channel_square"] for part in parts], axis=0) / values
    return mean, np.sqrt(np.maximum(mean_square - mean**2, 0))
