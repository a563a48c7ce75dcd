"""File systems for fsspec: those of s3fs, gcsfs and of the web, which wait for a store that does not answer.

Their requests go through one method, but for the bodies of downloads. Here all are repeated while the store is busy or
away, and their errors are `OSError`s. s3fs itself gives up after seconds, with errors of other libraries.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import importlib
import importlib.util
import os
import time
from collections.abc import Iterator
from typing import Any

import fsspec
from fsspec.asyn import sync_wrapper
from fsspec.config import conf

from flowdit.errors import first_line

EXTRAS = {"s3": ("s3fs", "s3"), "gs": ("gcsfs", "gcs")}
"""By scheme: the package that reads it, and the extra of flowdit that installs it."""
WEB = {"https": ("aiohttp", "http"), "http": ("aiohttp", "http")}
"""The same for addresses whose files can be read, but not written or listed."""
PATIENCE = 120.0
"""Seconds for which a request is repeated during a run."""
START_PATIENCE = 5.0
"""The same for the first request: the store is probably misspelled or not set up."""


class NoParts(OSError):
    """A web server that sends whole files only."""


_LASTING = (NoParts, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)

_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


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
        is_local = isinstance(problem, OSError) and problem.errno in _OF_THE_DISK
        return isinstance(problem, self.transient) and not isinstance(problem, _LASTING) and not is_local


def _status(problem: BaseException) -> int | None:
    """The HTTP status of an answer: of botocore's errors, which s3fs translates, of aiohttp's and of gcsfs's."""
    response = getattr(problem.__cause__, "response", None)
    if isinstance(response, dict):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    code = str(getattr(problem, "status", None) or getattr(problem, "code", None))
    return int(code) if code.isdigit() else None


def _as_os_error(problem: Exception) -> OSError:
    if isinstance(problem, OSError):
        return problem
    kind = PermissionError if "credentials" in first_line(problem).lower() else OSError
    return kind(errno.EACCES if kind is PermissionError else errno.EIO, first_line(problem))


@functools.cache
def file_system(scheme: str) -> Any:
    """The file system of a scheme of `EXTRAS`, which `epath` uses as well from then on, or of `WEB`.

    Raises `ValueError` naming the extra to install.
    """
    package, extra = (EXTRAS | WEB)[scheme]
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"needs the package {package}: pip install 'flowdit[{extra}]'")
    if scheme in WEB:
        return _web()()
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


def _web() -> type:
    aiohttp = importlib.import_module("aiohttp")

    class Web(Patient, importlib.import_module("fsspec.implementations.http").HTTPFileSystem):
        transient = (OSError, asyncio.TimeoutError, aiohttp.ClientError)

        def __init__(self, *args: Any, **kwargs: Any):
            # aiohttp's own limit is for the whole file.
            kwargs["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=60)}
            super().__init__(*args, **kwargs)

        async def _info(self, *args: Any, **kwargs: Any) -> Any:
            return await self._repeated(self._own_info, *args, **kwargs)

        async def _own_info(self, *args: Any, **kwargs: Any) -> Any:
            try:
                return await super()._info(*args, **kwargs)
            except FileNotFoundError as problem:  # also of a server that is busy or away
                if problem.__cause__ is None or _status(problem.__cause__) in (404, 410):
                    raise
                raise problem.__cause__ from None

        async def _cat_file(self, url: str, start: int | None = None, end: int | None = None, **_: Any) -> Any:
            return await self._repeated(self._part, url, start or 0, end)

        async def _part(self, url: str, start: int, end: int | None) -> bytes:
            if start == end:
                return b""
            headers = {"Range": f"bytes={start}-{'' if end is None else end - 1}", "Accept-Encoding": "identity"}
            session = await self.set_session()
            async with session.get(self.encode_url(url), headers=headers) as answer:
                self._raise_not_found_for_status(answer, url)
                if answer.status != 206 and end is not None:
                    raise NoParts(f"{url}: the server sends whole files only")
                return await answer.read()

    return Web


@contextlib.contextmanager
def at_the_start(files: Any) -> Iterator[None]:
    """Less patience for requests within: the address is probably misspelled, or the store not set up."""
    files.patience = START_PATIENCE
    try:
        yield
    finally:
        files.patience = PATIENCE


def first_request(scheme: str, bucket: str, folder: str) -> None:
    """List one object of a folder, with less patience. Raises `OSError` if that cannot be done."""
    files = file_system(scheme)
    with at_the_start(files):
        if scheme == "s3":
            files.call_s3("list_objects_v2", Bucket=bucket, Prefix=folder, MaxKeys=1)
        else:
            files.call("GET", "b/{}/o", bucket, prefix=folder, maxResults=1)
