"""Which images are used: filters, duplicates, a limit, classes, and names that clash."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader
from list_source import ListSource, as_source, picture

from flowdit.data.preparation.duplicates import HashTable
from flowdit.data.preparation.filters import FilterConfig
from flowdit.data.prepare import prepare
from flowdit.data.records import decode
from flowdit.data.rejected import Rejected
from flowdit.data.sources.base import Row, is_held_out


def records(folder, manifest, split=None):
    """The records by key."""
    shards = [shard for shard in manifest.shards if split in (None, shard.split)]
    found = [decode(data) for s in shards for data in ArrayRecordReader(f"{folder}/{s.file}").read_all()]
    by_key = {record["key"]: record for record in found}
    assert len(by_key) == len(found)
    return by_key


def rows_of(count, **fields):
    """Rows with keys "0", "1", ..., and fields that are functions of their number."""
    made = {name: [value(i) for i in range(count)] for name, value in fields.items()}
    images = made.pop("image", [picture(16, 16, seed=i) for i in range(count)])
    return [Row(str(i), image, **{name: made[name][i] for name in made}) for i, image in enumerate(images)]


@dataclasses.dataclass
class SourceOfParts(ListSource):
    """Rows that say why they are held out."""

    kept_columns: tuple[str, ...] = ("held_out",)


@pytest.mark.parametrize("part", ["", "a\nb", "t0.0625", "t5", "a b", "a" * 41, "pär", None, 3, ["pair"]])
def test_names_of_parts_are_checked_before_anything_is_encoded(config, monkeypatch, part):
    rows = rows_of(4, columns=lambda i: {"held_out": "pair" if i else part})
    asked = dataclasses.replace(config, source=as_source(monkeypatch, SourceOfParts(rows)), held_out_fraction=0.9999)
    with pytest.raises(ValueError, match="^source: held_out of 0 must be 1 to 40 letters, digits, _ and -"):
        prepare(asked)
    assert not list(Path(config.out).glob("*.array_record"))


def test_parts_are_counted_before_anything_is_encoded(config, monkeypatch):
    rows = rows_of(60, columns=lambda i: {"held_out": f"part-{i}"})
    source = as_source(monkeypatch, SourceOfParts(rows))
    with pytest.raises(ValueError, match="^source: must have at most 20 parts of the validation split"):
        prepare(dataclasses.replace(config, source=source, held_out_fraction=0.5))
    assert not list(Path(config.out).glob("*.array_record"))


@pytest.fixture
def prepared(config, monkeypatch):
    """Prepare a list of rows; the keys of its records."""

    def prepare_rows(rows, *, has_captions=False, size=8, **changes):
        source = ListSource(rows, size=size, has_captions=has_captions)
        name = as_source(monkeypatch, source)
        changed = dataclasses.replace(config, source=name, held_out_fraction=0.0, batch_size=4, **changes)
        return sorted(map(int, records(config.out, prepare(changed))))

    return prepare_rows


def test_filters_leave_out_what_they_name(prepared, messages, config):
    sizes = [(16, 16), (16, 40), (40, 16), (12, 30), (30, 12), (64, 16)]
    rows = rows_of(
        12,
        image=lambda i: picture(*sizes[i % 6], seed=i),
        captions=lambda i: ("a" * i, "b" * (20 if i == 2 else 0)),
        columns=lambda i: {"score": [i / 10, None, 0.8][i % 3]},
    )
    asked = FilterConfig(
        min_side=16, max_aspect=2.5, min_caption_length=2, max_caption_length=10, min_columns={"score": 0.5}
    )
    kept = prepared(rows, has_captions=True, filter=asked)
    # By side: 3, 4, 9, 10 go; by aspect: 5, 11; by length: 0, 1 and 2; by column: 7.
    assert kept == [6, 8]
    line = "2 of 12 images are used: 4 by min_side, 2 by max_aspect, 2 by min_caption_length, "
    assert line + "1 by max_caption_length, 1 by min_columns.score" in messages()
    assert not Path(config.out, "rejected.jsonl").exists()


def test_of_images_with_the_same_bytes_the_first_stays(prepared):
    rows = rows_of(30, image=lambda i: picture(16, 16, seed=i if i in (3, 11) else i % 10))
    assert prepared(rows, size=7, filter=FilterConfig(duplicates=True)) == [*range(10), 11]


def test_a_duplicate_of_an_image_that_a_filter_leaves_out_is_none(prepared):
    rows = rows_of(4, image=lambda i: picture(16, 16, seed=0), captions=lambda i: ("a" * i, ""))
    asked = FilterConfig(duplicates=True, min_caption_length=2)
    assert prepared(rows, has_captions=True, filter=asked) == [2]


def test_all_hashes_are_compared_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("flowdit.data.preparation.duplicates.ROWS_AT_ONCE", 50)
    values = np.random.default_rng(0).integers(0, 400, 1000)
    hashes = np.stack([values % 20, values // 20], 1).astype(np.uint64)
    with HashTable(tmp_path, len(hashes)) as table:
        for start in range(0, 1000, 90):
            part = hashes[start : start + 90]
            table.add(part, start + np.arange(len(part)))
        found = {int(p): int(f) for r in table.repeats() for p, f in zip(r.positions, r.firsts, strict=True)}
    first = {value: i for i, value in reversed(list(enumerate(values.tolist())))}
    assert found == {i: first[value] for i, value in enumerate(values.tolist()) if first[value] != i}
    assert list(tmp_path.iterdir()) == []


def test_two_images_with_one_key_are_named(prepared):
    rows = rows_of(20)
    rows[13] = rows[13]._replace(key="2")
    where = "image 2 of unit 00000-of-00003 and image 5 of unit 00001-of-00003"
    with pytest.raises(ValueError, match=f"^source: images must have different names, {where} are both '2'$"):
        prepared(rows)


def test_a_limit_reads_the_beginning_only(config, monkeypatch):
    source = ListSource(rows_of(60), size=8)
    name = as_source(monkeypatch, source)
    small = dataclasses.replace(config, source=name, limit=20, held_out_fraction=0.3)
    found = records(config.out, prepare(small))
    assert sorted(map(int, found)) == list(range(20))
    assert max(source.asked) < 3 * 8
    held_out = records(config.out, prepare(small), "validation")
    assert set(held_out) == {key for key in found if is_held_out(key, 0.3)}


def test_a_limit_of_a_folder_leaves_images_of_both_splits(config):
    manifest = prepare(dataclasses.replace(config, limit=8, held_out_fraction=0.2))
    assert (manifest.num_records("train"), manifest.num_records("validation")) == (8, 2)


def test_classes_are_the_sorted_labels_of_all_units(config, monkeypatch):
    rows = rows_of(20, label=lambda i: ["cat", "ant", "dog"][i % 3 if i > 8 else 0])
    manifest = prepare(dataclasses.replace(config, source=as_source(monkeypatch, ListSource(rows))))
    assert manifest.class_names == ("ant", "cat", "dog")
    found = records(config.out, manifest)
    assert {key: manifest.class_names[record["label"]] for key, record in found.items()} == {
        r.key: r.label for r in rows
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.__setitem__(9, rows[9]._replace(label=None)), "^source: '9' has no label, as others have$"),
        (lambda rows: rows.__setitem__(slice(None), [Rejected(r.key, "damaged") for r in rows]), "^max_rejected: "),
    ],
)
def test_bad_rows_are_named(prepared, change, message):
    rows = rows_of(20, label=lambda i: "cat")
    change(rows)
    with pytest.raises(ValueError, match=message):
        prepared(rows)


def test_filters_that_leave_nothing_say_what_they_did(prepared):
    with pytest.raises(ValueError, match="^filter: no image is left of 6: 6 by min_side$"):
        prepared(rows_of(6), filter=FilterConfig(min_side=17))
    assert prepared(rows_of(6), filter=FilterConfig(min_side=16)) == list(range(6))  # in the same folder


def test_columns_without_numbers_are_named(prepared):
    with pytest.raises(ValueError, match="^filter.min_columns: no image has a number in column 'score'$"):
        prepared(rows_of(6, columns=lambda i: {"score": "high"}), filter=FilterConfig(min_columns={"score": 1.0}))


def test_records_say_where_they_come_from_and_what_they_show(config, monkeypatch):
    rows = rows_of(
        3,
        image=lambda i: picture(30, 20, seed=i),
        columns=lambda i: {"license": "CC0", "year": 2000 + i, "score": None, "other": 1},
    )
    changes = {"keep_columns": ["license", "year", "score"], "posterior_std": True}
    manifest = prepare(dataclasses.replace(config, source=as_source(monkeypatch, ListSource(rows)), **changes))
    found = records(config.out, manifest)
    record = found["1"]
    assert {"latent", "latent_std", "key", "content_hash", "image_size", "crop"} < record.keys()
    assert tuple(record["image_size"]) == (20, 30) and tuple(record["crop"]) == (0, 5, 20, 20)
    assert [record[f"columns.{name}"] for name in ("license", "year", "score")] == ["CC0", 2001, None]
    assert "columns.other" not in record and len(record["content_hash"]) == 16
    assert len({bytes(r["content_hash"]) for r in found.values()}) == 3


def test_what_is_rejected_by_the_source_or_by_its_header_is_listed_once(config, monkeypatch):
    rows = rows_of(20)
    rows[3] = Rejected("3", "has no image")
    rows[7] = rows[7]._replace(image=b"no image")
    rows[12] = rows[12]._replace(image=rows[12].image[:-30])
    rows[15] = rows[15]._replace(image=picture(50, 50, seed=1))
    source = as_source(monkeypatch, ListSource(rows))
    lenient = dataclasses.replace(config, source=source, max_rejected=0.2, max_pixels=400, hflip=True)
    manifest = prepare(lenient)
    lines = [json.loads(line) for line in Path(config.out, "rejected.jsonl").read_text().splitlines()]
    assert {line["file"]: line["reason"] for line in lines} == {
        "3": "has no image",
        "7": "cannot identify image file",
        "12": "image file is truncated",
        "15": "has 2500 pixels, more than max_pixels=400",
    }
    assert len(lines) == 4 and manifest.num_records("train") % 2 == 0


def test_a_source_that_changes_between_the_passes_is_noticed(config, monkeypatch):
    source = ListSource(rows_of(10))
    settings = dataclasses.replace(config, source=as_source(monkeypatch, source))

    def lose_one(task, selection, units):
        source.rows = source.rows[:-1]

    monkeypatch.setattr("flowdit.data.prepare.check_images", lose_one)
    problem = "source: unit 00001-of-00002 had 2 images at first and now 1: it changed"
    with pytest.raises(ValueError, match=f"^{problem}$"):
        prepare(settings)
