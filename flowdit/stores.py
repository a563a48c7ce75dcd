"""File systems of object stores for fsspec: those of s3fs and gcsfs, which wait for a store that does not answer.

Their requests go through one method, but for the bodies of downloads. Here all are repeated while the store is busy or
away, and their errors are `OSError`s. s3fs itself gives up after seconds, with errors of other libraries.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import importlib
import importlib.util
import os
import time
from typing import Any

import fsspec
from fsspec.asyn import sync_wrapper
from fsspec.config import conf

from flowdit.errors import first_line

EXTRAS = {"s3": ("s3fs", "s3"), "gs": ("gcsfs", "gcs")}
"""By scheme: the package that reads it, and the extra of flowdit that installs it."""
PATIENCE = 120.0
"""Seconds for which a request is repeated during a run."""
START_PATIENCE = 5.0
"""The same for the first request: the store is probably misspelled or not set up."""
_LASTING = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)


class Patient:
    """A mixin of `fsspec` file systems: requests are repeated for `patience` seconds, errors are `OSError`s."""

    patience = PATIENCE
    transient: tuple[type[Exception], ...] = (OSError,)

    async def _repeated(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        until, delay = time.monotonic() + self.patience, 0.2
        while True:
            try:
                return await request(*args, **kwargs)
            except Exception as problem:  # also those of botocore and aiohttp
                if not self._may_pass(problem) or time.monotonic() + delay > until:
                    raise _as_os_error(problem) from problem
            await asyncio.sleep(delay)
            delay = min(2 * delay, 5.0)

    async def _get_file(self, *args: Any, **kwargs: Any) -> Any:
        return await self._repeated(super()._get_file, *args, **kwargs)  # type: ignore[misc]

    async def _cat_file(self, *args: Any, **kwargs: Any) -> Any:
        return await self._repeated(super()._cat_file, *args, **kwargs)  # type: ignore[misc]

    def _may_pass(self, problem: Exception) -> bool:
        """Whether an error can be over after a while: of the network, of an overloaded server."""
        status = _status(problem)
        if status is not None:
            return status == 429 or status >= 500
        return isinstance(problem, self.transient) and not isinstance(problem, _LASTING)


def _status(problem: BaseException) -> int | None:
    """The HTTP status of an answer: of botocore's errors, which s3fs translates, and of gcsfs's."""
    response = getattr(problem.__cause__, "response", None)
    if isinstance(response, dict):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    code = str(getattr(problem, "code", None))
    return int(code) if code.isdigit() else None


def _as_os_error(problem: Exception) -> OSError:
    if isinstance(problem, OSError):
        return problem
    kind = PermissionError if "credentials" in first_line(problem).lower() else OSError
    return kind(errno.EACCES if kind is PermissionError else errno.EIO, first_line(problem))


@functools.cache
def file_system(scheme: str) -> Any:
    """The file system of "s3" or "gs"; from then on `epath` uses it as well.

    Raises `ValueError` naming the extra to install.
    """
    package, extra = EXTRAS[scheme]
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"needs the package {package}: pip install 'flowdit[{extra}]'")
    os.environ["EPATH_USE_TF"] = "false"  # an installed TensorFlow would be used instead, which knows no endpoint
    kind = _s3() if scheme == "s3" else _gcs()
    for name in {"s3": ("s3", "s3a"), "gs": ("gs", "gcs")}[scheme]:
        fsspec.register_implementation(name, kind, clobber=True)
        # Other processes write to the same folders, so a listing must not be kept.
        conf.setdefault(name, {}).setdefault("use_listings_cache", False)
    return fsspec.filesystem(scheme)


def _s3() -> type:
    errors = importlib.import_module("botocore.exceptions")

    class S3(Patient, importlib.import_module("s3fs").S3FileSystem):
        transient = (OSError, errors.ConnectionError, errors.HTTPClientError)

        def __init__(self, *args: Any, **kwargs: Any):
            # Not botocore's own repetitions, of unknown length, within ours.
            config = {"retries": {"total_max_attempts": 1, "mode": "standard"}, "connect_timeout": 10}
            kwargs["config_kwargs"] = config | (kwargs.get("config_kwargs") or {})
            super().__init__(*args, **kwargs)

        async def _call_s3(self, method: str, *args: Any, **kwargs: Any) -> Any:
            return await self._repeated(super()._call_s3, method, *args, **kwargs)

        call_s3 = sync_wrapper(_call_s3)

    return S3


def _gcs() -> type:
    class GCS(Patient, importlib.import_module("gcsfs").GCSFileSystem):
        transient = (OSError, importlib.import_module("aiohttp").ClientError)

        async def _call(self, method: str, path: str, *args: Any, **kwargs: Any) -> Any:
            return await self._repeated(super()._call, method, path, *args, **kwargs)

        call = sync_wrapper(_call)

    return GCS


def first_request(scheme: str, bucket: str, folder: str) -> None:
    """List one object of a folder, with less patience. Raises `OSError` if that cannot be done."""
    files = file_system(scheme)
    files.patience = START_PATIENCE
    try:
        if scheme == "s3":
            files.call_s3("list_objects_v2", Bucket=bucket, Prefix=folder, MaxKeys=1)
        else:
            files.call("GET", "b/{}/o", bucket, prefix=folder, maxResults=1)
    finally:
        files.patience = PATIENCE
