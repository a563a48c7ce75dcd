"""Reference images and statistics in a `.npz` file, as guided-diffusion (ADM) publishes them.

`mu` and `sigma` are mean and covariance of the Inception features of all reference images, `arr_0` holds uint8 images
(n, height, width, 3). Either may be missing. The file is untrusted: nothing in it is unpickled, shapes are checked before
arrays are read, and images are read batch by batch.
"""

from __future__ import annotations

import contextlib
import math
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from flowdit.errors import first_line
from flowdit.fields import require
from flowdit.scores.moments import Moments

MAX_WIDTH = 4096
"""Features of the statistics: the covariance has 128 MB."""
COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""Those that numpy writes; others may expand a small file without bound."""


class Archive(NamedTuple):
    """What a file holds. `shape` is that of its images, (n, height, width, 3), or None."""

    path: Path
    statistics: Moments | None
    shape: tuple[int, ...] | None

    def images(self, batch_size: int) -> Iterator[UInt8[np.ndarray, "n height width 3"]]:
        """Batches of the images in their order; the last one may be smaller. Raises `ValueError` for a damaged file."""
        assert self.shape is not None
        count, *item = self.shape
        with _reading(self.path), zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as file:
            _read_header(file)
            for start in range(0, count, batch_size):
                yield _read_array(file, np.dtype(np.uint8), (min(batch_size, count - start), *item))


def open_archive(path: Path) -> Archive:
    """Read the statistics of a file and the shape of its images. Raises `ValueError` with one line, naming the file."""
    with _reading(path), zipfile.ZipFile(path) as archive:
        names = {info.filename: info for info in archive.infolist()}
        for info in names.values():
            require(info.filename, info.compress_type, info.compress_type in COMPRESSIONS, "must be stored or deflated")
        shape = None
        if "arr_0.npy" in names:
            with archive.open("arr_0.npy") as file:
                dtype, shape = _read_header(file)
            is_images = dtype == np.uint8 and len(shape) == 4 and shape[-1] == 3 and all(shape)
            require("arr_0", f"{dtype} {shape}", is_images, "must be uint8 images of shape (n, height, width, 3)")
        statistics = _read_statistics(archive) if {"mu.npy", "sigma.npy"} <= names.keys() else None
        is_known = statistics is not None or shape is not None
        require("arrays", sorted(names), is_known, "must be mu and sigma, or arr_0, or all three")
    return Archive(path, statistics, shape)


def _read_statistics(archive: zipfile.ZipFile) -> Moments:
    with archive.open("mu.npy") as file:
        dtype, shape = _read_header(file)
        is_vector = dtype.kind == "f" and len(shape) == 1 and 1 <= shape[0] <= MAX_WIDTH
        require("mu", f"{dtype} {shape}", is_vector, f"must be a vector of 1 to {MAX_WIDTH} floats")
        mean = _read_array(file, dtype, shape).astype(np.float64)
    with archive.open("sigma.npy") as file:
        dtype, found = _read_header(file)
        is_square = dtype.kind == "f" and found == shape * 2
        require("sigma", f"{dtype} {found}", is_square, f"must be floats of shape {shape * 2}, as mu has {shape}")
        covariance = _read_array(file, dtype, found).astype(np.float64)
    is_finite = bool(np.isfinite(mean).all() and np.isfinite(covariance).all())
    require("mu, sigma", "NaN or infinite values", is_finite, "must be finite")
    is_symmetric = np.allclose(covariance, covariance.T, rtol=1e-4, atol=1e-6 * np.abs(covariance).max())
    require("sigma", "another matrix", is_symmetric, "must be symmetric")
    return Moments(0, mean, (covariance + covariance.T) / 2)


def _read_header(file: Any) -> tuple[np.dtype, tuple[int, ...]]:
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    require("version", version, version in readers, "must be 1.0 or 2.0")
    shape, is_fortran, dtype = readers[version](file)
    require("fortran_order", is_fortran, not is_fortran, "must be False")
    return dtype, shape


def _read_array(file: Any, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    data = file.read(size)
    if len(data) != size:
        raise ValueError(f"must hold {size} more bytes, has {len(data)}")
    return np.frombuffer(data, dtype).reshape(shape)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Name the file in errors of reading it; hostile bytes can raise any of these."""
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError, OverflowError, MemoryError) as error:
        raise ValueError(f"{path}: is not a readable .npz file: {first_line(error)}") from error
