"""The shared data set of the tests in this folder."""

from pathlib import Path

import pytest
from latent_records import captioned, record_of, write_dataset


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
