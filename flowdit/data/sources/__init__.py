"""Sources of images for `prepare`, by kind. A package adds one with the entry point group "flowdit.sources"."""

import glob
import importlib.metadata
import os
from collections.abc import Callable, Collection, Iterator

from flowdit.data.images import SUFFIXES
from flowdit.data.sources.base import Source
from flowdit.data.sources.config import SourceConfig
from flowdit.data.sources.emoji_styles import open_emoji_styles
from flowdit.data.sources.files import expand, find, is_web, without_query
from flowdit.data.sources.folder import open_folder
from flowdit.data.sources.openmoji import open_openmoji
from flowdit.data.sources.tables import DESCRIPTIONS, open_huggingface, open_parquet
from flowdit.data.sources.tar_members import TAR_SUFFIXES
from flowdit.data.sources.webdataset import open_tars
from flowdit.errors import first_line
from flowdit.fields import FieldError, shown

Factory = Callable[[str, SourceConfig, Collection[str]], Source]
"""A function from a path, the settings, and the columns that filters compare, to a source."""
GROUP = "flowdit.sources"

SOURCES: dict[str, Factory] = {
    "openmoji": open_openmoji,
    "emoji_styles": open_emoji_styles,
    "folder": open_folder,
    "webdataset": open_tars,
    "parquet": open_parquet,
    "huggingface": open_huggingface,
}


def register_source(name: str, factory: Factory) -> None:
    """Make `source=<name>:<path>` call `factory`."""
    SOURCES[name] = factory


def open_images(config: SourceConfig, numbers: Collection[str] = ()) -> Source:
    """The source of `config`, with `numbers`, the columns that filters compare, in the `columns` of its rows.

    Raises `ValueError` with one line for one that does not exist or cannot be read, and for columns that it lacks.
    """
    config.check()
    name, _, path = config.source.partition(":")
    factory = SOURCES.get(name) or _installed(name)
    path = os.path.expanduser(config.source if factory is None else path)  # in quotes the shell leaves a ~
    return (factory or SOURCES[_kind(path)])(path, config, numbers)


def _installed(name: str) -> Factory | None:
    """The factory that an installed package offers by this name. Raises `FieldError` if it cannot be imported."""
    for entry in importlib.metadata.entry_points(group=GROUP, name=name):
        try:
            return entry.load()
        except Exception as problem:  # of a package that we do not know
            reason = f"{name} of {entry.value} cannot be loaded: {first_line(problem)}"
            raise FieldError("source", reason) from problem
    return None


def _kind(path: str) -> str:
    """The kind of the files that `path` names: that of a folder if there is an image among them."""
    found = set()
    for name in _names(path):
        if name in DESCRIPTIONS:
            return "huggingface"
        if name.lower().endswith(SUFFIXES):
            return "folder"
        kinds = {"webdataset": TAR_SUFFIXES, "parquet": (".parquet",)}
        found |= {kind for kind, suffixes in kinds.items() if name.lower().endswith(suffixes)}
    if len(found) > 1:
        raise FieldError("source", f"has tars and Parquet files: say which, as in webdataset:{path}")
    if not found and not os.path.isdir(path):
        rule = f"must be a folder of images, tars ({' '.join(TAR_SUFFIXES)}) or Parquet files (.parquet)"
        raise FieldError("source", f"{rule}, or say what it is, as in webdataset:PATH, got {shown(path)}")
    return found.pop() if found else "folder"


def _names(path: str) -> Iterator[str]:
    """Names of files within a source, those of its top folder first."""
    if os.path.isdir(path):
        for folder, _, names in os.walk(path):
            yield from (os.path.relpath(os.path.join(folder, name), path) for name in sorted(names) if name[0] != ".")
    elif is_web(path):
        yield from map(without_query, expand(path))
    elif os.path.exists(path) or glob.has_magic(path) or "{" in path or "://" in path:
        yield from (file.name for file in find(path).files)
    else:
        names = ", ".join(SOURCES)
        raise FieldError("source", f"must be {names}, or images by path; there is no file or folder {shown(path)}")
