"""The files of a source, on a disk or in a store: found by folder, `*` or `{000..099}`, and read as streams.

Files of a store are read in blocks, so that neither memory nor disk grows with their size.
"""

import contextlib
import errno
import glob
import io
import itertools
import os
import posixpath
import re
import tempfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import fsspec

from flowdit import stores
from flowdit.data.source_listing import Listing
from flowdit.errors import first_line
from flowdit.storage import connect, is_remote, reason

BLOCK = 2**22
"""Bytes of a request."""
REQUESTS = 16
"""Files that are looked up at the same time."""
MAX_BRACES = 10**6
_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")


class File(NamedTuple):
    """A file by its path or address, its name within the source, its size, and a number that a change changes."""

    path: str
    name: str
    size: int
    changed: int


class Found(NamedTuple):
    """Files in the order of their names, and the folder that they are in."""

    folder: str
    files: list[File]

    @property
    def listing(self) -> Listing:
        return Listing([file.name for file in self.files], [(file.size, file.changed) for file in self.files])


def is_address(path: str) -> bool:
    return re.match("[a-z][a-z0-9+.-]*://", path) is not None


def find(pattern: str) -> Found:
    """The files of a folder and its sub-folders, or those that a pattern names, but for hidden ones.

    Raises `ValueError` with one line if there is no such file or folder, or a store cannot be used.
    """
    paths = list(expand(pattern))
    found: list[File] = []
    patience = stores.at_the_start(_file_system(pattern)[0]) if is_web(pattern) else contextlib.nullcontext()
    with reading(pattern), patience, ThreadPoolExecutor(REQUESTS if is_web(pattern) else 1) as pool:
        for files in pool.map(_below, paths):
            found += files
    fixed = [_fixed_part(path) for path in paths]
    if len(paths) == 1 and [file.path for file in found] != paths:
        folder = fixed[0].rstrip("/")
    else:
        folder = _common_folder([posixpath.dirname(path) for path in fixed])
    prefix = folder.rstrip("/") + "/" if folder else ""
    files = [file._replace(name=without_query(file.path).removeprefix(prefix)) for file in found]
    return Found(folder, sorted(files, key=lambda file: file.name.split("/")))


def expand(pattern: str) -> Iterator[str]:
    """The paths that braces stand for: `{000..099}` and `{a,b}`. Raises `ValueError` for too many."""
    match = _BRACES.search(pattern)
    if match is None:
        yield pattern
        return
    first, last, words = match.groups()
    if words is None:
        count = int(last) - int(first) + 1
        if not 0 < count <= MAX_BRACES:
            raise ValueError(f"{pattern}: {match[0]} must count upwards, to {MAX_BRACES} files at most")
        parts = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    else:
        parts = iter(words.split(","))
    for part in parts:
        yield from expand(pattern[: match.start()] + part + pattern[match.end() :])


@contextlib.contextmanager
def reading(path: str) -> Iterator[None]:
    """Turn errors of files within into a `ValueError` that names `path`."""
    try:
        yield
    except FileNotFoundError as problem:
        raise ValueError(f"{problem.filename or path}: there is no such file or folder") from None
    except OSError as problem:
        raise ValueError(f"{path}: cannot be read: {reason(problem)}") from None


@contextlib.contextmanager
def opened(path: str) -> Iterator[io.BufferedReader]:
    """A file as a binary stream in which one can seek. Raises `OSError` for one that cannot be read, also within."""
    if not is_address(path):
        with open(path, "rb") as file:
            yield file
        return
    files, inside = _file_system(path)
    size = files.info(inside)["size"]
    if is_web(path) and (size is None or not _sends_parts(files, inside, size)):  # a server need not say the size
        with tempfile.NamedTemporaryFile(prefix="flowdit-") as copy:
            files.get_file(inside, copy.name)
            with open(copy.name, "rb") as file:
                yield file
        return
    blocks: Any = _Blocks(files, inside, size)
    with io.BufferedReader(blocks, BLOCK) as stream:
        yield stream


def _sends_parts(files: Any, path: str, size: int) -> bool:
    try:
        files.cat_file(path, start=0, end=min(size, 1))
    except stores.NoParts:
        return False
    return True


