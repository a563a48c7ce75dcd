"""Intentionally damaged data, and the check that a mistake gives one line and loses nothing."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from runs import LATENT_SHAPE, error_line

from flowdit.data.records import encode

SHARD = "train-0.array_record"


def contents(*folders: Path) -> dict[Path, str]:
    """Hash of every file."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def refused(run: Callable[[], Any], *kept: Path) -> str:
    """The error line of `run`, which must not change the folders `kept`."""
    before = contents(*kept)
    line = error_line(run())
    assert contents(*kept) == before
    return line


def write_payloads(folder: Path, payloads: list[bytes], file: str = SHARD) -> None:
    """Write a shard with exactly these bytes as its records, and update the manifest."""
    writer = ArrayRecordWriter(os.fspath(folder / file), "group_size:1")
    for payload in payloads:
        writer.write(payload)
    writer.close()
    agree(folder, records=len(payloads), file=file)


def agree(folder: Path, file: str = SHARD, **changes: Any) -> None:
    """Update the manifest to the shard's size and hash, so that only its content is wrong."""
    manifest = json.loads((folder / "dataset.json").read_text())
    (entry,) = [shard for shard in manifest["shards"] if shard["file"] == file]
    content = (folder / file).read_bytes()
    entry.update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest(), **changes)
    (folder / "dataset.json").write_text(json.dumps(manifest))


def write_record(folder: Path, **changes: Any) -> None:
    """Replace a shard by 24 records, with changes to record 5; a value of None removes a field."""
    good = {"latent": np.ones(LATENT_SHAPE, np.float16), "label": 1, "short_caption": "sun", "long_caption": ""}
    bad = {name: value for name, value in (good | changes).items() if value is not None}
    write_payloads(folder, [encode(bad if index == 5 else good) for index in range(24)])


def change_manifest(folder: Path, **changes: Any) -> None:
    manifest = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(manifest | changes))


def flip_bit(path: Path, where: float = 0.5) -> Path:
    content = bytearray(path.read_bytes())
    content[int(where * len(content))] ^= 1
    path.write_bytes(content)
    return path


def damage_weights(step_folder: Path) -> Path:
    """Flip a bit in the largest file of a checkpoint's EMA weights and return that file."""
    files = [path for path in (step_folder / "model_ema").rglob("*") if path.is_file()]
    return flip_bit(max(files, key=lambda path: path.stat().st_size))
