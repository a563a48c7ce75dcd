"""The files of a checkpoint folder `<run>/<step>/` and their verification.

Orbax restores flipped bits without an error, so `checksums.json` holds the SHA-256 of every file of the items.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from etils import epath
from pydantic import RootModel

from flowdit.fields import listed
from flowdit.hashing import file_sha256
from flowdit.json_input import InputError, parse_file
from flowdit.processes import from_first, gather, own_share
from flowdit.storage import files_in, has_been_committed, reason, rename

CHECKSUMS = "checksums.json"
TEMPORARY_SUFFIX = ".orbax-checkpoint-tmp"
PART_OF_CHECKSUMS = "checksums.{}.json"
"""The checksums of one process, until all are written to `CHECKSUMS`."""
ITEMS = ("state", "model_ema", "dataset", "meta", "averages")
"""The last one is of the snapshots of post-hoc EMA, which have `meta` besides."""
STEP_NAME = re.compile("0|[1-9][0-9]*")
"""The name of the folder of a step."""
MAX_INSPECTED = 1000
"""Up to this number of entries of a folder are inspected for an error message."""


class Checksums(RootModel[dict[str, str]]):
    """The SHA-256 of every file of a checkpoint by its name."""


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged or incompatible, or a folder that cannot be written."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint whose files changed after writing. An older one may be used instead."""


def list_steps(folder: epath.Path) -> list[int]:
    """Finished checkpoints in `folder`, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(int(p.name) for p in folder.iterdir() if STEP_NAME.fullmatch(p.name) and has_been_committed(p))


def what_is_in(folder: epath.Path, model_files: Sequence[str] = ()) -> str:
    """What a folder that is no checkpoint holds, for an error message: above all the run folders directly in it, and
    the folders with one of `model_files`. Sub-folders that cannot be read are only named.
    """
    if not folder.is_dir():
        return "it is a file" if folder.exists() else "there is no such folder"
    inner = sorted(folder.iterdir())
    found: dict[str, list[str]] = {"run": [], "model": []}
    for path in inner[:MAX_INSPECTED]:
        with contextlib.suppress(OSError):
            if steps := list_steps(path):
                found["run"].append(f"{path} (newest step {steps[-1]})")
            elif any((path / name).is_file() for name in model_files):
                found["model"].append(str(path))
    if parts := [f"the {kind} folders {listed(paths)}" for kind, paths in found.items() if paths]:
        return f"it holds {' and '.join(parts)}"
    return f"it holds {listed([path.name for path in inner])}" if inner else "it is empty"


def set_aside(step_folder: epath.Path) -> None:
    """Rename to `<step>.damaged` instead of deleting, as the files may still be useful."""
    target = step_folder.with_name(f"{step_folder.name}.damaged")
    rename(step_folder, target)


def write_share(step_folder: epath.PathLike, process: int) -> None:
    """Record the SHA-256 of the arrays that a process has written, for `write_checksums`.

    Orbax keeps them in a folder of that process, in every item, and does not change them again.
    """
    step_folder, sums = epath.Path(step_folder), {}
    for item in step_folder.iterdir():
        name = item.name.removesuffix(TEMPORARY_SUFFIX)  # which an item has while others are written
        own = f"ocdbt.process_{process}"
        sums |= {f"{name}/{own}/{file}": file_sha256(path) for file, path in files_in(item / own).items()}
    (step_folder / PART_OF_CHECKSUMS.format(process)).write_text(json.dumps(sums))


def write_checksums(step_folder: epath.PathLike) -> None:
    """Record the SHA-256 of every file of a checkpoint's items. Files that a process has recorded are not read again."""
    step_folder = epath.Path(step_folder)
    shares = [path for path in step_folder.iterdir() if fnmatch.fnmatch(path.name, PART_OF_CHECKSUMS.format("*"))]
    known: dict[str, str] = {}
    for share in shares:
        known |= json.loads(share.read_text())
    sums = {name: known.get(name) or file_sha256(path) for name, path in _files(step_folder).items()}
    (step_folder / CHECKSUMS).write_text(json.dumps(sums, indent=1))
    for share in shares:
        share.unlink()


