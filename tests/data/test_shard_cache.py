"""The bounded cache for shards of an object store, with a folder in place of the store."""

import contextlib
import fcntl
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from latent_records import record_of, write_dataset

from flowdit.data import mirror, shard_pool
from flowdit.data.manifest import Manifest, ManifestError
from flowdit.data.record_files import RecordFiles, being_read
from flowdit.data.records import RecordError
from flowdit.data.shard_cache import CachedShards, largest_window
from flowdit.data.shard_pool import ShardPool
from flowdit.fields import FieldError

NUM_SHARDS, RECORDS = 8, 10


@pytest.fixture
def manifest(tmp_path) -> Manifest:
    parts = [[record_of(RECORDS * i + j) for j in range(RECORDS)] for i in range(NUM_SHARDS)]
    return write_dataset(tmp_path / "data", {"train": parts})


class Store:
    """A folder as an object store. `before` is called with the name of an object that is read, and its local copy."""

    def __init__(self, folder: Path):
        self._folder = folder
        self.copies: list[str] = []
        self.before: Callable[[str, Path], None] = lambda name, target: None

    def download(self, source: os.PathLike[str], target: Path) -> None:
        name = os.path.basename(source)
        self.copies.append(name)
        self.before(name, target)
        target.write_bytes((self._folder / name).read_bytes())


@pytest.fixture
def store(manifest, tmp_path, monkeypatch) -> Store:
    store = Store(tmp_path / "data")
    monkeypatch.setattr(mirror, "download", store.download)
    monkeypatch.setattr(shard_pool, "IDLE_SECONDS", 0.1)
    return store


def pool_of(manifest: Manifest, tmp_path: Path, shards: float) -> ShardPool:
    return ShardPool(tmp_path / "cache", int(shards * max(shard.bytes for shard in manifest.shards)))


def cached(manifest: Manifest, pool: ShardPool, **options: bool) -> CachedShards:
    return CachedShards("s3://bucket/data", manifest.shards, pool, **{"is_checked": True, "verify": False} | options)


def files_of(shards: CachedShards) -> RecordFiles:
    return RecordFiles(shards, [RECORDS] * NUM_SHARDS, lambda record: None)


def ids(records: list[dict]) -> list[int]:
    return [int(record["latent"][0, 0, 0]) for record in records]


@pytest.fixture
def watch(tmp_path) -> Iterator[Callable[[], int]]:
    """The most bytes that the cache held at any time, with removed files that are still open."""
    cache, ended = tmp_path / "cache", threading.Event()
    most = [0]

    def look() -> None:
        sizes = [file.stat().st_size for file in cache.glob("*.array_record*")]
        for number in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                target = os.readlink(f"/proc/self/fd/{number}")
                if target.startswith(str(cache)) and target.endswith(" (deleted)"):
                    sizes.append(os.stat(f"/proc/self/fd/{number}").st_size)
        most[0] = max(most[0], sum(sizes))

    def look_often() -> None:
        while not ended.wait(0.001):
            with (cache / ".lock").open("w") as lock:  # files appear and disappear under this lock
                fcntl.flock(lock, fcntl.LOCK_EX)
                look()

    cache.mkdir()
    thread = threading.Thread(target=look_often)
    thread.start()
    yield lambda: most[0]
    ended.set()
    thread.join()


def test_two_readers_share_a_cache_that_never_exceeds_its_bound(manifest, store, tmp_path, watch):
    pools = [pool_of(manifest, tmp_path, 3.5) for _ in range(2)]  # as two processes of a host

    def read(number: int) -> None:
        files, draw = files_of(cached(manifest, pools[number % 2])), random.Random(number)
        for _ in range(15):
            indices = [draw.randrange(NUM_SHARDS * RECORDS) for _ in range(4)]
            assert ids(files.read(indices)) == indices

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(read, range(4)))
    assert 2 * pools[0].limit / 3.5 < watch() <= pools[0].limit
    assert len(store.copies) > NUM_SHARDS
    assert not list((tmp_path / "cache").glob("*.part"))


def test_a_shard_is_copied_once_and_a_restart_reuses_it(manifest, store, tmp_path):
    everything = list(range(NUM_SHARDS * RECORDS))
    for _ in range(2):
        assert ids(files_of(cached(manifest, pool_of(manifest, tmp_path, 9))).read(everything)) == everything
    assert sorted(store.copies) == [shard.file for shard in manifest.shards]


def test_the_least_recently_used_shards_are_removed_but_not_those_that_are_kept(manifest, store, tmp_path):
    shards = cached(manifest, pool_of(manifest, tmp_path, 3.5))
    files = files_of(shards)

    def copies(*numbers: int) -> list[int]:
        """The shards that had to be copied to read a record of each of these."""
        before = len(store.copies)
        for number in numbers:
            files.read([RECORDS * number])
            time.sleep(0.002)  # of the disk's clock
        return [int(name.split("-")[1]) for name in store.copies[before:]]

    assert copies(0, 1, 2, 0, 3) == [0, 1, 2, 3]
    assert copies(0, 2, 3) == [2] or copies(0, 1) == [1]
    shards.prefer([0], [1])
    while len({name for name in store.copies if "00001" in name}) < 1:
        time.sleep(0.01)
    assert 0 not in copies(4, 5, 6, 7, 0, 1)


