"""The loader: order, resume, and errors for damaged files."""

import itertools
import json

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from latent_records import LATENT_SHAPE, open_captioned, record_of, word_encoder, write_dataset
from latent_records import open_labelled as open_train

from flowdit.data.captions import TokenizedCaptions
from flowdit.data.loader import DataConfig
from flowdit.data.records import RecordError, encode
from flowdit.data.stream import TrainStream, validation_batches


def ids(batch):
    """Indices of the records in a batch."""
    return batch["latent"][:, 0, 0, 0].astype(int).tolist()


def take(stream, count):
    return [ids(batch) for batch in itertools.islice(stream, count)]


def test_batches_hold_the_records(folder):
    batch = next(TrainStream(open_train(folder), seed=0, batch_size=6))
    assert (batch["latent"].shape, batch["latent"].dtype) == ((6, *LATENT_SHAPE), np.float32)
    assert batch["label"].dtype == np.int32
    np.testing.assert_array_equal(batch["label"], np.array(ids(batch)) % 5)


def test_every_epoch_is_another_permutation(folder):
    stream = itertools.chain.from_iterable(take(TrainStream(open_train(folder), seed=0, batch_size=6), 20))
    epochs = [tuple(itertools.islice(stream, 20)) for _ in range(6)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len(set(epochs)) == 6


def test_a_batch_larger_than_the_data_runs_over_epochs(folder):
    (batch,) = take(TrainStream(open_train(folder), seed=0, batch_size=40), 1)
    assert sorted(batch) == sorted([*range(20), *range(20)])


def test_order_depends_on_the_seed(folder):
    source = open_train(folder)
    runs = [take(TrainStream(source, seed=seed, batch_size=4), 5) for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_batches_of_one_process(folder, processes):
    source = open_train(folder)
    streams = [
        TrainStream(source, seed=3, batch_size=8, rows=range(i * 8 // processes, (i + 1) * 8 // processes))
        for i in range(processes)
    ]
    joined = [list(itertools.chain(*parts)) for parts in zip(*(take(stream, 7) for stream in streams), strict=True)]
    assert joined == take(TrainStream(source, seed=3, batch_size=8), 7)


@pytest.mark.parametrize("consumed", [0, 1, 4, 9])
def test_state_continues_exactly_on_other_threads_and_processes(folder, consumed):
    source = open_train(folder)
    whole = take(TrainStream(source, seed=1, batch_size=8), 14)
    first = TrainStream(source, seed=1, batch_size=8, num_threads=3, prefetch=5)
    assert take(first, consumed) == whole[:consumed]
    state = json.loads(json.dumps(first.get_state()))
    # Prefetched batches must not count.
    assert state == {"next_batch": consumed, "seed": 1, "batch_size": 8, "num_records": 20}
    parts = []
    for i in range(2):
        stream = TrainStream(source, seed=1, batch_size=8, num_threads=1, prefetch=1, rows=range(4 * i, 4 * i + 4))
        next(stream)
        stream.set_state(state)
        parts.append(take(stream, 5))
        assert stream.get_state()["next_batch"] == consumed + 5
    assert [a + b for a, b in zip(*parts, strict=True)] == whole[consumed : consumed + 5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 2}, "seed: must be 1 as in this run, got 2"),
        ({"batch_size": 4}, "batch_size: must be 8 as in this run, got 4"),
        ({"num_records": 21}, "num_records: must be 20 as in this run, got 21"),
        ({"next_batch": -1}, "next_batch: must be an integer of at least 0, got -1"),
        ({"next_batch": "1"}, "next_batch: must be an integer of at least 0, got '1'"),
        ({"next_batch": True}, "next_batch: must be an integer"),
    ],
)
def test_the_state_of_another_stream_is_refused(folder, change, message):
    stream = TrainStream(open_train(folder), seed=1, batch_size=8)
    with pytest.raises(ValueError, match=f"data state: {message}"):
        stream.set_state(stream.get_state() | change)
    stream.set_state(stream.get_state())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "train.batch_size: must be at least 1, got 0"),
    ],
)
def test_invalid_settings_are_refused(folder, settings, message):
    with pytest.raises(ValueError, match=message):
        TrainStream(open_train(folder), seed=0, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_threads": 0}, "^num_threads: must be at least 1, got 0"),
        ({"prefetch": 0}, "^prefetch: must be at least 1, got 0"),
        ({"max_bad_records": -1}, r"^max_bad_records: must be 0 \(none\) or more, got -1"),
        ({"long_caption_prob": 1.5}, r"^long_caption_prob: must be in \[0, 1\], got 1.5"),
        ({"long_caption_prob": float("nan")}, "^long_caption_prob: .* got nan"),
        ({"tag_dropout": -0.1}, r"^tag_dropout: must be in \[0, 1\], got -0.1"),
        ({"tag_dropout": 0.2, "text_cache": "x"}, "^tag_dropout: must be 0 with text_cache, .*, got 0.2"),
    ],
)
def test_a_field_that_breaks_a_rule_is_named(settings, message):
    DataConfig().check()
    with pytest.raises(ValueError, match=message):
        DataConfig(**settings).check()


