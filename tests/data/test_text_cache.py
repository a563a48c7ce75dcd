"""Cached text features: equal to those of the encoder, written once, and refused if they do not match the run."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from array_record.python.array_record_data_source import ArrayRecordDataSource
from latent_records import captioned, open_captioned, record_of, word_encoder, write_dataset
from models.text_folders import write_t5gemma

from flowdit.data import text_features
from flowdit.data.captions import TokenizedCaptions
from flowdit.data.manifest import Manifest
from flowdit.data.records import RecordError, decode
from flowdit.data.shards import write_shard
from flowdit.data.stream import TrainStream
from flowdit.data.text_cache import open_cache
from flowdit.data.text_features import write_cache
from flowdit.models.text_encoder import TextConfig, TextEncoder, encode_tokens, load_text_encoder


@pytest.fixture
def cache(captions):
    """The cache of `captions` by the encoder in bfloat16."""
    write_cache(captions / "text", captions, Manifest.read(captions), word_encoder())
    return captions / "text"


def reopened(captions, encoder=None, split="train", **options):
    manifest = Manifest.read(captions)
    return open_cache(captions / "text", manifest, split, encoder or word_encoder(), 0.5, **options)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_cache_gives_the_captions_and_features_of_its_encoder(captions, dtype, split):
    encoder = word_encoder(dtype=dtype)
    write_cache(captions / "text", captions, Manifest.read(captions), encoder)
    readers = (TokenizedCaptions(encoder.tokenize, 0.5), reopened(captions, encoder, split))
    online, cached = (TrainStream(open_captioned(captions, text, split), seed=0, batch_size=7) for text in readers)
    for _ in range(6):
        ids, features = next(online), next(cached)
        assert set(features) == {"latent", "text_features", "text_mask"}
        np.testing.assert_array_equal(features["text_mask"], ids["text_mask"])
        assert (features["text_features"].dtype, features["text_features"].shape) == (jnp.dtype(dtype), (7, 4, 3))
        tokens = (jnp.asarray(ids[name]) for name in ("text_ids", "text_mask"))
        expected = np.asarray(encode_tokens(encoder.network, *tokens))
        np.testing.assert_array_equal(features["text_features"], np.where(ids["text_mask"][..., None], expected, 0))


def test_captions_of_similar_length_share_a_batch_and_keep_their_order(captions, tmp_path, monkeypatch):
    encoder = load_text_encoder(TextConfig(str(write_t5gemma(tmp_path / "t5gemma")), 24, "float32"))
    encode, lengths = TextEncoder.encode, []

    def spy(self, texts):
        lengths.append(self.tokenize(texts).mask.sum(1).tolist())
        return encode(self, texts)

    with monkeypatch.context() as patch:
        patch.setattr(TextEncoder, "encode", spy)
        patch.setattr(text_features, "CHUNK", 6)
        patch.setattr(text_features, "MAX_BATCH", 4)
        write_cache(captions / "text", captions, Manifest.read(captions), encoder)
    # Six records have twelve captions, so the 13 records of the first shard make 3, 3 and 1 batches.
    assert [len(batch) for batch in lengths[:7]] == [4] * 6 + [2]
    for chunk in (np.concatenate(lengths[:3]), np.concatenate(lengths[3:6])):
        assert (np.diff(chunk) >= 0).all() and chunk[0] < chunk[-1]
    source = open_captioned(captions, reopened(captions, encoder))
    for draw, name in ((0.9, "short_caption"), (0.1, "long_caption")):
        batch, expected = (
            source.read_batch(range(20), np.full(20, draw)),
            encoder.encode([captioned(i)[name] for i in range(20)]),
        )
        np.testing.assert_array_equal(batch["text_mask"].sum(1), expected.mask.sum(1))
        features = batch["text_features"][batch["text_mask"]]
        np.testing.assert_allclose(features, expected.features[expected.mask], atol=1e-5)


def test_both_ways_count_the_same_truncated_captions(captions, cache):
    online, cached = TokenizedCaptions(word_encoder().tokenize, 0.5), reopened(captions)
    draws = np.linspace(0, 0.9, 20)
    for text in (online, cached):
        open_captioned(captions, text).read_batch(list(range(20)), draws)
    assert online.counts.truncated == cached.counts.truncated > 0


def test_records_without_any_caption_have_an_empty_mask(tmp_path):
    empty = record_of(0) | {"short_caption": " ", "long_caption": ""}
    manifest = write_dataset(tmp_path / "data", {"train": [[empty, captioned(1)]]}, has_captions=True)
    written = write_cache(tmp_path / "text", tmp_path / "data", manifest, word_encoder())
    assert (written.captions, written.truncated) == (2, 0)
    text = open_cache(tmp_path / "text", manifest, "train", word_encoder(), 0.5)
    batch = open_captioned(tmp_path / "data", text).read_batch([0, 1], np.array([0.1, 0.9]))
    assert batch["text_mask"].sum(1).tolist() == [0, 1]
    assert not batch["text_features"][0].any()


def test_the_manifest_and_the_summary_count_captions(captions, messages):
    written = write_cache(captions / "text", captions, Manifest.read(captions), word_encoder())
    # Long captions have 2 to 6 words, of which 4 are kept; indices 0 to 19 and 100 to 106.
    assert (written.captions, written.truncated) == (54, 10)
    data = Manifest.read(captions).shards
    assert [(s.file, s.records) for s in written.shards] == [(s.file, 2 * s.records) for s in data]
    (out,) = messages()
    assert "features of 54 captions by words in bfloat16" in out and "10 captions truncated to 4 tokens" in out


def test_a_finished_cache_is_not_changed(captions, cache, messages):
    times = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    write_cache(cache, captions, Manifest.read(captions), word_encoder())
    assert "nothing to do" in messages()[-1]
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == times


@pytest.mark.parametrize("finished", [0, 2])
def test_an_interrupted_cache_is_finished_to_the_same_files(captions, cache, monkeypatch, finished):
    started, folder = [], captions / "interrupted"

    def write(path, records, sums_of):
        if len(started) == finished:
            write_shard(path, interrupted(records), sums_of)
        started.append(path.name)
        write_shard(path, records, sums_of)

    def interrupted(records):
        yield next(records)
        raise KeyboardInterrupt

    monkeypatch.setattr(text_features, "write_shard", write)
    with pytest.raises(KeyboardInterrupt):
        write_cache(folder, captions, Manifest.read(captions), word_encoder())
    assert not (folder / "text_features.json").exists()
    finished = 99
    write_cache(folder, captions, Manifest.read(captions), word_encoder())
    assert sorted(started) == sorted(path.name for path in cache.glob("*.array_record"))  # each once
    for path in cache.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()
    assert len(list(folder.iterdir())) == len(list(cache.iterdir()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "started with fingerprint='0000000000000000', this run has '0000000000000001'"),
        ({"dtype": "float32"}, "started with dtype='bfloat16', this run has 'float32'"),
        ({"max_length": 5}, "started with max_length=4, this run has 5"),
        ({"width": 4}, "started with width=3, this run has 4"),
    ],
)
def test_a_folder_of_another_encoder_is_not_written_to(captions, cache, change, message):
    before = {path: path.read_bytes() for path in cache.iterdir()}
    with pytest.raises(ValueError, match=f"text_cache: .*text was {message}: give another folder"):
        write_cache(cache, captions, Manifest.read(captions), word_encoder(**change))
    assert {path: path.read_bytes() for path in cache.iterdir()} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, r"fingerprint of the encoder: must be 0+1 \(words\) as in this run, got 0+ \(words\)"),
        ({"dtype": "float32"}, "dtype: must be float32 as in this run, got bfloat16"),
        ({"max_length": 5}, "max_length: must be 5 as in this run, got 4"),
        ({"width": 4}, "width: must be 4 as in this run, got 3"),
    ],
)
def test_a_cache_of_another_encoder_is_refused(captions, cache, change, message):
    with pytest.raises(ValueError, match=f"text_features.json: {message}$") as error:
        reopened(captions, word_encoder(**change))
    assert "\n" not in str(error.value)


def edit(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_a_cache_of_another_data_set_is_refused(captions, cache):
    edit(captions / "dataset.json", lambda d: d.update(class_names=list("abcdx")))
    with pytest.raises(ValueError, match="text_features.json: id of the data set: must be .* as in this run, got "):
        reopened(captions)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("dtype"), "dtype: is missing"),
        (lambda d: d.update(dtype="float16"), "dtype: must be 'bfloat16' or 'float32', got 'float16'"),
        (lambda d: d.update(schema_version=2), "schema_version: must be 1, got 2"),
        (lambda d: d["shards"][0].update(file="../a.array_record"), r"shards\[0\].file: must be a plain file name"),
        (lambda d: d["shards"].pop(0), "shards: must be those of the data set, with two records for each"),
        (lambda d: d["shards"][0].update(records=13), "shards: must be those of the data set, with two records"),
    ],
)
def test_a_damaged_manifest_is_refused(captions, cache, change, message):
    edit(cache / "text_features.json", change)
    with pytest.raises(ValueError, match=f"text_features.json: {message}"):
        reopened(captions)


def test_a_folder_without_a_cache_says_what_makes_one(captions):
    message = "data.text_cache: .*text has no text_features.json; `python -m flowdit.prepare"
    with pytest.raises(ValueError, match=message):
        reopened(captions)


def test_a_missing_or_changed_shard_is_named(captions, cache):
    path = cache / "train-00001-of-00002.array_record"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"{path.name}: must have sha256 .*, has "):
        reopened(captions)
    reopened(captions, split="validation")
    path.unlink()
    with pytest.raises(ValueError, match=f"{path.name}: is missing"):
        reopened(captions)


def rewrite(cache, change):
    """Replace the short caption of record 2 of the second training shard, and the shard's size and hash."""
    path = cache / "train-00001-of-00002.array_record"
    entries = [decode(data) for data in ArrayRecordDataSource(str(path)).__getitems__(list(range(14)))]
    entries[4] = change(entries[4])
    sidecar = write_shard(path, entries, lambda record: {})

    def new_hash(data):
        data["shards"][1].update(bytes=sidecar.bytes, sha256=sidecar.sha256)

    edit(cache / "text_features.json", new_hash)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": b"12345678"}, "key: must be [0-9a-f]{16} for the caption of the data, got 3132333435363738: another"),
        ({"key": 5}, "key: must be .*, got int"),
        ({"key": np.zeros(8, np.uint8)}, "key: must be .*, got ndarray"),
        ({"key": b"1" * 1000}, "key: must be .*, got (31){20}: another"),
        ({"features": np.zeros((1, 3), np.float32)}, "features: must be an array of uint16, got float32"),
        ({"features": np.zeros((1, 3), ">u2")}, "features: must be an array of uint16, got >u2"),
        ({"features": [1]}, "features: must be an array of uint16, got list"),
        ({"features": np.zeros(3, np.uint16)}, r"features: must have shape \(at most 4, 3\), got \(3,\)"),
        ({"features": np.zeros((1, 4), np.uint16)}, r"features: must have shape \(at most 4, 3\), got \(1, 4\)"),
        ({"features": np.zeros((5, 3), np.uint16)}, r"features: must have shape \(at most 4, 3\), got \(5, 3\)"),
        ({"truncated": np.zeros(1, bool)}, "truncated: must be a bool, got ndarray"),
        ({"features": np.full((1, 3), 0x7FC0, np.uint16)}, "features: must be finite"),
    ],
)
def test_a_bad_record_is_named_by_file_and_number(captions, cache, change, message):
    rewrite(cache, lambda entry: entry | change)
    source = open_captioned(captions, reopened(captions))
    source.read_batch([14, 15, 16], np.array([0.9, 0.1, 0.9]))  # the long caption is in a separate record
    with pytest.raises(RecordError, match=f"text/train-00001-of-00002.array_record: record 4: {message}") as error:
        source.read_batch([14, 15], np.array([0.9, 0.9]))
    assert "\n" not in str(error.value)


def test_a_missing_field_is_named(captions, cache):
    rewrite(cache, lambda entry: {name: value for name, value in entry.items() if name != "key"})
    with pytest.raises(RecordError, match=r"record 4: key: is missing, the record has \['features', 'truncated'\]"):
        open_captioned(captions, reopened(captions)).read_batch([15], np.array([0.9]))


def test_features_that_are_not_finite_are_never_written(captions):
    encoder = word_encoder(dtype="float32")
    weight = encoder.network.weight.at[5].set(np.nan)
    object.__setattr__(encoder, "network", type(encoder.network)(weight))
    with pytest.raises(ValueError, match="text_encoder: features of words must be finite in float32"):
        write_cache(captions / "text", captions, Manifest.read(captions), encoder)
    assert not list((captions / "text").glob("*.array_record"))
