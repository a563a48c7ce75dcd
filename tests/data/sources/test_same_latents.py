"""From each kind of source to a data set: the same images give the same records, to the bit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader
from written_sources import COUNT, as_dataset, as_folder, as_parquet, as_paths, as_tars, make_entries

from flowdit.data.manifest import Manifest, verify
from flowdit.data.prepare import PrepareConfig, prepare
from flowdit.data.records import decode

KINDS = (as_folder, as_tars, as_parquet, as_paths, as_dataset)


def records(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The records by split and key."""
    found = {}
    for shard in Manifest.read(folder).shards:
        for record in ArrayRecordReader(str(folder / shard.file)).read_all():
            fields = decode(record)
            found[shard.split, fields["key"]] = fields
    return found


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> dict[str, dict[tuple[str, str], dict[str, Any]]]:
    """The records by the name of the kind of source."""
    found = {}
    for write in KINDS:
        folder = tmp_path_factory.mktemp(write.__name__)
        config = PrepareConfig(
            source=write(make_entries(), folder / "images"),
            split="train" if write is as_dataset else "",
            label_column="kind",
            caption_column="text",
            long_caption_column="long",
            key_column="name",
            keep_columns=["license", "score"],
            out=str(folder / "out"),
            image_size=16,
            batch_size=4,
            records_per_shard=4,
            held_out_fraction=0.7,
            vae_check=0,
        )
        manifest = prepare(config)
        verify(config.out, manifest)
        assert (manifest.class_names, manifest.has_captions) == (("blue", "red"), True)
        found[write.__name__] = records(Path(config.out))
    return found


@pytest.mark.parametrize("kind", [write.__name__ for write in KINDS[1:]])
def test_records_are_those_of_the_folder_to_the_bit(prepared, kind):
    expected = prepared["as_folder"]
    assert prepared[kind].keys() == expected.keys() and len(expected) == COUNT
    assert {split for split, _ in expected} == {"train", "validation"}
    for key, record in prepared[kind].items():
        assert record.keys() == expected[key].keys()
        for name, value in record.items():
            np.testing.assert_array_equal(value, expected[key][name], err_msg=f"{key} {name}")