@pytest.mark.parametrize("batch_size", [2, 4, 8])
def test_validation_counts_every_record_once_in_fixed_order(folder, batch_size):
    source = open_train(folder, "validation")
    batches = list(validation_batches(source, batch_size))
    assert all(len(batch["latent"]) == batch_size for batch in batches)
    seen = [i for batch in batches for i, weight in zip(ids(batch), batch["weight"], strict=True) if weight]
    assert seen == list(range(100, 107))
    assert sum(batch["weight"].sum() for batch in batches) == 7


def test_limited_validation_is_spread_evenly_and_shared_by_processes(folder):
    source = open_train(folder)
    (whole,) = validation_batches(source, 6, limit=5)
    assert ids(whole)[:5] == [0, 4, 8, 12, 16]
    assert whole["weight"].tolist() == [1, 1, 1, 1, 1, 0]
    parts = [next(validation_batches(source, 6, limit=5, rows=range(3 * i, 3 * i + 3))) for i in range(2)]
    for name, values in whole.items():
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), values)


def test_latent_std_comes_along_when_the_manifest_has_it(tmp_path):
    records = [record_of(i) | {"latent_std": np.full(LATENT_SHAPE, 0.5, np.float16)} for i in range(4)]
    write_dataset(tmp_path, {"train": [records]}, has_latent_std=True)
    batch = next(TrainStream(open_train(tmp_path), seed=0, batch_size=2))
    np.testing.assert_array_equal(batch["latent_std"], np.full((2, *LATENT_SHAPE), 0.5, np.float32))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (record_of(0) | {"label": 97}, r"label: must be in \[0, 5\), got 97"),
        (record_of(0) | {"latent": np.full(LATENT_SHAPE, np.nan, np.float16)}, "latent: must be finite, got 16 NaN"),
        (record_of(0) | {"latent": np.zeros((4, 2, 3), np.float16)}, r"latent: must have shape \(4, 2, 2\)"),
    ],
)
def test_a_bad_record_is_named_by_file_and_number(tmp_path, bad, message):
    shards = [[record_of(i) for i in range(5)], [record_of(0), record_of(1), bad]]
    write_dataset(tmp_path, {"train": shards})
    with pytest.raises(RecordError, match=rf"train-00001-of-00002.array_record: record 2: {message}") as error:
        take(TrainStream(open_train(tmp_path), seed=0, batch_size=4, num_threads=2), 2)
    assert "\n" not in str(error.value)


def test_records_of_another_dtype_than_the_manifests_are_named(folder):
    path = folder / "dataset.json"
    path.write_text(path.read_text().replace('"float16"', '"float32"'))
    message = (
        r"train-00000-of-00002.array_record: record 0: latent: must be a float32 array as in latent_dtype .* float16$"
    )
    with pytest.raises(RecordError, match=message):
        open_train(folder)


def test_a_foreign_record_is_named_by_file_and_number(folder):
    path = folder / "train-00001-of-00002.array_record"
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for i in range(7):
        writer.write(b"something else" if i == 4 else b"\x80\x05}.")
    writer.close()
    with pytest.raises(RecordError, match=f"{path.name}: record 4: not a readable record"):
        open_train(folder).read([17])
    with pytest.raises(RecordError, match=rf"{path.name}: record 3: latent: is missing, the record has \[\]"):
        open_train(folder).read([16])


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[: len(data) // 2], lambda data: b"PK" * 50_000])
def test_a_shard_that_is_not_an_array_record_file_is_named(folder, damage):
    path = folder / "train-00001-of-00002.array_record"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=f"{path.name}: must be a complete ArrayRecord file: ") as error:
        open_train(folder)
    assert "\n" not in str(error.value)


def test_a_shard_with_another_number_of_records_is_named(folder):
    (folder / "train-00000-of-00002.array_record").write_bytes(
        (folder / "train-00001-of-00002.array_record").read_bytes()
    )
    with pytest.raises(ValueError, match="train-00000-of-00002.array_record: must hold 13 records .*, got 7"):
        open_train(folder)


def test_a_shard_with_records_in_groups_is_named(folder, caplog):
    path = folder / "train-00001-of-00002.array_record"
    open_train(folder)
    assert not caplog.records
    writer = ArrayRecordWriter(str(path), "group_size:10")
    for i in range(7):
        writer.write(encode(record_of(i)))
    writer.close()
    assert ids(open_train(folder).read_batch([12, 13, 19])) == [12, 0, 6]
    assert [record.message.split(",")[0] for record in caplog.records] == [f"{path}: has records in groups"]


