"""Images in object stores (moto's S3 server) and on the web: the rows of local files, and stores that fail."""

import tracemalloc
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from object_store import ObjectStore
from web_server import WebServer
from written_sources import COUNT, as_dataset, as_folder, as_parquet, as_paths, as_tars, make_entries, rows

from flowdit import storage, stores
from flowdit.data.sources import files, open_images
from flowdit.data.sources.config import SourceConfig


@pytest.fixture
def store(server, monkeypatch) -> ObjectStore:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    for cached in (stores.file_system, storage._ask):
        cached.cache_clear()
    return server


@pytest.fixture
def web(tmp_path) -> Iterator[WebServer]:
    server = WebServer(tmp_path)
    yield server
    server.stop()


SLOW = [pytest.param(write, marks=pytest.mark.slow) for write in (as_folder, as_paths, as_dataset)]


@pytest.mark.parametrize("write", [as_tars, as_parquet, *SLOW])
def test_a_source_in_a_store_has_the_rows_of_the_local_one(store, tmp_path, write):
    local = write(make_entries(), tmp_path / "images")
    name = f"{write.__name__}/images"
    store.upload(tmp_path / "images", name)
    settings = {"split": "train" if write is as_dataset else "", "records_per_shard": 4, "held_out_fraction": 0.5}
    expected = open_images(SourceConfig(source=local, **settings))
    source = open_images(
        SourceConfig(source=local.replace(str(tmp_path / "images"), f"s3://bucket/{name}"), **settings)
    )
    assert (source.name, source.class_names) == (expected.name, expected.class_names)
    assert dict(rows(source)) == dict(rows(expected)) and len(rows(source)) == COUNT
    if write is not as_dataset:  # a stream in a store is one unit
        assert [unit.file("train") for unit in source.units()] == [unit.file("train") for unit in expected.units()]


def test_a_store_that_is_busy_for_a_while_is_waited_for(store, tmp_path, monkeypatch):
    local = as_tars(make_entries(), tmp_path / "images")
    store.upload(tmp_path / "images", "busy")
    source = open_images(SourceConfig(source="s3://bucket/busy"))
    answer = store.__class__.__call__
    refusals = iter([True] * 3)

    def busy_at_first(self, request, respond):
        self.is_busy = next(refusals, False)
        return answer(self, request, respond)

    monkeypatch.setattr(ObjectStore, "__call__", busy_at_first)
    assert dict(rows(source)) == dict(rows(open_images(SourceConfig(source=local))))
    assert next(refusals, None) is None and store.num_refused >= 3


def test_a_store_that_fails_is_named_in_one_line(store, tmp_path, monkeypatch):
    as_tars(make_entries(), tmp_path / "images")
    store.upload(tmp_path / "images", "gone")
    with pytest.raises(ValueError, match="^s3://nowhere/x: there is no bucket nowhere$"):
        open_images(SourceConfig(source="s3://nowhere/x"))
    with pytest.raises(ValueError, match=r"^s3://bucket/gone/9.tar: there is no such file or folder$"):
        open_images(SourceConfig(source="s3://bucket/gone/9.tar"))
    source = open_images(SourceConfig(source="s3://bucket/gone"))
    store.files.rm("bucket/gone/001.tar")
    with pytest.raises(ValueError, match=r"gone/001.tar: there is no such file or folder$"):
        rows(source)
    monkeypatch.setattr(stores.file_system("s3"), "patience", 0.2)
    monkeypatch.setattr(store, "is_busy", True)
    with pytest.raises(ValueError, match=r"^s3://bucket/gone/000.tar: cannot be read: Service Unavailable$"):
        rows(source)


