"""Skipping bad records: their replacement, the warnings, and the limit."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter
from latent_records import LATENT_SHAPE, captioned, record_of, word_encoder

from flowdit.data.captions import TokenizedCaptions
from flowdit.data.loader import Source, open_source
from flowdit.data.manifest import Manifest
from flowdit.data.records import RecordError, encode
from flowdit.data.schema import CAPTION_FIELDS, LabelField, record_schema
from flowdit.data.stream import TrainStream, validation_batches
from flowdit.data.text_cache import open_cache
from flowdit.data.text_features import write_cache

FILES = ("train-00000-of-00002.array_record", "train-00001-of-00002.array_record")
NAN = record_of(0) | {"latent": np.full(LATENT_SHAPE, np.nan, np.float16)}
PAYLOADS = {
    "foreign": b"something else",
    "label": encode(record_of(0) | {"label": 9}),
    "shape": encode(record_of(0) | {"latent": np.zeros((4, 2, 3), np.float16)}),
    "not finite": encode(NAN),
}
WRONG = dict(
    zip(
        PAYLOADS,
        ("not a readable record", "label: must be in", "latent: must have shape", "latent: must be fin"),
        strict=True,
    )
)


def replace(path: Path, **payloads: bytes) -> None:
    """Write other bytes in place of the records of a shard with these numbers (`_3` for 3)."""
    records = ArrayRecordDataSource(str(path))
    contents = records.__getitems__(list(range(len(records))))
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for i, content in enumerate(contents):
        writer.write(payloads.get(f"_{i}", content))
    writer.close()


def flip(path: Path, content: bytes) -> None:
    """Flip a bit of the record that has these bytes."""
    data = bytearray(path.read_bytes())
    position = data.find(content)
    assert position > 0
    data[position] ^= 1
    path.write_bytes(data)


def opened(folder: Path, limit: int | None, split: str = "train") -> Source:
    manifest = Manifest.read(folder)
    schema = record_schema(manifest.latent_shape, {"label": LabelField(manifest.num_classes)})
    return open_source(folder, manifest, split, schema=schema, max_bad_records=limit)


def ids(batch) -> list[int]:
    return batch["latent"][:, 0, 0, 0].astype(int).tolist()


def take(stream, count: int) -> list[list[int]]:
    return [ids(batch) for batch in itertools.islice(stream, count)]


@pytest.mark.parametrize("kind", PAYLOADS)
def test_the_next_record_is_read_in_place_of_a_bad_one(folder, kind):
    replace(folder / FILES[1], _2=PAYLOADS[kind])
    source = opened(folder, limit=1)
    batch = source.read_batch([3, 15, 16, 19, 15])
    assert ids(batch) == [3, 16, 16, 19, 16]
    assert batch["label"].tolist() == [3, 1, 1, 4, 1]
    assert (batch["latent"].dtype, batch["label"].dtype) == (np.float32, np.int32)
    (message,) = source.bad_records.take_new()
    assert message.startswith(f"{folder / FILES[1]}: record 2: {WRONG[kind]}") and "\n" not in message
    source.read_batch([15])
    assert source.bad_records.take_new() == [] and len(source.bad_records) == 1


def test_a_flipped_bit_costs_one_record(folder):
    noise = np.random.default_rng(0).standard_normal(LATENT_SHAPE).astype(np.float16)
    replace(folder / FILES[0], _7=encode({"latent": noise, "label": 0}))
    flip(folder / FILES[0], noise.tobytes())
    source = opened(folder, limit=1)
    assert ids(source.read_batch(list(range(20)))) == [*range(7), 8, *range(8, 20)]
    (message,) = source.bad_records.take_new()
    assert f"{FILES[0]}: record 7: the file is damaged: " in message


def test_the_search_wraps_around_the_end(folder):
    replace(folder / FILES[1], _5=PAYLOADS["label"], _6=PAYLOADS["foreign"])
    replace(folder / FILES[0], _0=PAYLOADS["not finite"])
    source = opened(folder, limit=3)
    assert ids(source.read_batch([17, 18])) == [17, 1]
    assert [record["label"] for record in source.read([19, 2])] == [
        0,
        2,
    ]  # of record 0, whose content is not checked
    assert len(source.bad_records) == 3


@pytest.mark.parametrize("processes", [1, 2])
def test_the_stream_is_the_same_on_any_layout_and_after_a_resume(folder, processes):
    stream = TrainStream(opened(folder, limit=0), seed=3, batch_size=8)
    expected = [[{4: 5, 18: 19}.get(i, i) for i in batch] for batch in take(stream, 9)]
    replace(folder / FILES[0], _4=PAYLOADS["not finite"])
    replace(folder / FILES[1], _5=PAYLOADS["foreign"])
    source = opened(folder, limit=2)
    parts = []
    for i in range(processes):
        share = 8 // processes
        layout = {"rows": range(i * share, (i + 1) * share), "num_threads": 4, "prefetch": 4}
        stream = TrainStream(source, seed=3, batch_size=8, **layout)
        first = take(stream, 4)
        later = TrainStream(source, seed=3, batch_size=8, **layout | {"num_threads": 1})
        later.set_state(stream.get_state())
        parts.append(first + take(later, 5))
    assert [list(itertools.chain(*batches)) for batches in zip(*parts, strict=True)] == expected
    assert len(source.bad_records.take_new()) == 2


@pytest.mark.parametrize("threads", [1, 4])
def test_one_above_the_limit_ends_the_run_and_reports_the_limit(folder, threads):
    replace(folder / FILES[0], _4=PAYLOADS["not finite"], _9=PAYLOADS["label"])
    replace(folder / FILES[1], _5=PAYLOADS["foreign"])
    stream = TrainStream(opened(folder, limit=2), seed=0, batch_size=4, num_threads=threads)
    with pytest.raises(RecordError, match=r"array_record: record \d: ") as error:
        take(stream, 10)
    assert str(error.value).endswith("(bad records: 3, data.max_bad_records=2)")


@pytest.mark.parametrize(("limit", "option"), [(None, ""), (0, r" \(bad records: 1, data.max_bad_records=0\)")])
def test_by_default_the_first_bad_record_ends_the_run(folder, limit, option):
    replace(folder / FILES[0], _4=PAYLOADS["label"])
    for read in (opened(folder, limit).read, opened(folder, limit).read_batch):
        with pytest.raises(RecordError, match=rf"record 4: label: must be in \[0, 5\), got 9{option}$"):
            read([3, 4])


def test_data_without_any_readable_record_are_named(folder):
    replace(folder / "validation-00000-of-00001.array_record", **{f"_{i}": PAYLOADS["foreign"] for i in range(7)})
    with pytest.raises(RecordError, match="no record can be read: all 7 of the split or bucket are bad"):
        opened(folder, 100, "validation")
    with pytest.raises(RecordError, match=r"record 3: .* \(bad records: 4, data.max_bad_records=3\)"):
        opened(folder, 3, "validation")


def test_many_threads_report_a_bad_record_once(folder):
    replace(folder / FILES[0], **{f"_{i}": PAYLOADS["label"] for i in range(2, 8)})
    source = opened(folder, limit=6)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: ids(source.read_batch([2, 3, 7, 9])), range(40)))
    assert found == [[8, 8, 8, 9]] * 40
    assert len(set(source.bad_records.take_new())) == len(source.bad_records) == 6


def test_validation_batches_keep_their_size(folder):
    replace(folder / "validation-00000-of-00001.array_record", _6=PAYLOADS["not finite"])
    source = opened(folder, 1, "validation")
    batches = list(validation_batches(source, 4))
    assert [ids(batch) for batch in batches] == [[100, 101, 102, 103], [104, 105, 100, 100]]
    assert [batch["weight"].tolist() for batch in batches] == [[1, 1, 1, 1], [1, 1, 1, 0]]


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: data[:-65536] + bytes(65536)])
def test_an_incomplete_shard_is_still_refused_at_the_start(folder, damage):
    path = folder / FILES[1]
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=f"{path.name}: must be a complete ArrayRecord file"):
        opened(folder, limit=100)


def texts(folder: Path, text, limit: int) -> Source:
    manifest = Manifest.read(folder)
    return open_source(
        folder, manifest, schema=record_schema(LATENT_SHAPE, CAPTION_FIELDS), text=text, max_bad_records=limit
    )


DRAWS = np.array([0.9, 0.1, 0.9, 0.1])
"""Short and long captions in turn."""


def test_captions_belong_to_the_record_that_is_read(captions):
    replace(captions / FILES[0], _3=encode(captioned(3) | {"long_caption": 5}))
    text = TokenizedCaptions(word_encoder().tokenize, 0.5)
    source = texts(captions, text, limit=1)
    batch, expected = (source.read_batch(rows, DRAWS) for rows in ([2, 2, 3, 3], [2, 2, 4, 4]))
    assert batch.keys() == expected.keys()
    for name in batch:
        np.testing.assert_array_equal(batch[name], expected[name])
    assert [record["short_caption"] for record in source.read([3, 5])] == ["w4", "w5"]
    # Record 4 has six words, of which four are read: two long captions of it, each counted once.
    assert text.counts.truncated == 2


@pytest.fixture
def cached(captions):
    """Open the data with a cache whose record 7, the long caption of record 3, is damaged."""
    manifest = Manifest.read(captions)
    write_cache(captions / "text", captions, manifest, word_encoder())

    def opened(limit: int, bad: tuple[int, ...] = (), bad_text: tuple[int, ...] = (7,)) -> Source:
        replace(captions / FILES[0], **{f"_{i}": encode(captioned(i) | {"latent": NAN["latent"]}) for i in bad})
        replace(captions / "text" / FILES[0], **{f"_{i}": PAYLOADS["foreign"] for i in bad_text})
        text = open_cache(captions / "text", manifest, "train", word_encoder(), 0.5, hash_limit=0)
        return texts(captions, text, limit)

    return opened


def test_a_damaged_record_of_the_cache_skips_image_and_text(captions, cached):
    source = cached(1)
    batch, expected = (source.read_batch(rows, DRAWS) for rows in ([2, 2, 3, 3], [2, 2, 3, 4]))
    for name in ("latent", "text_features", "text_mask"):
        np.testing.assert_array_equal(batch[name], expected[name])
    (message,) = source.bad_records.take_new()
    assert message.startswith(f"{captions / 'text' / FILES[0]}: record 7: not a readable record")


def test_records_of_data_and_cache_count_alike(cached):
    both = cached(2, bad=(3,), bad_text=(9,))  # record 3, and the long caption of record 4, which is next
    assert ids(both.read_batch([3] * 4, DRAWS)) == [4, 5, 4, 5]
    with pytest.raises(RecordError, match=r"text/.*: record 9: .* \(bad records: 2, data.max_bad_records=1\)$"):
        cached(1).read_batch([3] * 4, DRAWS)
