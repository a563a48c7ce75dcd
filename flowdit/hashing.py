"""SHA-256 of bytes, files and tensors, in hex. Files on disk hold these digests, so each must stay as it is."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

FINGERPRINT_DIGITS = 16


def sha256(parts: str | Iterable[bytes]) -> str:
    """64 hex digits over a text in UTF-8, or over the concatenation of `parts`."""
    digest = hashlib.sha256()
    for part in [parts.encode()] if isinstance(parts, str) else parts:
        digest.update(part)
    return digest.hexdigest()


def file_sha256(file: Path) -> str:
    """64 hex digits over the content of `file`. Raises `OSError` if it cannot be read."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fingerprint(parts: str | Iterable[bytes]) -> str:
    """The first 16 digits of `sha256`: they tell networks apart, and fit into an error message."""
    return sha256(parts)[:FINGERPRINT_DIGITS]


def files_fingerprint(*files: Path) -> str:
    """16 hex digits over names and contents of `files`. Raises `ValueError` naming one that cannot be read."""
    return fingerprint("".join(f"{file.name} {_readable_sha256(file)}\n" for file in files))


def _readable_sha256(file: Path) -> str:
    try:
        return file_sha256(file)
    except OSError as error:
        raise ValueError(f"{file}: not a readable file ({error})") from error


def tensors_fingerprint(tensors: Mapping[str, np.ndarray]) -> str:
    """16 hex digits over the name, dtype, shape and about a thousand evenly spread values of every tensor.

    For networks of several GB, where hashing every byte takes longer than reading it. Networks of one shape that were
    trained apart differ nearly everywhere, so a sample tells them apart; it is no check against damage.
    """
    return fingerprint(_sample(name, tensors[name]) for name in sorted(tensors))


def _sample(name: str, tensor: np.ndarray) -> bytes:
    values = tensor.reshape(-1)
    # An odd stride, or a sample of a matrix could stay within one column.
    sample = values[:: max(1, values.size // 1024) | 1]
    return f"{name} {values.dtype} {tensor.shape}\n".encode() + sample.tobytes()
