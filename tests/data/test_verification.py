"""`flowdit.verify`: what it finds, what it says, and that it changes nothing."""

import dataclasses
import json
import pickle
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from latent_records import NUM_CLASSES, word_encoder
from runs import call

from flowdit.data.manifest import Bucket, Manifest, Shard, VaeInfo
from flowdit.data.records import encode
from flowdit.data.shards import channel_statistics, write_shard
from flowdit.data.text_features import write_cache
from flowdit.data.verification import VerifyConfig, verify_data
from flowdit.hashing import file_sha256
from flowdit.verify import main

TRAIN, VALIDATION = "train-00000-of-00001.array_record", "validation-00000-of-00001.array_record"
SHAPES = ((4, 2, 2), (4, 1, 3))
COUNTS = {TRAIN: (6, 3), VALIDATION: (0, 4)}


def records_of(file: str) -> list[dict[str, Any]]:
    """Records with all fields, first those of the square bucket."""
    shapes = [shape for shape, count in zip(SHAPES, COUNTS[file], strict=True) for _ in range(count)]
    noise = np.random.default_rng(len(shapes))
    return [
        {
            "latent": noise.standard_normal(shape).astype(np.float16),
            "label": i % NUM_CLASSES,
            "short_caption": f"w{i}",
            "long_caption": "" if i == 3 else f"w{i} long a b c d",
            "key": f"{file[:5]}/{i}.jpg",
            "content_hash": bytes([i]) * 16,
            "image_size": (40, 60),
            "crop": (0, 10, 40, 40),
            "columns.license": "CC0",
            "columns.score": 0.5,
        }
        for i, shape in enumerate(shapes)
    ]


@pytest.fixture
def data(intact, tmp_path) -> Path:
    return shutil.copytree(intact, tmp_path / "data")


@pytest.fixture(scope="module")
def intact(tmp_path_factory) -> Path:
    """Two shards with two buckets, and their text features."""
    folder = tmp_path_factory.mktemp("intact")
    shards, sidecars = [], {}
    for file, counts in COUNTS.items():
        sidecars[file] = one = write_shard(folder / file, records_of(file))
        (folder / f"{file}.json").unlink()
        split = "train" if file == TRAIN else "validation"
        shards.append(Shard(file, split, one.records, one.bytes, one.sha256, counts))
    mean, std = channel_statistics([sidecars[TRAIN]])
    manifest = Manifest(
        latent_shape=SHAPES[0],
        latent_dtype="float16",
        has_latent_std=False,
        vae=VaeInfo(name="none", fingerprint="0", shift=0.0, scale=1.0, stride=8),
        image_size=16,
        channel_mean=tuple(mean.tolist()),
        channel_std=tuple(std.tolist()),
        class_names=tuple("abcde"),
        has_captions=True,
        buckets=(Bucket(16, 16), Bucket(8, 24)),
        shards=tuple(shards),
        license="",
        attribution="",
    )
    manifest.write(folder)
    write_cache(folder / "text_features", folder, manifest, word_encoder())
    return folder


