"""Folders of image files, with a class for each sub-folder, or captions, or both, or neither."""

import json
import logging
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from jaxtyping import Int

from flowdit.data.captions import captions_key
from flowdit.data.images import SUFFIXES
from flowdit.data.rejected import Rejected
from flowdit.data.source_listing import Listing
from flowdit.data.sources.base import MAX_FILE_BYTES, Row, Unit, in_class_order, is_held_out
from flowdit.data.sources.caption_file import Table, read_table
from flowdit.data.sources.columns import CAPTIONS, Columns, too_large
from flowdit.data.sources.config import SourceConfig
from flowdit.data.sources.files import read_whole, reading, source_name
from flowdit.data.sources.side_files import SideFiles, find_side_files
from flowdit.data.sources.tree import Tree, open_tree
from flowdit.data.sources.units import shuffled_units
from flowdit.fields import listed, require
from flowdit.hashing import sha256
from flowdit.storage import reason

logger = logging.getLogger(__name__)

FOUND_CAPTIONS = ("metadata.jsonl", "metadata.csv")
"""Files of captions that are read without being named."""
SIDE_FILES = "side_files"
READS = 8
"""Files that are read at the same time."""


@dataclass
class FolderSource:
    """The images of a folder. `labels` are numbers of `class_names`; more is in `table` or in `side`."""

    folder: str
    names: Sequence[str]
    labels: Int[np.ndarray, " images"] | None
    table: Table | None
    side: SideFiles | None
    config: SourceConfig
    name: str
    class_names: tuple[str, ...] | None
    has_captions: bool
    key: str
    captions_key: str | None
    listing: Listing | None
    license: str = ""
    attribution: str = ""

    def units(self) -> Sequence[Unit]:
        """The units. Raises `ValueError` if no image is left to train on."""
        fraction = self.config.held_out_fraction
        keys = self.names if self.table is None or not self.table.columns.key else [row.key for row in self.table.rows]
        held_out = np.array([is_held_out(key, fraction) for key in keys])
        return list(shuffled_units(held_out, fraction, self.config.records_per_shard))

    def read(self, unit: Unit, rows: Collection[int] | None = None) -> Iterator[tuple[int, Row | Rejected]]:
        """The rows of a unit. Raises `ValueError` if the disk or the network fails."""
        wanted = [item for item in enumerate(unit.part.tolist()) if rows is None or item[0] in rows]
        yield from _ahead(lambda item: (item[0], self._row(item[1])), wanted)

    def _row(self, index: int) -> Row | Rejected:
        name = self.names[index]
        key = name.encode(errors="backslashreplace").decode()  # bytes of a name that are not UTF-8 are escaped
        path = f"{self.folder}/{name}"
        if self.listing is not None and (size := self.listing.stats[index][0]) > MAX_FILE_BYTES:
            return Rejected(key, too_large(size))
        with reading(path):
            try:
                image = read_whole(path)
            except PermissionError as problem:
                return Rejected(key, reason(problem))
            row = Row(key, image) if self.side is None else self.side.row(name, key, image)
        if isinstance(row, Rejected):
            return row
        if self.table is not None:
            row = self.table.rows[index]._replace(image=image)
            row = row if self.table.columns.key else row._replace(key=key)
        return row if self.labels is None else row._replace(label=(self.class_names or ())[self.labels[index]])