def read_whole(path: str, limit: int | None = None) -> bytes:
    """The bytes of a file, or at most one more than `limit` of them. Raises `OSError`."""
    if limit is None and is_address(path):
        files, inside = _file_system(path)
        return files.cat_file(inside)
    with opened(path) as file:
        return file.read() if limit is None else file.read(limit + 1)


class _Blocks(io.RawIOBase):
    """A file of a store by requests for parts of it, each repeated while the store is busy or away."""

    def __init__(self, files: Any, path: str, size: int):
        self._files, self._path = files, path
        self._size = size
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        self._place = max(0, start + offset)
        return self._place

    def readinto(self, buffer: Any) -> int:
        stop = min(self._place + len(buffer), self._size)
        if stop <= self._place:
            return 0
        part = self._files.cat_file(self._path, start=self._place, end=stop)[: len(buffer)]
        buffer[: len(part)] = part
        self._place += len(part)
        return len(part)


def source_name(path: str, folder: str) -> str:
    """The name of a source by its path: that of the folder, or of the only file."""
    name = without_query(path).rstrip("/").rpartition("/")[2]
    is_pattern = glob.has_magic(name) or "{" in name
    if is_address(path):
        name = folder.rpartition("/")[2] if is_pattern else name
    else:
        name = Path(folder if is_pattern else path).resolve().name
    return re.sub(r"(\.tar(\.gz)?|\.tgz|\.parquet)$", "", name)


def _fixed_part(path: str) -> str:
    """The folders of a path above the first `*`, or all of it."""
    parts = path.split("/")
    number = next((i for i, part in enumerate(parts) if glob.has_magic(part)), None)
    return path if number is None or is_web(path) else "/".join([*parts[:number], ""])


def _common_folder(folders: list[str]) -> str:
    first, last = (end([folder.split("/") for folder in folders]) for end in (min, max))
    return "/".join(a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False)))


def _below(path: str) -> list[File]:
    return list(_remote(path) if is_address(path) else _local(path))


def _local(path: str) -> Iterator[File]:
    is_pattern = glob.has_magic(path) and not os.path.exists(path)
    paths = sorted(glob.glob(path, recursive=True)) if is_pattern else [path]
    if not paths:
        raise FileNotFoundError(errno.ENOENT, "", path)
    for file in paths:
        for one in sorted(Path(file).rglob("*")) if os.path.isdir(file) else [Path(file)]:
            if not one.name.startswith(".") and not one.is_dir():
                stat = one.stat()
                yield File(str(one), "", stat.st_size, stat.st_mtime_ns)


def _remote(path: str) -> Iterator[File]:
    if is_remote(path):
        connect(path)
    files, inside = _file_system(path)
    if is_web(path):
        infos = {inside: files.info(inside)}
    elif glob.has_magic(path):
        infos = files.glob(inside, detail=True)
    else:
        infos = files.find(inside, detail=True)
    if not infos:
        raise FileNotFoundError(errno.ENOENT, "", path)
    scheme = path.partition("://")[0]
    for name, info in infos.items():
        if info.get("type") != "directory" and not posixpath.basename(name).startswith("."):
            address = name if is_address(name) else f"{scheme}://{name}"
            yield File(address, "", info.get("size") or 0, _changed(info))


def _changed(info: dict[str, Any]) -> int:
    """A number of what a store says about the version of a file."""
    versions = ("ETag", "etag", "Content-MD5", "Digest", "Last-Modified", "LastModified", "updated", "mtime")
    return zlib.crc32(str(next((info[name] for name in versions if info.get(name)), "")).encode())


def is_web(path: str) -> bool:
    return path.startswith(tuple(f"{scheme}://" for scheme in stores.WEB))


def without_query(path: str) -> str:
    """An address without what follows its `?`, which may be a password, and no part of a name."""
    return path.partition("?")[0] if is_web(path) else path


def _file_system(path: str) -> tuple[Any, str]:
    """The file system of an address, and the name of the file there. Raises `ValueError` naming a missing package."""
    scheme, _, inside = path.partition("://")
    try:
        if scheme in stores.WEB:
            return stores.file_system(scheme), path
        if scheme in stores.EXTRAS:
            return stores.file_system(scheme), inside.rstrip("/")
        return fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as problem:
        raise ValueError(f"{scheme}://: {first_line(problem)}") from None
