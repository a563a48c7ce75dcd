"""Parquet files, and folders of Hugging Face `datasets`, as sources of images."""

import json
import posixpath
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

from flowdit.data.records import RecordError
from flowdit.data.rejected import Rejected
from flowdit.data.source_listing import Listing
from flowdit.data.sources.base import MAX_FILE_BYTES, Row, Unit
from flowdit.data.sources.columns import Columns, choice, is_key
from flowdit.data.sources.config import SourceConfig
from flowdit.data.sources.files import REQUESTS, File, find, is_address, read_whole, reading, source_name
from flowdit.data.sources.table_files import Feature, features, library, open_table
from flowdit.data.sources.units import shard_size, unit_name
from flowdit.fields import FieldError, listed, require, shortened, shown
from flowdit.storage import reason

IMAGES = ("image", "img", "jpg", "jpeg", "png", "webp", "image_path", "path", "file_name")
DESCRIPTIONS = ("dataset_dict.json", "state.json")
"""Files that `save_to_disk` writes into a folder: one of several data sets, one of a single one."""
MAX_JSON_BYTES = 2**24
SPLITS = ("train", "validation", "valid", "val", "dev", "test")


class Part(NamedTuple):
    """Blocks of a file from `start` to `stop`, None for its end; `first` is the number of their first row in it."""

    file: int
    start: int
    stop: int | None
    first: int


@dataclass
class TableSource:
    """The rows of tables. `classes` are the names of a ClassLabel, if there is one."""

    files: Sequence[File]
    parts: Sequence[Part]
    image_column: str
    columns: Columns
    classes: tuple[str, ...]
    name: str
    class_names: tuple[str, ...] | None
    has_captions: bool
    key: str
    listing: Listing | None
    license: str
    attribution: str = ""

    def units(self) -> Sequence[Unit]:
        count = len(self.parts)
        return [Unit(unit_name(i, count), None, part) for i, part in enumerate(self.parts)]

    def read(self, unit: Unit, rows: Collection[int] | None = None) -> Iterator[tuple[int, Row | Rejected]]:
        """The rows of a unit. Raises `ValueError` for a file that is damaged, lacks a column or has other classes."""
        part: Part = unit.part
        file = self.files[part.file]
        wanted = None if rows is None else set(rows)
        names = list(dict.fromkeys([self.image_column, *self.columns.names]))
        with reading(file.path), open_table(file.path) as table:
            if missing := [name for name in names if name not in table.schema.names]:
                raise ValueError(f"{file.path}: has no column {missing[0]}, it has {listed(table.schema.names, 20)}")
            if _classes(features(table.schema), self.columns) != self.classes:
                raise ValueError(f"{file.path}: must have the classes of {self.files[0].path}")
            for number, values in table.rows(part.start, part.stop, names, wanted):
                yield number, self._row(file, part.first + number, values)

    def _row(self, file: File, number: int, values: dict[str, Any]) -> Row | Rejected:
        image = values[self.image_column]
        key = f"{file.name.rpartition('.')[0]}/{number}"
        folder = posixpath.dirname(file.name)
        if isinstance(image, str):
            named = posixpath.normpath(posixpath.join(folder, image))
            key = named if is_key(named) else key
        if isinstance(image, dict):
            image = image.get("path") if image.get("bytes") is None else image["bytes"]
        if isinstance(image, str):
            try:
                image = _file_beside(file.path, image)
            except (OSError, RecordError) as problem:
                return Rejected(key, f"{shown(image)}: {reason(problem)}")
        if self.classes and isinstance(label := values[self.columns.label], int):
            values[self.columns.label] = self.classes[label] if 0 <= label < len(self.classes) else None
        return self.columns.row(key, image if isinstance(image, bytes) else None, values)


def _file_beside(table: str, name: str) -> bytes:
    """The content of an image that a table names. Raises `OSError`, and `RecordError` for one outside of its folder."""
    inside = posixpath.normpath(name)
    if inside.startswith(("/", "..")) or is_address(name) or "::" in name or "\0" in name:
        raise RecordError("must be within the folder of the table")
    return read_whole(posixpath.join(posixpath.dirname(table), inside), MAX_FILE_BYTES)


def open_parquet(path: str, config: SourceConfig, numbers: Collection[str]) -> TableSource:
    """The Parquet files that `path` names. Raises `ValueError` if there are none, and for columns that they lack."""
    found = find(path)
    files = [file for file in found.files if file.name.lower().endswith(".parquet")]
    if not files:
        raise ValueError(f"source: {path} has no Parquet files (.parquet)")
    splits = {_split_of(file.name): None for file in files}
    _check_split(config.split, sorted(filter(None, splits)), path)
    chosen = [file for file in files if config.split in ("", _split_of(file.name))]
    return _open_tables(chosen, source_name(path, found.folder), config, numbers)


