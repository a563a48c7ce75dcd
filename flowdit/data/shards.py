"""Writing one ArrayRecord shard so that an interruption leaves nothing half-written behind.

A shard is written under a temporary name and renamed; then a sidecar says that it is whole and what it holds.
"""

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from jaxtyping import Float64

from flowdit.data.manifest import file_sha256, write_json
from flowdit.data.records import encode


@dataclass(frozen=True)
class Sidecar:
    """What a finished shard holds; sums are over the latents' positions, one a channel."""

    records: int
    bytes: int
    sha256: str
    values_per_channel: int
    channel_sum: list[float]
    channel_square_sum: list[float]


def write_shard(path: Path, records: Iterable[Mapping[str, Any]]) -> Sidecar:
    """Write `records` (at least one, each with a `latent`) to `path` and its sidecar beside it. `OSError` if it cannot."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        count, values, sums = _write_records(temporary, records)
        sidecar = Sidecar(count, temporary.stat().st_size, file_sha256(temporary), values, *sums.tolist())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    write_json(_sidecar_path(path), dataclasses.asdict(sidecar))
    return sidecar


def _write_records(path: Path, records: Iterable[Mapping[str, Any]]) -> tuple[int, int, np.ndarray]:
    """Number of records, of values in each channel, and the (2, channels) sums of values and of their squares."""
    count = values = 0
    sums: Any = 0.0
    # One record a group: Grain reads single records at random, and a group is read whole.
    writer = _writing(ArrayRecordWriter, os.fspath(path), "group_size:1")
    try:
        for record in records:
            _writing(writer.write, encode(record))
            flat = record["latent"].reshape(len(record["latent"]), -1).astype(np.float64)
            sums = sums + np.stack([flat.sum(1), np.square(flat).sum(1)])
            count, values = count + 1, values + flat.shape[1]
    finally:
        _writing(writer.close)
    return count, values, sums


def _writing(function: Any, *args: Any) -> Any:
    """`function(*args)` with ArrayRecord's errors, a full disk among them, as the `OSError`s that they are."""
    try:
        return function(*args)
    except (RuntimeError, ValueError) as error:
        raise OSError(str(error).split(";")[0]) from None


def read_sidecar(path: Path) -> Sidecar | None:
    """The sidecar of the shard at `path`, or None if that shard has not been finished."""
    try:
        sidecar = Sidecar(**json.loads(_sidecar_path(path).read_text(encoding="utf-8")))
        return sidecar if path.stat().st_size == sidecar.bytes else None
    except (FileNotFoundError, ValueError, TypeError):
        return None


def remove_sidecar(path: Path) -> None:
    _sidecar_path(path).unlink(missing_ok=True)


def _sidecar_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def channel_statistics(sidecars: Iterable[Sidecar]) -> tuple[Float64[np.ndarray, " channels"], ...]:
    """Mean and standard deviation of each channel over all shards."""
    parts = list(sidecars)
    values = sum(part.values_per_channel for part in parts)
    mean = np.sum([part.channel_sum for part in parts], axis=0) / values
    mean_square = np.sum([part.channel_square_sum for part in parts], axis=0) / values
    return mean, np.sqrt(np.maximum(mean_square - mean**2, 0))
