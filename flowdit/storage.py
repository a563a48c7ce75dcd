"""Folders in object stores, `s3://bucket/...` and `gs://bucket/...`: all that differs from folders on a local disk.

Objects are written whole. They cannot be appended to or renamed, there are no empty folders, and no limit of space.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath

from flowdit import stores
from flowdit.errors import first_line
from flowdit.fields import require

COMMITTED = "commit_success.txt"
"""The object that Orbax writes last into a checkpoint in an object store."""


def is_remote(path: epath.PathLike) -> bool:
    """Whether `path` is in an object store."""
    return str(path).startswith(tuple(f"{scheme}://" for scheme in stores.EXTRAS))


def require_local(field: str, path: str | None) -> None:
    """Raise `FieldError` for a folder in an object store, where only local ones can be written."""
    is_local = path is None or not is_remote(path)
    require(field, path, is_local, "must be a local folder, which can be copied to an object store afterwards")


def connect(path: epath.PathLike) -> epath.Path:
    """`path` as an `epath.Path`. Its object store is asked once in a process whether the folder can be used.

    Raises `ValueError` with one line: the package that is missing, no credentials, no such bucket, no answer.
    """
    if is_remote(path):
        scheme, _, rest = str(path).partition("://")
        bucket, _, folder = rest.partition("/")
        try:
            _ask(scheme, bucket, folder)
        except FileNotFoundError:
            raise ValueError(f"{path}: there is no bucket {bucket}") from None
        except PermissionError as problem:
            raise ValueError(f"{path}: access to the bucket {bucket} is refused: {reason(problem)}") from None
        except (OSError, ValueError) as problem:
            raise ValueError(f"{path}: the store cannot be used: {reason(problem)}") from None
    return epath.Path(path)


@functools.cache  # not of errors
def _ask(scheme: str, bucket: str, folder: str) -> None:
    stores.first_request(scheme, bucket, folder)  # of the folder: credentials may be limited to it


def reason(problem: Exception) -> str:
    """Why a file cannot be used, in one line: errors of stores have no `strerror`."""
    if isinstance(problem, OSError) and problem.strerror:
        return problem.strerror
    is_missing = isinstance(problem, FileNotFoundError)
    return "No such file or directory" if is_missing else first_line(problem)


def absolute(path: epath.Path) -> epath.Path:
    """An absolute path, as Orbax needs; `epath` would make a local one of that of an object."""
    return path if is_remote(path) else path.resolve()


def files_in(folder: epath.Path) -> dict[str, Path | epath.Path]:
    """The files in a folder and its sub-folders by relative name, sorted; none if there is no such folder."""
    if not is_remote(folder):
        local = Path(folder)  # epath finds no files in sub-folders, and takes a pipe for a file
        return {p.relative_to(local).as_posix(): p for p in sorted(local.rglob("*")) if p.is_file()}
    files, inside = _file_system(folder)
    names = [name.removeprefix(f"{inside}/") for name in sorted(files.find(inside))]
    return {name: folder / name for name in names if name and not name.endswith("/")}


def file_sizes(folder: epath.Path) -> dict[str, int]:
    """The sizes in bytes of the objects in a folder of an object store, by relative name. Raises `OSError`."""
    files, inside = _file_system(folder)
    return {name.removeprefix(f"{inside}/"): info["size"] for name, info in files.find(inside, detail=True).items()}


def has_been_committed(folder: epath.Path) -> bool:
    """Whether a checkpoint is finished. On a disk it gets its name by a renaming at the end, in a store its last object."""
    return (folder / COMMITTED).exists() if is_remote(folder) else folder.is_dir()


def free_bytes(folder: epath.Path) -> int | None:
    """Free space of a disk; None in an object store."""
    return None if is_remote(folder) else shutil.disk_usage(folder).free


def rename(folder: epath.Path, target: epath.Path) -> None:
    """Rename a folder, replacing `target`.

    In an object store the objects are copied by the server and then deleted. The first one deleted is that which marks
    a finished checkpoint, so that an interrupted renaming does not look like one.
    """
    with contextlib.suppress(OSError):
        target.rmtree(missing_ok=True)
    if not is_remote(folder):
        folder.rename(target)
        return
    (folder / COMMITTED).unlink(missing_ok=True)
    files, inside = _file_system(folder)
    files.copy(f"{inside}/", f"{_file_system(target)[1]}/", recursive=True)
    files.rm(inside, recursive=True)


def write_whole(file: epath.Path, text: str) -> None:
    """Write a text file, whole or not at all, replacing an earlier one. Raises `OSError`."""
    if is_remote(file):  # an object appears when it is whole
        file.write_text(text)
        return
    unfinished = file.with_name(f"{file.name}.unfinished")
    unfinished.write_text(text)
    unfinished.replace(file)


@contextlib.contextmanager
def written_locally(folder: epath.Path) -> Iterator[Path]:
    """A local folder to write to: `folder` itself, or a temporary one that is copied to the store at the end."""
    if not is_remote(folder):
        yield Path(folder)
        return
    with tempfile.TemporaryDirectory(prefix="flowdit-") as local:
        yield Path(local)
        files, inside = _file_system(folder)
        files.put(f"{local}/", f"{inside}/", recursive=True)


def download(source: epath.Path, target: Path) -> None:
    """Copy an object to a local file, with little memory. Raises `OSError`."""
    files, inside = _file_system(source)
    files.get_file(inside, str(target))


def _file_system(path: epath.PathLike) -> tuple[Any, str]:
    scheme, _, inside = str(path).partition("://")
    return stores.file_system(scheme), inside.rstrip("/")
