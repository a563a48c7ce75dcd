"""The same images as a folder, WebDataset tars, Parquet, and a data set of Hugging Face: the same rows."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from written_sources import (
    COUNT,
    Entry,
    as_dataset,
    as_folder,
    as_parquet,
    as_paths,
    as_tars,
    make_entries,
    rows,
)

from flowdit.data.sources import open_images
from flowdit.data.sources.base import Row, is_held_out
from flowdit.data.sources.config import SourceConfig


@pytest.fixture(scope="module")
def entries() -> list[Entry]:
    return make_entries()


@pytest.mark.parametrize("write", [as_folder, as_tars, as_parquet, as_paths, as_dataset])
def test_each_kind_has_the_same_rows_and_is_recognised(entries, tmp_path, write):
    path = write(entries, tmp_path / "images")
    config = SourceConfig(
        source=path,
        label_column="kind",
        caption_column="text",
        long_caption_column="long",
        key_column="name",
        keep_columns=["license"],
        split="train" if write is as_dataset else "",
        records_per_shard=4,
        held_out_fraction=0.5,
    )
    source = open_images(config, ["score"])
    assert source.name == ("index" if write is as_paths else "images")
    assert source.has_captions and source.class_names in (None, ("blue", "red"))
    found = rows(source)
    assert len(found) == COUNT
    for entry in entries:
        columns = {"license": "CC0", "score": entry["score"]}
        expected = Row(entry["name"], entry["image"], entry["kind"], (entry["text"], entry["long"]), columns)
        assert found[entry["name"]] == expected
    for unit in source.units():
        everything = list(source.read(unit))
        assert [number for number, _ in everything] == list(range(len(everything)))
        assert list(source.read(unit, {1, 3})) == [pair for pair in everything if pair[0] in (1, 3)]
        assert unit.split in (None, *({"validation"} if is_held_out(everything[0][1].key, 0.5) else {"train"}))


@pytest.mark.parametrize(
    ("write", "first"),
    [
        (as_tars, "000/red/000"),
        (as_parquet, "all/0"),
        (as_paths, "images/red/000.png"),
        (as_dataset, "train/data-00000-of-00001/0"),
    ],
)
def test_what_a_kind_finds_by_itself(entries, tmp_path, write, first):
    """The usual names of columns, and keys within the source."""
    path = write(entries, tmp_path / "images")
    source = open_images(SourceConfig(source=path, split="train" if write is as_dataset else ""))
    row = rows(source)[first]
    assert (row.captions, row.label) == ((entries[0]["text"], ""), None) and source.class_names == ()


def test_a_folder_of_files_of_a_kind_is_recognised_with_other_files_beside_them(entries, tmp_path):
    for write in (as_tars, as_parquet):
        write(entries, tmp_path / write.__name__)
        (tmp_path / write.__name__ / "readme.md").write_text("data")
        assert len(rows(open_images(SourceConfig(source=str(tmp_path / write.__name__))))) == COUNT


def test_units_of_tables_are_whole_groups_of_about_the_size_asked_for(entries, tmp_path):
    path = as_parquet(entries, tmp_path / "images")
    counts = []
    for size in (1, 4, 6, 100):
        source = open_images(SourceConfig(source=path, records_per_shard=size))
        counts.append([len(list(source.read(unit))) for unit in source.units()])
    assert counts == [[3, 3, 3, 1], [3, 3, 3 + 1], [6, 3 + 1], [10]]


def test_splits_of_the_hub_are_chosen_by_the_names_of_files(entries, tmp_path):
    folder = tmp_path / "hub" / "data"
    as_parquet(entries, tmp_path / "hub")
    folder.mkdir()
    for split, count in (("train", 7), ("test", 2)):
        pq.write_table(pa.Table.from_pylist(entries[:count]), folder / f"{split}-00000-of-00001.parquet")
    (tmp_path / "hub" / "all.parquet").unlink()
    config = SourceConfig(source=f"huggingface:{tmp_path / 'hub'}")
    with pytest.raises(ValueError, match=r"^split: must be one of test, train, got ''$"):
        open_images(config)
    config.split = "train"
    assert len(rows(open_images(config))) == 7


def test_a_change_of_a_file_changes_the_key(entries, tmp_path):
    path = as_parquet(entries, tmp_path / "images")
    before = open_images(SourceConfig(source=path)).key
    assert open_images(SourceConfig(source=path)).key == before
    pq.write_table(pa.Table.from_pylist(entries[:5]), tmp_path / "images" / "all.parquet")
    assert open_images(SourceConfig(source=path)).key != before