@pytest.mark.parametrize(("sends_parts", "says_size"), [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize(("write", "name"), [(as_tars, "{000..002}.tar"), (as_parquet, "all.parquet?key=secret")])
def test_files_on_the_web_have_the_rows_of_local_ones(web, tmp_path, write, name, sends_parts, says_size):
    local = write(make_entries(), tmp_path / "images")
    web.sends_parts, web.says_size = sends_parts, says_size
    source = open_images(SourceConfig(source=f"{web.address}/images/{name}"))
    web.busy, web.cuts = 1, int(says_size)  # without a size nobody sees that an answer is cut
    assert dict(rows(source)) == dict(rows(open_images(SourceConfig(source=local))))
    assert (web.busy, web.cuts) == (0, 0)
    assert source.listing is not None and "secret" not in str(source.listing.names)
    before = source.key
    (tmp_path / "images" / "000.tar").touch()
    (tmp_path / "images" / "all.parquet").touch()
    assert open_images(SourceConfig(source=f"{web.address}/images/{name}")).key != before


def test_web_addresses_that_cannot_be_used_are_refused_in_one_line(web, tmp_path, monkeypatch):
    as_tars(make_entries(), tmp_path / "images")
    monkeypatch.setattr(stores, "START_PATIENCE", 0.3)
    with pytest.raises(ValueError, match=rf"^{web.address}/images/9.tar: there is no such file or folder$"):
        open_images(SourceConfig(source=f"{web.address}/images/9.tar"))
    with pytest.raises(ValueError, match="^source: must be a folder of images, tars .* or say what it is"):
        open_images(SourceConfig(source=f"{web.address}/images/"))
    web.stop()
    with pytest.raises(ValueError, match=rf"^{web.address}/images/000.tar: cannot be read: .*[Cc]onnect"):
        open_images(SourceConfig(source=f"{web.address}/images/000.tar"))


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(stores.importlib.util, "find_spec", lambda name: None)
    stores.file_system.cache_clear()
    for address, extra in (("s3://bucket/x.tar", "s3"), ("https://host/x.tar", "http")):
        with pytest.raises(ValueError, match=rf"pip install 'flowdit\[{extra}\]'"):
            open_images(SourceConfig(source=address))


def test_memory_does_not_grow_with_the_size_of_a_remote_file(web, tmp_path, monkeypatch):
    """A table with images of 20 KB each: ten times as many rows need no more memory."""
    monkeypatch.setattr(files, "BLOCK", 2**14)
    peaks = []
    for count in (60, 600):
        table = pa.table({"image": [bytes([i % 256]) * 20_000 for i in range(count)], "text": ["a"] * count})
        pq.write_table(table, tmp_path / "big.parquet", row_group_size=30)
        source = open_images(SourceConfig(source=f"{web.address}/big.parquet", records_per_shard=10**6))
        tracemalloc.start()
        assert sum(1 for unit in source.units() for _ in source.read(unit)) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


def test_only_the_rows_that_are_wanted_are_fetched(web, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BLOCK", 2**14)
    entries = [{**make_entries()[0], "image": bytes([i]) * 100_000} for i in range(40)]
    pq.write_table(
        pa.Table.from_pylist(entries),
        tmp_path / "all.parquet",
        row_group_size=1,
        use_dictionary=False,
        compression="none",
    )
    source = open_images(SourceConfig(source=f"{web.address}/all.parquet", records_per_shard=100))
    (unit,) = source.units()
    web.requests.clear()
    assert [number for number, _ in source.read(unit, {3, 30})] == [3, 30]
    ranges = [asked.removeprefix("bytes=").split("-") for _, _, asked in web.requests if asked]
    assert sum(int(stop) - int(start) + 1 for start, stop in ranges) < 1_000_000  # of four


def test_the_name_of_a_file_is_its_place_below_the_folder(tmp_path):
    for name in ("a/0.tar", "a/1.tar", "b/0.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    for pattern, folder, names in (
        ("", "", ["a/0.tar", "a/1.tar", "b/0.tar"]),
        ("/*/0.tar", "", ["a/0.tar", "b/0.tar"]),
        ("/a/{0..1}.tar", "/a", ["0.tar", "1.tar"]),
        ("/{a,b}/0.tar", "", ["a/0.tar", "b/0.tar"]),
        ("/a/0.tar", "/a", ["0.tar"]),
    ):
        found = files.find(f"{tmp_path}{pattern}")
        assert (found.folder, [file.name for file in found.files]) == (f"{tmp_path}{folder}", names)
    assert list(files.expand("x{08..10}{a,b}")) == ["x08a", "x08b", "x09a", "x09b", "x10a", "x10b"]
    with pytest.raises(ValueError, match="must count upwards"):
        list(files.expand("{0..9999999}"))