def rewrite(folder: Path, file: str, records: Iterable[bytes]) -> None:
    """Write a shard anew, with the size and hash that the manifest has of it."""
    writer = ArrayRecordWriter(str(folder / file), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    manifest = Manifest.read(folder)
    size, digest = (folder / file).stat().st_size, file_sha256(folder / file)
    shards = [dataclasses.replace(s, bytes=size, sha256=digest) if s.file == file else s for s in manifest.shards]
    dataclasses.replace(manifest, shards=tuple(shards)).write(folder)
    cache = json.loads((folder / "text_features" / "text_features.json").read_text())
    cache["data"] = Manifest.read(folder).id
    (folder / "text_features" / "text_features.json").write_text(json.dumps(cache))


def problems_of(folder: Path, **settings: Any) -> list[str]:
    """All problems, of the file of the report."""
    report = folder.parent / "report.jsonl"
    verify_data(VerifyConfig(data=str(folder), report=str(report), **settings))
    entries = [json.loads(line) for line in report.read_text().splitlines()]
    return [f"{e['file']}|{'' if e['record'] is None else e['record']}|{e['problem']}" for e in entries]


def state(folder: Path) -> dict[str, tuple[int, str]]:
    return {str(p): (p.stat().st_mtime_ns, file_sha256(p)) for p in folder.rglob("*") if p.is_file()}


def test_an_intact_data_set_is_left_alone(data):
    before = state(data)
    finished = call(main, f"data={data}")
    assert (finished.status, finished.out.splitlines()[-1]) == (
        0,
        f"{data}: intact: 13 records with their text features in 4 files, "
        f"{sum(p.stat().st_size for p in data.rglob('*.array_record')) / 1e6:.1f} MB",
    )
    assert state(data) == before


@pytest.mark.parametrize("threads", [1, 3])
def test_problems_are_listed_counted_and_written(data, tmp_path, threads):
    with (data / TRAIN).open("r+b") as file:
        file.seek(-40, 2)
        file.write(b"\xff")
    (data / VALIDATION).unlink()
    before = state(data)
    report = tmp_path / "problems.jsonl"
    finished = call(main, f"data={data}", f"report={report}", "show=1", f"threads={threads}")
    lines = finished.out.splitlines()
    assert finished.status == 1
    assert lines[0].startswith(f"warning: {data}/{TRAIN}: must have sha256 ")
    assert "more problems" in lines[-2]
    assert f"{data}: not intact: " in lines[-1] and "of 13 records are in order" in lines[-1]
    assert any(json.loads(line)["problem"] == "is missing" for line in report.read_text().splitlines())
    assert state(data) == before


def changed(number: int, **fields: Any) -> Callable[[list[dict[str, Any]]], list[bytes]]:
    """Records of which one has other fields; None removes a field."""

    def change(records: list[dict[str, Any]]) -> list[bytes]:
        records[number] = {name: value for name, value in (records[number] | fields).items() if value is not None}
        return [encode(record) for record in records]

    return change


def with_code(records: list[dict[str, Any]]) -> list[bytes]:
    class Code:
        def __reduce__(self):
            return print, ("this record was run",)

    return [pickle.dumps({"latent": Code()}), *map(encode, records[1:])]


NAN = np.full(SHAPES[0], np.nan, np.float16)
WRONG_RECORDS = {
    "code": (with_code, f"{TRAIN}|0|not a readable record: UnpicklingError: builtins.print is refused"),
    "bytes": (lambda records: [b"", *map(encode, records[1:])], f"{TRAIN}|0|not a readable record"),
    "nan": (changed(2, latent=NAN), f"{TRAIN}|2|latent: must be finite, got 16 NaN"),
    "bucket": (changed(7, latent=NAN), f"{TRAIN}|7|latent: must have shape (4, 1, 3), got (4, 2, 2)"),
    "dtype": (
        changed(1, latent=NAN.astype(np.float32)),
        f"{TRAIN}|1|latent: must be a float16 array as in latent_dtype",
    ),
    "label": (changed(8, label=5), f"{TRAIN}|8|label: must be in [0, 5), got 5"),
    "caption": (changed(0, short_caption=None), f"{TRAIN}|0|short_caption: is missing"),
    "key": (changed(4, key="train/2.jpg"), f"{TRAIN}|4|key: must be unique, {TRAIN} record 2 has the same"),
    "no key": (changed(4, key=None), "dataset.json||key: all records or none must have it, 12 of 13 do"),
    "hash": (changed(4, content_hash=b"1"), f"{TRAIN}|4|content_hash: must be 16 bytes, got 1 bytes"),
    "crop": (
        changed(4, crop=(1, 0, 40, 40)),
        f"{TRAIN}|4|crop: must be within image_size=(40, 60), got (1, 0, 40, 40)",
    ),
    "size": (changed(4, image_size=(0, 60)), f"{TRAIN}|4|image_size: must be one or two sides in [1, "),
    "mirrored": (changed(4, mirrored=1), f"{TRAIN}|4|mirrored: must be True where it is given, got 1"),
    "columns": (
        changed(4, **{"columns.a": [1]}),
        f"{TRAIN}|4|columns.a: must be a text, a number, true, false or none, got list",
    ),
    "features": (changed(5, short_caption="w9"), f"text_features/{TRAIN}|10|key: must be "),
}


@pytest.mark.parametrize("name", WRONG_RECORDS)
def test_a_wrong_record_is_named(data, name):
    change, expected = WRONG_RECORDS[name]
    rewrite(data, TRAIN, change(records_of(TRAIN)))
    (problem,) = problems_of(data)
    assert problem.startswith(expected)


def test_a_mirrored_copy_has_the_key_of_its_image(data):
    rewrite(data, TRAIN, changed(4, key="train/2.jpg", mirrored=True)(records_of(TRAIN)))
    assert problems_of(data) == []


def test_records_in_another_order_of_buckets_are_found(data):
    rewrite(data, TRAIN, map(encode, reversed(records_of(TRAIN))))
    problems = [problem for problem in problems_of(data) if not problem.startswith("text_features")]
    assert len(problems) == 6 and all("latent: must have shape" in problem for problem in problems)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"channel_mean": (0.5, 0, 0, 0)},
            "channel_mean: 4 of 4 differ from the records, channel 0 has 0.5, the records ",
        ),
        ({"channel_std": (1, 1, 1, 9)}, "channel_std: 4 of 4 differ from the records, channel 3 has 9, the records "),
    ],
)
def test_statistics_are_computed_again(data, change: Mapping[str, Any], expected):
    dataclasses.replace(Manifest.read(data), **change).write(data)
    found = [problem for problem in problems_of(data) if problem.startswith("dataset.json")]
    assert len(found) == 1 and found[0].startswith(f"dataset.json||{expected}")