def test_the_next_shards_are_fetched_ahead(manifest, store, tmp_path):
    shards = cached(manifest, pool_of(manifest, tmp_path, 6))
    files = files_of(shards)
    files.read([0])
    shards.prefer([0], [3, 5])
    deadline = time.monotonic() + 5
    while len(list((tmp_path / "cache").glob("*.array_record"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    before = len(store.copies)
    files.read([3 * RECORDS, 5 * RECORDS])
    assert len(store.copies) == before == 3


def test_a_failing_store_is_named_and_leaves_nothing(manifest, store, tmp_path, caplog):
    def fail(name: str, target: Path) -> None:
        target.write_bytes(b"half")
        raise OSError(5, "the store is away")

    store.before = fail
    shards = cached(manifest, pool_of(manifest, tmp_path, 4))
    for _ in range(2):
        with pytest.raises(
            ManifestError, match="^s3://bucket/data/train-00002-of-00008.array_record: cannot be copied "
        ):
            files_of(shards).read([25])
    shards.prefer([0], [1])
    while "fetching ahead: s3://bucket/data/train-00001-of-00008.array_record: cannot be" not in caplog.text:
        time.sleep(0.01)
    store.before = lambda name, target: None
    assert ids(files_of(shards).read([25, 15])) == [25, 15]
    assert not list((tmp_path / "cache").glob("*.part"))


def test_a_shard_with_another_content_is_refused_unless_damage_is_allowed(manifest, store, tmp_path):
    file = tmp_path / "data" / manifest.shards[0].file
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    pool = pool_of(manifest, tmp_path, 4)
    with pytest.raises(ManifestError, match=f"^s3://bucket/data/{file.name}: must have sha256 "):
        files_of(cached(manifest, pool)).read([0])
    with contextlib.suppress(RecordError):
        files_of(cached(manifest, pool, is_checked=False)).read([0])
    with pytest.raises(ManifestError, match="must have sha256 "):  # that copy is not taken for an intact one
        files_of(cached(manifest, pool)).read([0])


@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: content[:-1] + b"x"])
def test_a_damaged_copy_is_made_again(manifest, store, tmp_path, damage, caplog):
    pool = pool_of(manifest, tmp_path, 4)
    files_of(cached(manifest, pool)).read([0])
    (copy,) = (tmp_path / "cache").glob("*.array_record")
    copy.write_bytes(damage(copy.read_bytes()))
    assert ids(files_of(cached(manifest, pool, verify=True)).read([0])) == [0]
    assert f"s3://bucket/data/{manifest.shards[0].file}: the copy {copy} is damaged and made again" in caplog.text
    assert len(store.copies) == 2


def test_the_shard_that_is_being_downloaded_is_named(manifest, store, tmp_path):
    go_on = threading.Event()
    store.before = lambda name, target: go_on.wait(10)
    files = files_of(cached(manifest, pool_of(manifest, tmp_path, 4)))
    with ThreadPoolExecutor(1) as threads:
        reading = threads.submit(files.read, [25])
        name = f"s3://bucket/data/{manifest.shards[2].file}"
        expected = f"{name} records 5; being downloaded: {name}"
        while expected not in being_read().values() and not reading.done():
            time.sleep(0.01)
        go_on.set()
        assert ids(reading.result()) == [25]


KILLED = """
import sys, time
from pathlib import Path
from flowdit.data.shard_pool import ShardPool

def download(part):
    part.write_bytes(b"half of it")
    print("begun", flush=True)
    time.sleep(60)

pool = ShardPool(Path(sys.argv[1]), 10**9)
pool.add(pool.path("0123456789abcdef", 100), download, is_wanted=lambda: True)
"""


def test_a_killed_download_leaves_no_shard_and_is_taken_over(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"begun\n"
    pool = ShardPool(tmp_path, 150)
    path, other = pool.path("0123456789abcdef", 100), pool.path("fedcba9876543210", 100)
    pool.add(other, lambda part: None, is_wanted=iter([True, False]).__next__)
    assert not other.exists()  # no room while the other process copies
    process.kill()
    process.wait()
    pool.add(path, lambda part: part.write_bytes(bytes(100)), is_wanted=lambda: True)
    assert [file.name for file in tmp_path.iterdir() if file.name != ".lock"] == [path.name]


@pytest.mark.parametrize(
    ("sizes", "limit", "window"),
    [
        ([(0, 0)], 100, None),
        ([(20, 10)], 60, 1),
        ([(20, 10)], 110, 2),
        ([(20, 10, 5, 1)], 140, 3),
        ([(20, 10)], 10**6, 2),
        ([(20, 10, 5, 1), (0, 0), (8, 7, 3)], 28 * 7, 3),
    ],
)
def test_two_windows_and_a_shard_fit_into_the_cache(sizes, limit, window, tmp_path):
    assert largest_window(sizes, ShardPool(tmp_path, limit)) == window
    assert largest_window(sizes, None) is None


def test_a_cache_that_is_too_small_or_larger_than_the_disk_is_refused(tmp_path):
    rule = "^data.local_cache_gb: must be at least 0.3703, three times the largest shard, got 0.37$"
    with pytest.raises(FieldError, match=rule):
        largest_window([[123_411_111, 5]], ShardPool(tmp_path, 370_000_000))
    assert largest_window([[123_411_111, 5, 1]], ShardPool(tmp_path, 370_300_000)) == 1
    with pytest.raises(FieldError, match=r"^data.local_cache_gb: must be at most [\d.e+]+, the free space of "):
        ShardPool(tmp_path, 10**18)
    (tmp_path / "file").touch()
    with pytest.raises(FieldError, match="^data.local_dir: .*/file/shards cannot be used: Not a directory"):
        ShardPool(tmp_path / "file" / "shards", 10**9)
