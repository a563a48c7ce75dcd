"""Changes to folders and files of other projects, and the line in which their conversion ends."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from runs import call, error_line

from flowdit.convert import main as convert
from flowdit.interop import read_source
from flowdit.interop.metadata import ForeignConfig

WEIGHTS = "diffusion_pytorch_model.safetensors"
TIME_WEIGHT = "transformer_blocks.{}.norm1.emb.timestep_embedder.linear_1.weight"


def copied(stock: Path, name: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stock / name, tmp_path / name))


def refused(source: Path, *options: str) -> str:
    """The error line of a conversion, which must leave no files."""
    target = source.parent / "out" / "target"
    line = error_line(call(convert, f"source={source}", f"target={target}", *options))
    assert not target.parent.exists() or not list(target.parent.iterdir())
    return line


def short(line: str) -> str:
    assert len(line) < 2_000
    return line


def unreadable(source: Path, **hints: Any) -> str:
    """The error line of `read_source`. Hundreds of commands would take too long."""
    with pytest.raises(ValueError) as caught:
        read_source(str(source), hints=ForeignConfig(**hints))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def with_tensors(folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> Path:
    tensors = safetensors.numpy.load_file(folder / WEIGHTS)
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / WEIGHTS)
    return folder


def with_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def without(file: Path, *names: str) -> None:
    """Remove fields from a JSON file."""
    file.write_text(
        json.dumps({name: value for name, value in json.loads(file.read_text()).items() if name not in names})
    )
