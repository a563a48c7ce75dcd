"""Training on shards of an object store of which only a part fits into the local cache, with moto's S3 server."""

import itertools
import json
import random
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import runs
from runs import (
    FAST,
    REPOSITORY,
    assert_same_checkpoint,
    error_line,
    finish,
    free_address,
    metrics,
    start,
    steps_of,
    stored_json,
    train_here,
    train_text_here,
    wait_for_line,
    write_tiny_data,
)

from flowdit import stores
from flowdit.data.loader import open_source
from flowdit.data.manifest import Manifest
from flowdit.data.order import ShardWindows
from flowdit.data.schema import LabelField, record_schema
from flowdit.data.shard_pool import ShardPool
from flowdit.data.stream import TrainStream
from flowdit.data.text_features import write_cache
from flowdit.models.text_encoder import TextConfig, load_text_encoder

SHARDS = {f"train-{i}.array_record": ("train", 6) for i in range(8)} | {"validation-0.array_record": ("validation", 8)}


@pytest.fixture(scope="session")
def sharded(tmp_path_factory) -> Path:
    """The tiny data in eight shards of six records, and one for validation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "SHARDS", SHARDS)
        return write_tiny_data(tmp_path_factory.mktemp("data") / "sharded")


def cache_of(data: Path, shards: float) -> str:
    """The setting for a cache that holds so many of the training shards."""
    largest = max(shard.bytes for shard in Manifest.read(data).shards_of("train"))
    return f"data.local_cache_gb={shards * largest / 1e9}"


class Watch:
    """The most bytes and shards that a cache held, in a thread that looks every millisecond."""

    def __init__(self, cache: Path):
        self.cache, self.bytes = cache, 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(0.001):
            names = [file.name.partition(".array_record")[0] for file in self.cache.glob("*.array_record*")]
            self.bytes = max(self.bytes, sum(int(name.split("-")[1]) for name in set(names)))


def test_a_run_with_a_bounded_cache_equals_one_that_has_all_shards(store, sharded, tmp_path):
    data, cache = store.upload(sharded, "data"), cache_of(sharded, 5.5)
    with Watch(tmp_path / "cache" / "flowdit" / "data" / "shards") as watch:
        finished = train_here(data, tmp_path / "run", cache)
    assert finished.status == 0, finished.err
    assert "copying" not in finished.out and "warning" not in finished.out
    limit = float(cache.partition("=")[2]) * 1e9
    assert 0.6 * limit < watch.bytes <= limit
    assert stored_json(tmp_path / "run" / "6", "dataset")["window"] == 2

    shutil.copytree(tmp_path / "run", local := tmp_path / "local")
    for step in (4, 6):
        shutil.rmtree(local / str(step))
    again = train_here(sharded, local, "train.is_restore=true", "data.local_cache_gb=null")
    assert again.status == 0, again.err
    assert_same_checkpoint(local / "6", tmp_path / "run" / "6")
    assert metrics(local, "train/loss") == metrics(tmp_path / "run", "train/loss")


def stream_of(folder: str | Path, pool: ShardPool | None = None, **options) -> TrainStream:
    manifest = Manifest.read(folder)
    schema = record_schema(manifest.latent_shape, {"label": LabelField(manifest.num_classes)})
    source = open_source(folder, manifest, schema=schema, pool=pool)
    return TrainStream(source, seed=0, batch_size=8, pool=pool, **options)


def pool_of(folder: Path, data: Path, shards: float) -> ShardPool:
    return ShardPool(folder, int(shards * max(shard.bytes for shard in Manifest.read(data).shards_of("train"))))


def take(stream: TrainStream, count: int) -> list[np.ndarray]:
    return [batch["latent"] for batch in itertools.islice(stream, count)]


EPOCHS = 18
"""Batches of three epochs."""


@pytest.fixture(scope="module")
def expected(sharded) -> list[np.ndarray]:
    """The batches in the order of windows of two shards, all of which are on the local disk."""
    stream = stream_of(sharded)
    stream.set_state(stream.get_state() | {"window": 2})
    return take(stream, EPOCHS)


@pytest.fixture
def trouble(request, store, monkeypatch) -> None:
    """A store that is slow, or fails now and then."""
    monkeypatch.setattr(stores.file_system("s3"), "retries", 1)
    draw = random.Random(0)

    def fail(path: str) -> None:
        store.is_busy = draw.random() < 0.4

    slow = lambda path: time.sleep(0.02 * draw.random())
    store.before = {"slow": slow, "failing": fail}.get(request.param, lambda path: None)


@pytest.mark.parametrize("trouble", ["none", "slow", "failing"], indirect=True)
def test_a_store_in_trouble_never_changes_the_order(store, trouble, sharded, expected, tmp_path):
    data, pool = store.upload(sharded, "data"), pool_of(tmp_path / "pool", sharded, 5.5)
    before = store.num_refused  # by other tests
    with Watch(tmp_path / "pool") as watch:
        batches = take(stream_of(data, pool, num_threads=2), EPOCHS)
    np.testing.assert_array_equal(batches, expected)
    assert 0.6 * pool.limit < watch.bytes <= pool.limit
    assert (store.num_refused > before) == (store.before.__name__ == "fail")


def test_processes_of_a_host_share_a_cache_and_a_resume_goes_on_with_it(store, sharded, expected, tmp_path):
    data = store.upload(sharded, "data")
    reads = []
    store.before = lambda path: reads.append(path.rpartition("/")[2])
    pools = [pool_of(tmp_path / "pool", sharded, 5.5) for _ in range(2)]
    streams = [stream_of(data, pool, rows=range(4 * i, 4 * i + 4)) for i, pool in enumerate(pools)]
    with Watch(tmp_path / "pool") as watch:
        parts = [np.concatenate([next(stream)["latent"] for stream in streams]) for _ in range(7)]
        state = streams[0].get_state()
        for stream in streams:
            stream.close()
        resumed = stream_of(data, pool_of(tmp_path / "pool", sharded, 7.5))  # would allow windows of three
        resumed.set_state(json.loads(json.dumps(state)))
        assert resumed.get_state() == state
        parts += take(resumed, EPOCHS - 7)
    np.testing.assert_array_equal(parts, expected)
    assert watch.bytes <= 7.5 / 5.5 * pools[0].limit
    assert len(reads) < 60


def test_an_order_that_the_cache_cannot_hold_is_refused(store, sharded, tmp_path):
    data = store.upload(sharded, "data")
    size = max(shard.bytes for shard in Manifest.read(sharded).shards_of("train"))
    small = stream_of(data, pool_of(tmp_path / "pool", sharded, 3.5))
    assert small.get_state()["window"] == 1
    with pytest.raises(ValueError, match="^data.local_cache_gb: must be null to continue this run: its records are "):
        small.set_state(stream_of(sharded).get_state())
    with pytest.raises(ValueError, match=r"^data.local_cache_gb: must be at least ([\d.]+) to continue this run: it "):
        small.set_state(small.get_state() | {"window": 2})
    for window in (0, True, "2", 2.0):
        with pytest.raises(ValueError, match="^data state: window: must be an integer of at least 1, got "):
            stream_of(sharded).set_state(small.get_state() | {"window": window})
    refused = error_line(train_here(data, tmp_path / "run", cache_of(sharded, 2.9)))
    least = -(-3 * size // 10**5) / 10**4
    assert refused.startswith(f"error: data.local_cache_gb: must be at least {least:g}, three times the largest shard")
    assert not list((tmp_path / "cache" / "flowdit" / "data" / "shards").glob("*.array_record"))


def test_a_shard_that_cannot_be_fetched_ends_the_run_with_its_name(store, sharded, tmp_path):
    data = store.upload(sharded, "data")
    lost = {f"data/{name}" for name in files_in_order(sharded)[6:]} - {"data/train-0.array_record"}

    def lose(path: str) -> None:
        """All of them, when the first batch is read."""
        if path.endswith(files_in_order(sharded)[0]):
            store.before = lambda path: None
            store.files.rm([f"bucket/{name}" for name in lost])

    store.before = lose
    finished = train_here(data, tmp_path / "run", cache_of(sharded, 3.5))
    line = error_line(finished)
    assert line.removeprefix("error: s3://bucket/").partition(":")[0] in lost
    assert line.endswith(".array_record: is missing: the data changed since it was prepared")
    assert steps_of(tmp_path / "run")[-1] >= 2


def files_in_order(data: Path) -> list[str]:
    """The files of the shards of a run with windows of one, in the order of the first epoch."""
    shards = Manifest.read(data).shards_of("train")
    windows = ShardWindows(0, len(shards), 1)
    return [shards[shard].file for i in range(len(shards)) for shard in windows.shards(i)]


def test_a_slow_store_is_named_by_the_stream(store, sharded, tmp_path):
    data, slow = store.upload(sharded, "data"), files_in_order(sharded)[3]
    go_on = threading.Event()
    store.before = lambda path: go_on.wait(20) if path.endswith(slow) else None
    stream = stream_of(data, pool_of(tmp_path / "pool", sharded, 3.5))
    waiting = threading.Thread(target=take, args=(stream, 5))
    waiting.start()
    while waiting.is_alive():
        number = stream.waiting_for
        if number is not None and f"; being downloaded: {data}/{slow}" in stream.describe_reading(number):
            break
    assert number == 2  # of batches of 8 records, of which a shard has 6
    go_on.set()
    waiting.join()


@pytest.mark.slow
def test_a_text_cache_in_a_store_goes_through_the_local_cache(store, sharded, tmp_path):
    encoder = load_text_encoder(TextConfig("wordllama", max_length=32, dtype="float32"))
    write_cache(tmp_path / "text", sharded, Manifest.read(sharded), encoder)
    data, text = store.upload(sharded, "data"), store.upload(tmp_path / "text", "text")
    files = (sharded / "dataset.json", tmp_path / "text" / "text_features.json")
    pairs = sum(max(shard["bytes"] for shard in json.loads(file.read_text())["shards"]) for file in files)
    cache = f"data.local_cache_gb={5.1 * pairs / 1e9}"
    with Watch(tmp_path / "cache" / "flowdit" / "data" / "shards") as watch:
        finished = train_text_here(data, tmp_path / "run", cache, f"data.text_cache={text}", "train.validate_every=3")
    assert finished.status == 0, finished.err
    assert 0 < watch.bytes <= 5.1 * pairs
    shutil.copytree(tmp_path / "run", local := tmp_path / "local")
    for step in (4, 6):
        shutil.rmtree(local / str(step))
    again = train_text_here(sharded, local, "train.is_restore=true", f"data.text_cache={tmp_path / 'text'}")
    assert again.status == 0, again.err
    assert_same_checkpoint(local / "6", tmp_path / "run" / "6")


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.0, 0.5, 1.0])
def test_killed_processes_that_share_a_cache_resume_bit_identically(store, sharded, tmp_path, seconds):
    data = store.upload(sharded, "data")
    store.before = lambda path: time.sleep(0.1 if "train-" in path else 0)
    cache = cache_of(sharded, 3.5)
    whole = train_here(data, tmp_path / "whole", cache, "train.num_steps=12")
    assert whole.status == 0, whole.err
    shutil.rmtree(tmp_path / "cache")

    def run(*more: str) -> list:
        address = free_address()
        settings = ("experiment=tiny", *FAST, f"data.path={data}", f"train.checkpoint_dir={tmp_path / 'run'}", cache)
        settings += (f"mesh.coordinator={address}", "mesh.num_processes=2", "train.num_steps=12", *more)
        script = str(REPOSITORY / "train_stage1.py")
        return [start(script, *settings, f"mesh.process_id={i}", devices=2) for i in (0, 1)]

    pair = run()
    wait_for_line(pair[0], "step 2/12")
    time.sleep(seconds)
    for process in pair:
        process.kill()
        finish(process)
    with Watch(tmp_path / "cache" / "flowdit" / "data" / "shards") as watch:
        outputs = [finish(process) for process in run("train.is_restore=true")]
    assert [output.status for output in outputs] == [0, 0], outputs
    assert watch.bytes <= float(cache.partition("=")[2]) * 1e9
    ours, theirs = (metrics(tmp_path / name, "train/loss") for name in ("run", "whole"))
    assert ours == pytest.approx(theirs, rel=1e-5)
    left = {file.name for file in (tmp_path / "cache" / "flowdit" / "data" / "shards").iterdir()}
    assert not any(name.endswith(".part") for name in left)