def verify_files(step_folder: epath.PathLike, items: Sequence[str] = ITEMS) -> None:
    """Raise `DamagedCheckpoint` naming the first file that is missing, was not recorded, or differs from its checksum.

    Only the files of `items` are read. An existing file that cannot be read raises `CheckpointError`, as the cause may be
    the disk and not the checkpoint.
    """
    step_folder = epath.Path(step_folder)
    expected = _expected(step_folder, items)
    _compare(step_folder, expected, _hash_files(step_folder, expected))


def find_damage(step_folder: epath.Path) -> str | None:
    """The message of the `DamagedCheckpoint` that `verify_files` raises for this checkpoint, or None if it is intact.

    Every process hashes a share of the files. All processes must call it, and get the same result or `ValueError`.
    """

    def list_files() -> tuple[dict[str, str], dict[str, int], str | None]:
        try:
            expected = _expected(step_folder)
        except DamagedCheckpoint as problem:
            return {}, {}, str(problem)
        return expected, {name: (step_folder / name).stat().length for name in expected}, None

    expected, sizes, damage = from_first(list_files)
    found: dict[str, Any] = {}
    for part in gather(_hash_files(step_folder, own_share(sizes))):
        found |= part
    try:
        _compare(step_folder, expected, found)
    except DamagedCheckpoint as problem:
        return str(problem)
    return damage


def _expected(step_folder: epath.Path, items: Sequence[str] = ITEMS) -> dict[str, str]:
    """The recorded SHA-256 of every file, after a comparison of the names."""
    recorded, files = _read_checksums(step_folder / CHECKSUMS), _files(step_folder, items)
    others = set(ITEMS) - set(items)
    recorded = {name: checksum for name, checksum in recorded.items() if name.split("/")[0] not in others}
    for name in sorted(recorded.keys() - files.keys()):
        raise DamagedCheckpoint(f"{step_folder / name}: file is missing")
    for name in sorted(files.keys() - recorded.keys()):
        raise DamagedCheckpoint(f"{step_folder / name}: file is not listed in {CHECKSUMS}")
    return recorded


def _hash_files(step_folder: epath.Path, names: Iterable[str]) -> dict[str, dict[str, str]]:
    """The `sha256` of files by name, or why one `cannot be read`."""
    found = {}
    for name in names:
        try:
            found[name] = {"sha256": file_sha256(step_folder / name)}
        except OSError as problem:
            found[name] = {"cannot be read": reason(problem)}
    return found


def _compare(step_folder: epath.Path, expected: dict[str, str], found: dict[str, dict[str, str]]) -> None:
    for name, checksum in expected.items():
        if (problem := found[name].get("cannot be read")) is not None:
            raise CheckpointError(f"{step_folder / name}: cannot be read: {problem}")
        if found[name]["sha256"] != checksum:
            raise DamagedCheckpoint(f"{step_folder / name}: content differs from its checksum")


def _read_checksums(file: epath.Path) -> dict[str, str]:
    try:
        return parse_file(Checksums, file).root
    except InputError as problem:
        # A file that is there and cannot be read may be the fault of the disk.
        is_disk = isinstance(problem.__cause__, OSError) and not isinstance(problem.__cause__, FileNotFoundError)
        raise (CheckpointError if is_disk else DamagedCheckpoint)(str(problem)) from problem


def _files(step_folder: epath.Path, items: Sequence[str] = ITEMS) -> dict[str, Path | epath.Path]:
    """The files of the items by relative name.

    Orbax's own file is written again after the checksums, and other tools may add folders (.git), so both are excluded.
    """
    return {f"{item}/{name}": path for item in items for name, path in files_in(step_folder / item).items()}
