"""Writing one ArrayRecord shard atomically.

A shard is written under a temporary name and renamed; then a sidecar file marks it as complete and describes it.
"""

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from jaxtyping import Float64
from pydantic import Field
from pydantic.dataclasses import dataclass

from flowdit.data.manifest import write_json
from flowdit.data.records import encode
from flowdit.data.rejected import Rejected
from flowdit.hashing import file_sha256
from flowdit.json_input import STRICT, Count, InputError, Listed, parse_file

Sums = dict[str, Any]
"""Numbers or arrays of numbers by name."""


@dataclass(frozen=True, config=STRICT)
class Sidecar:
    """Description of a finished shard; `sums` are totals over its records (`sums_of` in `write_shard`)."""

    records: Annotated[int, Field(ge=0)]
    bytes: Count
    sha256: str
    sums: Sums
    rejected: Listed[Rejected] = ()


def latent_sums(record: Mapping[str, Any]) -> Sums:
    """Sums over the latent's positions per channel, for the channel statistics."""
    flat = record["latent"].reshape(len(record["latent"]), -1).astype(np.float64)
    return {"values_per_channel": flat.shape[1], "channel": flat.sum(1), "channel_square": np.square(flat).sum(1)}


def write_shard(
    path: epath.PathLike,
    records: Iterable[Mapping[str, Any] | Rejected],
    sums_of: Callable[[Mapping[str, Any]], Sums] = latent_sums,
) -> Sidecar:
    """Write `records` to `path`, and its sidecar, which lists those that are `Rejected`. Raises `OSError` on failure."""
    path = Path(path)  # ArrayRecord writes local files
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        rejected: list[Rejected] = []
        count, sums = _write_records(temporary, _accepted(records, rejected), sums_of)
        sidecar = Sidecar(count, temporary.stat().st_size, file_sha256(temporary), sums, tuple(rejected))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    write_json(_sidecar_path(path), dataclasses.asdict(sidecar))
    return sidecar


def _accepted(records: Iterable[Mapping[str, Any] | Rejected], rejected: list[Rejected]) -> Iterator[Mapping[str, Any]]:
    """The records, without those that are moved to `rejected`."""
    for record in records:
        if isinstance(record, Rejected):
            rejected.append(record)
        else:
            yield record


def _write_records(
    path: Path, records: Iterable[Mapping[str, Any]], sums_of: Callable[[Mapping[str, Any]], Sums]
) -> tuple[int, Sums]:
    """Write the records; their number and sums, as JSON data."""
    count, sums = 0, {}
    # One record per group, as records are read at random and groups are read as a whole.
    writer = _writing(ArrayRecordWriter, os.fspath(path), "group_size:1")
    try:
        for record in records:
            _writing(writer.write, encode(record))
            count += 1
            sums = {name: sums.get(name, 0) + part for name, part in sums_of(record).items()}
    finally:
        _writing(writer.close)
    return count, {name: np.asarray(total).tolist() for name, total in sums.items()}


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


def remove_sidecar(path: epath.PathLike) -> None:
    _sidecar_path(path).unlink(missing_ok=True)


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
