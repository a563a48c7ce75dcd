"""Data sets that the tests in this folder share, and images to prepare one from."""

from pathlib import Path

import numpy as np
import pytest
from latent_records import captioned, record_of, write_dataset
from PIL import Image

from flowdit.data.prepare import PrepareConfig


@pytest.fixture
def folder(tmp_path) -> Path:
    """20 training records in shards of 13 and 7, and 7 validation records."""
    train = [record_of(i) for i in range(20)]
    write_dataset(tmp_path, {"train": [train[:13], train[13:]], "validation": [[record_of(100 + i) for i in range(7)]]})
    return tmp_path


@pytest.fixture
def captions(tmp_path) -> Path:
    """Like `folder`, with captions."""
    train, validation = ([captioned(start + i) for i in range(count)] for start, count in ((0, 20), (100, 7)))
    shards = {"train": [train[:13], train[13:]], "validation": [validation]}
    write_dataset(tmp_path / "captions", shards, has_captions=True)
    return tmp_path / "captions"


@pytest.fixture
def source(tmp_path) -> Path:
    """12 red and 12 blue noisy images of 20x16 pixels."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(("blue", "red")):
        folder = tmp_path / "source" / name
        folder.mkdir(parents=True)
        for i in range(12):
            pixels = rng.integers(0, 60, (16, 20, 3), np.uint8)
            pixels[..., 0 if label else 2] += 190
            Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    return tmp_path / "source"


@pytest.fixture
def config(source, tmp_path) -> PrepareConfig:
    """5 shards for training, 2 for validation."""
    return PrepareConfig(
        source=str(source),
        out=str(tmp_path / "out"),
        image_size=16,
        batch_size=2,
        records_per_shard=4,
        held_out_fraction=0.2,
        vae_check=0,
    )
