"""The files of a folder of images, on a disk or in a store, by their names within it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from flowdit.data.source_listing import Listing
from flowdit.data.sources.files import File, find, is_address


@runtime_checkable
class Tree(Protocol):
    """`loose` are the files directly in `folder`, and `folders` its sub-folders, both in their order and not hidden."""

    folder: str
    loose: Sequence[str]
    folders: Sequence[str]

    def below(self, folder: str) -> list[tuple[str, bool]]:
        """Names of all files in a sub-folder ("": in all) that are not hidden, and whether each is a regular file."""
        ...

    def listing(self, names: Sequence[str]) -> Listing:
        """These files with their sizes and times."""
        ...


@dataclass
class _Local:
    folder: str
    loose: Sequence[str]
    folders: Sequence[str]

    def below(self, folder: str) -> list[tuple[str, bool]]:
        root = Path(self.folder)
        paths = [path for path in sorted((root / folder).rglob("*")) if not path.name.startswith(".")]
        return [(path.relative_to(root).as_posix(), path.is_file()) for path in paths if not path.is_dir()]

    def listing(self, names: Sequence[str]) -> Listing:
        return Listing.of([Path(self.folder, name) for name in names], names)


@dataclass
class _Store:
    folder: str
    loose: Sequence[str]
    folders: Sequence[str]
    files: dict[str, File]

    def below(self, folder: str) -> list[tuple[str, bool]]:
        return [(name, True) for name in self.files if not folder or name.startswith(f"{folder}/")]

    def listing(self, names: Sequence[str]) -> Listing:
        return Listing(names, [(self.files[name].size, self.files[name].changed) for name in names])


def open_tree(folder: str) -> Tree:
    """The files of `folder`. Raises `ValueError` if there is none."""
    if not is_address(folder):
        if not Path(folder).is_dir():
            raise ValueError(f"source: there is no folder {folder!r}")
        entries = [(path.name, path.is_dir()) for path in sorted(Path(folder).iterdir()) if path.name[:1] != "."]
        folders = [name for name, is_folder in entries if is_folder]
        return _Local(folder.rstrip("/") or "/", [name for name, is_folder in entries if not is_folder], folders)
    found = find(folder)
    files = {file.name: file for file in found.files}
    folders = dict.fromkeys(name.partition("/")[0] for name in files if "/" in name)
    return _Store(found.folder, [name for name in files if "/" not in name], list(folders), files)