def open_huggingface(path: str, config: SourceConfig, numbers: Collection[str]) -> TableSource:
    """A folder written by `save_to_disk` of Hugging Face `datasets`, or one of Parquet files as on their hub."""
    found = find(path)
    files = {file.name: file for file in found.files}
    folder = ""
    of_several, of_one = DESCRIPTIONS
    if of_several in files:
        splits = _json(files[of_several]).get("splits")
        names = [name for name in splits if isinstance(name, str)] if isinstance(splits, list) else []
        if not names:
            raise ValueError(f"source: {path}/{of_several} must name the splits of the data set")
        _check_split(config.split, names, path)
        folder = f"{config.split or names[0]}/"
    elif of_one not in files:
        return open_parquet(path, config, numbers)
    else:
        _check_split(config.split, [], path)
    state = files.get(f"{folder}{of_one}")
    entries = [] if state is None else _json(state).get("_data_files")
    entries = entries if isinstance(entries, list) else []
    listed_files = [entry.get("filename") for entry in entries if isinstance(entry, dict)]
    tables = [files[name] for entry in listed_files if (name := f"{folder}{entry}") in files]
    if not tables or len(tables) < len(listed_files):
        raise ValueError(f"source: {path}/{folder}{of_one} must name the files of the data set, all in its folder")
    info = files.get(f"{folder}dataset_info.json")
    terms = str(_json(info).get("license") or "") if info is not None else ""
    return _open_tables(tables, source_name(path, found.folder), config, numbers, shortened(terms, 200))


def _json(file: File) -> dict[str, Any]:
    with reading(file.path):
        content = read_whole(file.path, MAX_JSON_BYTES)
    try:
        if len(content) > MAX_JSON_BYTES:
            raise ValueError(f"more than {MAX_JSON_BYTES} bytes")
        parsed = json.loads(content)
    except (ValueError, RecursionError) as problem:
        raise ValueError(f"{file.path}: is not JSON: {problem}") from None
    return parsed if isinstance(parsed, dict) else {}


def _split_of(name: str) -> str:
    """The split of a file, by its name as on the hub: `train-00000-of-00012.parquet`, `test.parquet`, `test/0.parquet`."""
    folder, base = posixpath.split(name)
    if match := re.fullmatch(r"(\w+)-\d{5,}-of-\d{5,}\.parquet", base):
        return match[1]
    words = [base.partition(".")[0], *folder.split("/")]
    return next((word for word in words if word in SPLITS), "")


def _check_split(split: str, there: Sequence[str], path: str) -> None:
    """Raise `FieldError` unless the split is among those `there`, or the only one."""
    is_chosen = split in there if split else len(there) < 2
    rule = f"must be one of {listed(there)}" if there else f"must be empty, as {path} has no splits"
    require("split", split, is_chosen, rule)


def _open_tables(
    files: Sequence[File], name: str, config: SourceConfig, numbers: Collection[str], terms: str = ""
) -> TableSource:
    require(
        "captions", config.captions, not config.captions, "must be empty for tables, which have columns of captions"
    )
    first = files[0].path
    with reading(first), open_table(first) as table:
        schema, known = table.schema, features(table.schema)
    columns = Columns.choose(config, numbers, schema.names, first)
    classes = _classes(known, columns)
    listing = Listing([file.name for file in files], [(file.size, file.changed) for file in files])
    return TableSource(
        files=files,
        parts=_parts(files, config.records_per_shard),
        image_column=_image_column(config, schema, known, first),
        columns=columns,
        classes=classes,
        name=name,
        class_names=classes or (None if columns.label else ()),
        has_captions=bool(columns.caption),
        key=listing.key,
        listing=listing,
        license=terms,
    )


def _classes(known: Mapping[str, Feature], columns: Columns) -> tuple[str, ...]:
    feature = known.get(columns.label)
    return feature.names if feature is not None else ()


def _image_column(config: SourceConfig, schema: Any, known: Mapping[str, Feature], path: str) -> str:
    """The column of the settings, or that of type Image, or one of a usual name and a type that images may have.

    Raises `FieldError` that lists the columns.
    """
    able = [name for name in schema.names if _may_hold_images(schema.field(name).type)]
    if config.image_column:
        name = choice("image_column", config.image_column, (), schema.names, path)
        kind = schema.field(name).type
        require("image_column", name, name in able, f"must hold files, or their paths, not {shortened(str(kind))}")
        return name
    of_type = [name for name, feature in known.items() if feature.kind == "Image" and name in able]
    found = next(iter([*of_type, *(name for name in IMAGES if name in able)]), "")
    if not found:
        raise FieldError("image_column", f"must name the column of the images of {path}: {listed(schema.names, 20)}")
    return found


def _may_hold_images(kind: Any) -> bool:
    types = library("pyarrow").types
    if types.is_struct(kind):
        return bool({"bytes", "path"} & {kind.field(i).name for i in range(kind.num_fields)})
    tests = (types.is_binary, types.is_large_binary, types.is_binary_view, types.is_string, types.is_large_string)
    return any(test(kind) for test in tests)


def _parts(files: Sequence[File], records_per_shard: int | None) -> list[Part]:
    """Parts of about `shard_size` rows; a block is not divided, and a remote stream is one part."""
    with ThreadPoolExecutor(REQUESTS if is_address(files[0].path) else 1) as pool:
        counts = list(pool.map(_block_rows, files))
    size = shard_size(sum(map(sum, counts)), records_per_shard)
    parts: list[Part] = []
    for file, blocks in enumerate(counts):
        if not blocks:
            parts.append(Part(file, 0, None, 0))
        start = first = rows = 0
        for block, count in enumerate(blocks):
            if rows and rows + count > size:
                parts.append(Part(file, start, block, first))
                start, first = block, first + rows
                rows = 0
            rows += count
        if blocks:
            parts.append(Part(file, start, len(blocks), first))
    return parts


def _block_rows(file: File) -> list[int]:
    """The rows of each block, or nothing for a stream that would have to be downloaded to count them."""
    if is_address(file.path) and file.name.endswith(".arrow"):
        return []
    with reading(file.path), open_table(file.path) as table:
        return table.block_rows()
