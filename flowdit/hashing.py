"""SHA-256 of bytes, files and tensors, in hex. These digests are stored on disk, so they must not change."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from etils import epath

FINGERPRINT_DIGITS = 16


def sha256(parts: str | Iterable[bytes]) -> str:
    """64 hex digits over a text in UTF-8, or over the concatenation of `parts`."""
    digest = hashlib.sha256()
    for part in [parts.encode()] if isinstance(parts, str) else parts:
        digest.update(part)
    return digest.hexdigest()


def file_sha256(file: epath.PathLike) -> str:
    """64 hex digits over the content of `file`. Raises `OSError` if it cannot be read."""
    with epath.Path(file).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]


def fingerprint(parts: str | Iterable[bytes]) -> str:
    """The first 16 digits of `sha256`: enough to identify a network, and short enough for an error message."""
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

    For networks of several GB, where hashing every byte takes longer than reading it. Different networks of the same
    shape differ nearly everywhere, so a sample distinguishes them. It does not detect damage.
    """
    return fingerprint(_sample(name, tensors[name]) for name in sorted(tensors))


def _sample(name: str, tensor: np.ndarray) -> bytes:
    values = tensor.reshape(-1)
    # An odd stride, so that the sample of a matrix is not within one column.
    sample = values[:: max(1, values.size // 1024) | 1]
    return f"{name} {values.dtype} {tensor.shape}\n".encode() + sample.tobytes()