def test_a_missing_shard_and_an_absent_split_are_named(folder):
    (folder / "train-00001-of-00002.array_record").unlink()
    with pytest.raises(ValueError, match="train-00001-of-00002.array_record: no such file"):
        open_train(folder)
    with pytest.raises(ValueError, match="no records in split 'test'"):
        open_train(folder, "test")


def test_damage_inside_a_shard_is_found_when_its_record_is_read(tmp_path):
    noise = np.random.default_rng(0).standard_normal((400, *LATENT_SHAPE)).astype(np.float16)
    write_dataset(tmp_path, {"train": [[{"latent": latent, "label": 0} for latent in noise]]})
    path = tmp_path / "train-00000-of-00001.array_record"
    data = bytearray(path.read_bytes())
    position = data.find(noise[123].tobytes())
    assert position > 0
    data[position + 5] ^= 1
    path.write_bytes(data)
    source = open_train(tmp_path)
    source.read([122, 124])
    with pytest.raises(RecordError, match=f"{path.name}: record 123: the file is damaged: .*hash mismatch"):
        source.read(list(range(400)))


def open_text(folder, long_caption_prob=0.5, split="train"):
    return open_captioned(folder, TokenizedCaptions(word_encoder().tokenize, long_caption_prob), split)


def drawn(batch):
    """The record of each row, and its caption's ids without padding."""
    assert set(batch) - {"weight"} == {"latent", "text_ids", "text_mask"}
    texts = [tuple(ids[mask].tolist()) for ids, mask in zip(batch["text_ids"], batch["text_mask"], strict=True)]
    assert all(text[0] == record + 1 for text, record in zip(texts, ids(batch), strict=True))
    return list(zip(ids(batch), texts, strict=True))


def take_drawn(stream, count):
    return [drawn(batch) for batch in itertools.islice(stream, count)]


@pytest.mark.parametrize(("probability", "share"), [(0.0, 0.0), (0.3, 0.3), (1.0, 1.0)])
def test_the_share_of_long_captions_is_as_configured(captions, probability, share):
    stream = TrainStream(open_text(captions, probability), seed=0, batch_size=50)
    long = np.mean([len(text) > 1 for batch in take_drawn(stream, 8) for _, text in batch])
    # The standard deviation of the share over 400 draws is at most 0.025.
    assert long == share if share in (0, 1) else abs(long - share) < 0.08


def test_a_record_may_have_its_other_caption_in_another_epoch(captions):
    stream = TrainStream(open_text(captions), seed=0, batch_size=20)
    epochs = [dict(batch) for batch in take_drawn(stream, 8)]
    assert all(len({epoch[record] for epoch in epochs}) == 2 for record in range(20))


def test_the_captions_depend_on_the_seed(captions):
    source = open_text(captions)
    runs = [take_drawn(TrainStream(source, seed=seed, batch_size=20), 1)[0] for seed in (0, 0, 1)]
    assert runs[0] == runs[1]
    assert sorted(runs[0]) != sorted(runs[2])


@pytest.mark.parametrize("consumed", [0, 3])
def test_the_same_captions_come_after_a_resume_on_other_threads_and_processes(captions, consumed):
    whole = take_drawn(TrainStream(open_text(captions), seed=1, batch_size=8), 9)
    first = TrainStream(open_text(captions), seed=1, batch_size=8, num_threads=2, prefetch=3)
    assert take_drawn(first, consumed) == whole[:consumed]
    parts = []
    for i in range(2):
        stream = TrainStream(
            open_text(captions), seed=1, batch_size=8, num_threads=1, prefetch=1, rows=range(4 * i, 4 * i + 4)
        )
        next(stream)
        stream.set_state(first.get_state())
        parts.append(take_drawn(stream, 6))
    assert [a + b for a, b in zip(*parts, strict=True)] == whole[consumed : consumed + 6]


def test_every_evaluation_reads_the_same_captions(captions):
    source = open_text(captions, split="validation")
    evaluations = [
        [
            row
            for batch in validation_batches(source, size)
            for row, w in zip(drawn(batch), batch["weight"], strict=True)
            if w
        ]
        for size in (2, 2, 7)
    ]
    assert evaluations[0] == evaluations[1] == evaluations[2]
    assert {len(text) > 1 for _, text in evaluations[0]} == {True, False}


def test_records_without_captions_are_named(folder):
    with pytest.raises(
        RecordError, match=r"train-0.*: record [0-9]+: short_caption: is missing, the record has \['label"
    ):
        take(TrainStream(open_text(folder), seed=0, batch_size=4), 1)