def _ahead(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """The results for `items` in their order, of which the next ones are computed in threads."""
    items = iter(items)
    with ThreadPoolExecutor(READS) as pool:
        waiting = deque(pool.submit(function, item) for item in islice(items, READS))
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(pool.submit(function, item) for item in islice(items, 1))
            yield result


def open_folder(path: str, config: SourceConfig, numbers: Collection[str]) -> FolderSource:
    """The images of the folder `path`; `numbers` are columns that filters compare.

    Raises `ValueError` if it has neither images nor class sub-folders, a class has no image, or the captions do not
    match the images.
    """
    tree = open_tree(path)
    found = next((name for name in FOUND_CAPTIONS if name in tree.loose and not config.captions), "")
    has_images = any(name.lower().endswith(SUFFIXES) for name in tree.loose)
    labels = None
    if has_images and (config.captions or found or not tree.folders):
        class_names: tuple[str, ...] | None = ()
        images, left_out = _scan(tree, "")
    else:
        class_names, images, labels, left_out = _classes(tree)
    side_files = left_out if config.captions == SIDE_FILES else []
    captions = f"{tree.folder}/{found}" if found else config.captions
    _tell_left_out([name for name in left_out if name not in side_files and name != captions.rpartition("/")[2]])
    table = side = None
    if captions == SIDE_FILES:
        side = find_side_files(tree.folder, side_files, images, config, numbers)
        side_files = sorted(side.names)
    elif captions:
        table = read_table(captions, tree.folder, images, config, numbers, has_classes=labels is not None)
    columns = _columns(config, numbers, table or side)
    if columns.label and (config.label_column or labels is None):
        labels, class_names = None, None if table is None else in_class_order(str(row.label) for row in table.rows)
    listing = tree.listing([*images, *side_files])
    return FolderSource(
        folder=tree.folder,
        names=images,
        labels=labels,
        table=table,
        side=side,
        config=config,
        name=source_name(path, tree.folder),
        class_names=class_names,
        has_captions=bool(columns.caption),
        key=listing.key,
        captions_key=_captions_key(table),
        listing=listing,
    )


def _columns(config: SourceConfig, numbers: Collection[str], read: Table | SideFiles | None) -> Columns:
    """The columns that are read. Raises `FieldError` for settings that need a file of captions, or for its lack of any."""
    require("image_column", config.image_column, not config.image_column, "must be empty for a folder of images")
    require("split", config.split, not config.split, "must be empty for a folder of images")
    if read is None:
        settings = ("label_column", "caption_column", "long_caption_column", "key_column", "keep_columns")
        given = {name: getattr(config, name) for name in settings} | {"filter.min_columns": list(numbers)}
        for name, value in given.items():
            require(name, value, not value, "must be empty for a folder without a file of captions (captions=...)")
        return Columns()
    columns = read.columns
    has_captions = not config.captions or bool(columns.caption)
    rule = f"must have a column of captions ({', '.join(CAPTIONS)}, or caption_column)"
    require("captions", config.captions, has_captions, rule)
    return columns


def _captions_key(table: Table | None) -> str | None:
    """What the records of a folder have of its file of captions, or None. In side files it is part of the source's key."""
    if table is None:
        return None
    key = captions_key([row.captions or ("", "") for row in table.rows])
    others = [[row.key, row.label, dict(row.columns)] for row in table.rows]
    has_others = bool(set(table.columns.names) - {table.columns.caption, table.columns.long_caption})
    return sha256(key + json.dumps(others)) if has_others else key


def _classes(tree: Tree) -> tuple[tuple[str, ...], list[str], np.ndarray, list[str]]:
    """Class names, image files, their class numbers, and files that are left out."""
    if not tree.folders:
        rule = "must have images or one sub-folder of them for each class"
        raise ValueError(f"source: {tree.folder} {rule}, it has neither")
    found: list[list[str]] = []
    left_out = list(tree.loose)
    for name in tree.folders:
        is_text = name.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in name)
        require("source", name, is_text, "must have class folders with names in UTF-8")
        images, others = _scan(tree, name)
        if not images:
            raise ValueError(f"source: class folder {tree.folder}/{name} has no images ({' '.join(SUFFIXES)})")
        found.append(images)
        left_out += others
    labels = np.repeat(np.arange(len(found)), [len(images) for images in found])
    return tuple(tree.folders), [image for images in found for image in images], labels, left_out


def _scan(tree: Tree, folder: str) -> tuple[list[str], list[str]]:
    """The images of a folder and its sub-folders in their order, and other files.

    Files whose name starts with a dot are in neither; hidden sub-folders are searched like others.
    """
    images: list[str] = []
    others: list[str] = []
    for name, is_regular in tree.below(folder):
        (images if is_regular and name.lower().endswith(SUFFIXES) else others).append(name)
    return images, others


def _tell_left_out(names: list[str]) -> None:
    images = [name for name in names if name.lower().endswith(SUFFIXES)]
    others = [name for name in names if not name.lower().endswith(SUFFIXES)]
    if images:
        where = "outside the class folders or not regular files"
        logger.warning("source: images that are %s are left out: %s", where, listed(images, 3))
    if others:
        logger.info("source: files without the suffix of an image are left out: %s", listed(others, 3))