@pytest.mark.parametrize(("change", "problem"), [("class_names", "label: "), ("has_captions", "short_caption: ")])
def test_records_have_nothing_that_the_manifest_denies(data, tmp_path, change, problem):
    shutil.rmtree(data / "text_features", ignore_errors=True)
    manifest = Manifest.read(data)
    dataclasses.replace(manifest, **{change: () if change == "class_names" else False}).write(data)
    report = tmp_path / "problems.jsonl"
    assert call(main, f"data={data}", f"report={report}").status == 1
    problems = [json.loads(line)["problem"] for line in report.read_text().splitlines()]
    assert all(line.startswith(f"{problem}is in the record, but the manifest has no ") for line in problems)
    assert len(problems) == sum(map(sum, COUNTS.values()))


def test_text_features_of_other_data_are_a_problem(data):
    manifest = Manifest.read(data)
    dataclasses.replace(manifest, class_names=tuple("abcdf")).write(data)
    (problem,) = problems_of(data)
    assert problem.startswith("text_features/text_features.json||id of the data set: must be ")


def test_counts_of_captions_are_compared(data):
    file = data / "text_features" / "text_features.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"truncated": 1}))
    assert problems_of(data) == ["text_features/text_features.json||truncated: must be 11 as in its records, got 1"]


def test_data_sets_of_earlier_versions_are_intact(tiny_data):
    """Records without the fields that say where they come from."""
    assert [problem for problem in problems_of(tiny_data) if "channel_" not in problem] == []


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["data=nowhere"], "nowhere: no such folder"),
        (["data={data}", "threads=0"], "threads: must be at least 1, got 0"),
        (["data={data}", "text_cache=other"], "text_cache: must be a folder with text_features.json, got 'other'"),
        (["data={data}", "report=no/such/report.jsonl"], "report: no/such/report.jsonl cannot be written"),
    ],
)
def test_what_cannot_be_checked_is_an_error(data, settings, expected):
    finished = call(main, *[setting.format(data=data) for setting in settings])
    assert finished.status == 2 and finished.err.splitlines()[-1].startswith(f"error: {expected}")
