"""The same images written as each kind of source, with everything that a row can have."""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import webdataset
from PIL import Image

from flowdit.data.sources.base import Row, Source

COUNT = 10
Entry = dict[str, Any]


def make_entries() -> list[Entry]:
    """Noisy images as the bytes of a file, with everything that a row has."""
    rng = np.random.default_rng(0)
    found = []
    for i in range(COUNT):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8)).save(file, "PNG")
        kind = "blue" if i % 2 else "red"
        entry = {"image": file.getvalue(), "kind": kind, "text": f"image {i} – é", "long": f"the image {i}, {kind}"}
        found.append(entry | {"name": f"{kind}/{i:03d}.png", "license": "CC0", "score": i / 10})
    return found


def as_folder(entries: list[Entry], folder: Path) -> str:
    lines = []
    for entry in entries:
        (folder / entry["name"]).parent.mkdir(parents=True, exist_ok=True)
        (folder / entry["name"]).write_bytes(entry["image"])
        others = {name: value for name, value in entry.items() if name not in ("image", "name")}
        lines.append(json.dumps({"file_name": entry["name"], "name": entry["name"]} | others))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return str(folder)


def as_tars(entries: list[Entry], folder: Path) -> str:
    folder.mkdir()
    with webdataset.ShardWriter(str(folder / "%03d.tar"), maxcount=4, verbose=0) as writer:
        for entry in entries:
            fields = {name: entry[name] for name in ("name", "license", "score", "long")}
            key = entry["name"].partition(".")[0]
            writer.write(
                {"__key__": key, "png": entry["image"], "kind": entry["kind"], "text": entry["text"], "json": fields}
            )
    return str(folder / "{000..002}.tar")


def as_parquet(entries: list[Entry], folder: Path) -> str:
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(entries), folder / "all.parquet", row_group_size=3)
    return str(folder / "*.parquet")


def as_paths(entries: list[Entry], folder: Path) -> str:
    """A table that names files beside it."""
    for entry in entries:
        (folder / "images" / entry["name"]).parent.mkdir(parents=True, exist_ok=True)
        (folder / "images" / entry["name"]).write_bytes(entry["image"])
    table = [{**entry, "image": f"images/{entry['name']}"} for entry in entries]
    pq.write_table(pa.Table.from_pylist(table), folder / "index.parquet")
    return str(folder / "index.parquet")


def as_dataset(entries: list[Entry], folder: Path) -> str:
    columns = {name: [entry[name] for entry in entries] for name in entries[0]}
    columns["image"] = [{"bytes": image, "path": None} for image in columns["image"]]
    columns["kind"] = [("blue", "red").index(kind) for kind in columns["kind"]]
    strings = {name: datasets.Value("string") for name in ("text", "long", "name", "license")}
    kinds = datasets.ClassLabel(names=["blue", "red"])
    features = datasets.Features(image=datasets.Image(), kind=kinds, score=datasets.Value("float64"), **strings)
    data = datasets.Dataset.from_dict(columns, features=features)
    datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(str(folder))
    return str(folder)


def rows(source: Source) -> Mapping[str, Row]:
    """All rows by key. Fails if one is rejected."""
    found = [row for unit in source.units() for _, row in source.read(unit)]
    assert all(isinstance(row, Row) for row in found), found
    return {row.key: row for row in found if isinstance(row, Row)}
