"""Runs, data and caches in an object store, with moto's S3 server; s3fs and TensorStore are the real clients."""

import importlib.util
import io
import json
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from object_store import ObjectStore
from PIL import Image
from runs import (
    FAST,
    REPOSITORY,
    assert_same_checkpoint,
    call,
    error_line,
    finish,
    free_address,
    metrics,
    start,
    steps_of,
    train_here,
    train_text_here,
    wait_for_line,
)

from flowdit import prepare, report, sample, storage, stores, verify
from flowdit.checkpoint.files import verify_files
from flowdit.data import mirror, shard_check
from flowdit.data.manifest import Manifest
from flowdit.data.text_features import write_cache
from flowdit.interop.conversion import read_source
from flowdit.interop.metadata import ForeignConfig
from flowdit.line_files import UploadedLines
from flowdit.models.text_encoder import TextConfig, load_text_encoder


@pytest.fixture
def fresh_clients(store, monkeypatch) -> Iterator[None]:
    """Clients are made anew, for another environment, and soon give up."""
    monkeypatch.setattr(stores, "START_PATIENCE", 0.3)
    for cached in (stores.file_system, storage._ask):
        cached.cache_clear()
    yield
    for cached in (stores.file_system, storage._ask):
        cached.cache_clear()


@pytest.mark.slow
def test_the_best_checkpoint_and_snapshots_in_a_store_equal_local_ones(store, tiny_data, tmp_path):
    tasks = (
        "train.validate_every=1",
        "train.keep_best=validation/loss",
        "train.keep_last=1",
        "train.ema_snapshot_every=2",
    )
    settings = (*tasks, "train.save_every=0", "optim.warmup_steps=0")
    assert train_here(tiny_data, tmp_path / "run", *settings).status == 0
    folder = "s3://bucket/run"
    for more in (("train.num_steps=4",), ("train.is_restore=true", "train.num_steps=6")):
        done = train_here(tiny_data, folder, *settings, *more)
        assert (done.status, done.err) == (0, "")
    run = store.download("run", tmp_path / "copy")
    assert steps_of(run / "ema") == steps_of(tmp_path / "run" / "ema") == [2, 4, 6]
    best, other = (json.loads((one / "best.json").read_text()) for one in (run, tmp_path / "run"))
    assert best == other and best["step"] in steps_of(run)
    assert_same_checkpoint(run / "6", tmp_path / "run" / "6")
    for width in (0.05, 0.08):
        stored, local = (
            read_source(str(one), hints=ForeignConfig(ema_width=width)) for one in (folder, tmp_path / "run")
        )
        for name, array in local.arrays.items():
            np.testing.assert_array_equal(stored.arrays[name], array, err_msg=name)
    assert read_source(f"{folder}/best").meta.step == best["step"]


def interrupted(store: ObjectStore, after: str, seconds: float, *, is_gone: bool) -> threading.Thread:
    """From the moment at which the object `after` is there, the server is busy or gone for some seconds."""

    def interrupt() -> None:
        while not store.files.exists(after):
            time.sleep(0.02)
        if is_gone:
            store.stop()
        store.is_busy = True
        time.sleep(seconds)
        store.is_busy = False
        if is_gone:
            store.start()

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    return thread


def test_a_run_in_a_store_equals_a_local_one_and_falls_back(store, tiny_data, whole_run, tmp_path):
    data = store.upload(tiny_data, "data")
    finished = train_here(data, "s3://bucket/run")
    assert finished.status == 0, finished.err
    assert "done; checkpoint: s3://bucket/run/6" in finished.out and "warning" not in finished.out
    run = store.download("run", tmp_path / "run")
    assert steps_of(run) == [2, 4, 6]
    assert_same_checkpoint(run / "6", whole_run / "6")
    assert metrics(run, "train/loss") == metrics(whole_run, "train/loss")

    (array, *_) = [name for name in store.files.find("bucket/run/6/state") if "/d/" in name]
    content = bytearray(store.files.cat(array))
    content[len(content) // 2] ^= 1
    store.files.pipe(array, bytes(content))
    store.files.pipe("bucket/run/9/state/array", b"of a killed save")
    store.files.pipe("bucket/run/samples/00000002.png", b"not of a checkpoint")
    store.files.pipe("bucket/run/7/metrics.jsonl", b"of another run in this folder")
    again = train_here(data, "s3://bucket/run", "train.is_restore=true")
    assert again.status == 0, again.err
    assert f"checkpoint s3://bucket/run/6 is damaged and skipped: s3://{array}: content differs" in again.out
    assert "resumed from s3://bucket/run/4" in again.out
    run = store.download("run", tmp_path / "again")
    assert sorted(p.name for p in run.iterdir()) == ["2", "4", "6", "6.damaged", "7", "metrics.jsonl", "samples"]
    assert (run / "6.damaged" / array.partition("/6/")[2]).read_bytes() == content
    assert not (run / "6.damaged" / storage.COMMITTED).exists()
    assert_same_checkpoint(run / "6", whole_run / "6")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 5, 6]


def test_lines_are_kept_while_the_store_is_busy(store, caplog, monkeypatch):
    file = storage.connect("s3://bucket/run/metrics.jsonl")
    file.write_text('{"step": 0}\n{"step"')  # a copy of a truncated file
    monkeypatch.setattr(stores.file_system("s3"), "patience", 0.2)
    monkeypatch.setattr(stores.file_system("s3"), "retries", 1)
    lines = UploadedLines(file)
    store.is_busy = True
    for step in range(1, 4):
        lines.append(f'{{"step": {step}}}')
    while "tried again" not in caplog.text:
        time.sleep(0.05)
    store.is_busy = False
    lines.append('{"step": 4}')
    lines.close()
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [0, 1, 2, 3, 4]


def test_lines_that_cannot_be_stored_are_left_in_a_local_file(store, caplog, monkeypatch):
    monkeypatch.setattr("flowdit.line_files.FLUSH_SECONDS", 1.0)
    file = storage.connect("s3://bucket/run/metrics.jsonl")
    monkeypatch.setattr(stores.file_system("s3"), "patience", 0.1)
    monkeypatch.setattr(stores.file_system("s3"), "retries", 1)
    lines = UploadedLines(file)
    store.is_busy = True
    lines.append('{"step": 1}')
    lines.close()
    store.is_busy = False
    copy = Path(caplog.messages[-1].rpartition(" are in ")[2])
    assert copy.read_text() == '{"step": 1}\n'
    copy.unlink()


def provided(data: str, manifest: Manifest) -> Path:
    return mirror.provide_shards(data, manifest.shards, None)


def test_lines_that_are_refused_are_not_uploaded_without_a_pause(store, monkeypatch):
    monkeypatch.setattr("flowdit.line_files.FLUSH_SECONDS", 0.5)
    uploads = []

    def refuse(self, content):
        uploads.append(len(content))
        raise RuntimeError("of a client")

    monkeypatch.setattr(type(epath.Path("s3://bucket/metrics.jsonl")), "write_bytes", refuse)
    lines = UploadedLines(epath.Path("s3://bucket/metrics.jsonl"))
    lines.append("{}")
    lines.flush()
    assert len(uploads) == 1


def test_shards_are_copied_once_and_checked(store, tiny_data, tmp_path, monkeypatch):
    data = store.upload(tiny_data, "data")
    copies = []
    download = mirror.download
    monkeypatch.setattr(
        mirror, "download", lambda source, target: (copies.append(source.name), download(source, target))
    )
    manifest = Manifest.read(data)
    with ThreadPoolExecutor(2) as pool:  # as two processes of a host
        folder, same = pool.map(lambda _: provided(data, manifest), range(2))
    assert folder == same and folder.is_relative_to(tmp_path / "cache" / "flowdit" / "data")
    assert sorted(copies) == sorted(shard.file for shard in manifest.shards)
    shard = folder / manifest.shards[0].file
    for content in (shard.read_bytes()[:-1], shard.read_bytes()[:-1] + b"x"):
        shard.write_bytes(content)
        provided(data, manifest)
        assert shard.read_bytes() == (tiny_data / shard.name).read_bytes()
    shard.unlink()
    store.files.pipe(f"bucket/data/{shard.name}", b"x" * manifest.shards[0].bytes)
    with pytest.raises(ValueError, match=f"s3://bucket/data/{shard.name}: must have sha256 "):
        provided(data, manifest)
    assert not shard.exists()
    monkeypatch.setattr(mirror.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(ValueError, match="^data.local_dir: 0.0 GB are needed for the shards of s3://bucket/data, "):
        provided(data, manifest)


def test_a_data_set_in_a_store_is_verified_shard_by_shard(store, tiny_data, tmp_path, monkeypatch):
    copies: list[int] = []

    def download(source: epath.Path, target: Path) -> None:
        storage.download(source, target)
        copies.append(len(list(target.parent.glob("*.array_record"))))

    monkeypatch.setattr(shard_check, "download", download)
    store.files.put(f"{tiny_data}/", "bucket/data/", recursive=True)
    store.files.rm("bucket/data/train-1.array_record")
    report = tmp_path / "report.jsonl"
    finished = call(verify.main, "data=s3://bucket/data", "threads=1", f"report={report}")
    assert (finished.status, finished.out.splitlines()[-1]) == (
        1,
        "s3://bucket/data: not intact: 1 problem; 32 of 56 records are in order",
    )
    assert json.loads(report.read_text()) == {"file": "train-1.array_record", "record": None, "problem": "is missing"}
    assert copies == [1, 1], "one shard at a time"


def test_a_store_that_cannot_be_used_is_one_line(store, fresh_clients, monkeypatch, tmp_path):
    def refused(**environment: str) -> str:
        stores.file_system.cache_clear()
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ValueError) as problem:
            storage.connect("s3://bucket/run")
        return str(problem.value)

    line = error_line(train_here("s3://bucket/nothing", "s3://other/run"))
    assert line == "error: train.checkpoint_dir: s3://other/run: there is no bucket other"
    line = error_line(train_here("s3://bucket/nothing", tmp_path / "run"))
    assert line.startswith("error: data.path: s3://bucket/nothing: no such folder")
    storage._ask.cache_clear()
    line = refused(AWS_ENDPOINT_URL="http://127.0.0.1:9")
    assert line.startswith("s3://bucket/run: the store cannot be used: Could not connect to the endpoint URL")
    assert "http://127.0.0.1:9" in line
    line = refused(AWS_ACCESS_KEY_ID="", AWS_SECRET_ACCESS_KEY="")
    assert line == "s3://bucket/run: access to the bucket bucket is refused: Unable to locate credentials"
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "s3fs" else find(name, *a))
    assert refused() == "s3://bucket/run: the store cannot be used: needs the package s3fs: pip install 'flowdit[s3]'"


def test_what_is_written_locally_is_refused_in_a_store(tmp_path):
    assert error_line(call(prepare.main, "out=s3://bucket/data")).startswith("error: out: must be a local folder")
    refused = error_line(call(sample.main, "checkpoint=checkpoints", "out=s3://bucket/samples"))
    assert refused.startswith("error: out: must be a local folder")


def test_a_report_is_made_of_a_run_in_a_store(store, whole_run, tmp_path):
    store.upload(whole_run, "runs/mine")
    for step in steps_of(whole_run):
        store.files.pipe(f"bucket/runs/mine/{step}/{storage.COMMITTED}", b"")
    image = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(image, "PNG")
    store.files.pipe("bucket/runs/mine/samples/00000003.png", image.getvalue())
    store.files.pipe("bucket/runs/mine/evaluation/scores.json", b"[]")
    finished = call(report.main, "run=s3://bucket/runs/mine", f"out={tmp_path / 'report.html'}")
    assert (finished.status, finished.err) == (0, "")
    assert "s3://bucket/runs/mine/evaluation/scores.json: must be the scores of flowdit.evaluate" in finished.out
    page = (tmp_path / "report.html").read_text()
    assert "samples of mine at step 3" in page and "model.hidden_dim" in page and "CPU cores" in page
    missing = error_line(call(report.main, "run=s3://bucket/runs"))
    assert "run: must be a run folder with metrics.jsonl: s3://bucket/runs: it holds the run folders" in missing


@pytest.mark.slow
@pytest.mark.parametrize(("is_gone", "seconds"), [(False, 5), (True, 10)])
def test_an_interruption_of_the_store_loses_nothing(store, tiny_data, whole_run, tmp_path, is_gone, seconds):
    data = store.upload(tiny_data, "data")
    interruption = interrupted(store, "bucket/run/2/state/manifest.ocdbt", seconds, is_gone=is_gone)
    finished = train_here(data, "s3://bucket/run", "train.sample_every=3")
    interruption.join()
    assert finished.status == 0, finished.err
    assert "warning" not in finished.out
    run = store.download("run", tmp_path / "run")
    assert steps_of(run) == [2, 4, 6]
    assert_same_checkpoint(run / "6", whole_run / "6")
    assert metrics(run, "train/loss") == metrics(whole_run, "train/loss")
    assert len(list((run / "samples").iterdir())) == 2


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.0, 0.3, 0.6, 1.0, 1.5, 2.0])
def test_a_killed_run_resumes_bit_identically(store, tiny_data, whole_run, tmp_path, seconds):
    data = store.upload(tiny_data, "data")
    settings = ("experiment=tiny", *FAST, f"data.path={data}", "train.checkpoint_dir=s3://bucket/run")
    process = start(str(REPOSITORY / "train_stage1.py"), *settings, devices=4)
    wait_for_line(process, "step 2/6")
    time.sleep(seconds)  # while step 2 or a later one is being saved
    process.kill()
    finish(process)
    again = train_here(data, "s3://bucket/run", "train.is_restore=true")
    assert again.status == 0, again.err
    assert "damaged" not in again.out
    run = store.download("run", tmp_path / "run")
    assert steps_of(run) == [2, 4, 6]
    assert_same_checkpoint(run / "6", whole_run / "6")
    assert metrics(run, "train/loss") == metrics(whole_run, "train/loss")


@pytest.mark.slow
def test_two_processes_share_a_run_and_the_copies_of_shards(store, tiny_data, whole_run, tmp_path):
    data = store.upload(tiny_data, "data")
    address = free_address()
    settings = ("experiment=tiny", *FAST, f"data.path={data}", "train.checkpoint_dir=s3://bucket/run")
    settings += (f"mesh.coordinator={address}", "mesh.num_processes=2")
    script = str(REPOSITORY / "train_stage1.py")
    pair = [start(script, *settings, f"mesh.process_id={i}", devices=2) for i in (0, 1)]
    outputs = [finish(process) for process in pair]
    assert [output.status for output in outputs] == [0, 0], outputs
    assert sum("copying 3 shards" in output.out for output in outputs) <= 1
    run = store.download("run", tmp_path / "run")
    assert steps_of(run) == [2, 4, 6]
    ours, expected = metrics(run, "train/loss"), metrics(whole_run, "train/loss")
    assert ours == pytest.approx(expected, rel=1e-5)
    verify_files(run / "6")
    alone = train_here(data, "s3://bucket/run", "train.is_restore=true", "train.num_steps=8")
    assert "resumed from s3://bucket/run/6" in alone.out, alone.err


@pytest.mark.slow
def test_stage_2_starts_from_a_store_reads_a_cache_there_and_is_sampled(store, tiny_data, whole_run, tmp_path):
    data, classes = store.upload(tiny_data, "data"), store.upload(whole_run, "classes")
    write_cache(
        tmp_path / "text",
        tiny_data,
        Manifest.read(tiny_data),
        load_text_encoder(TextConfig("wordllama", max_length=32, dtype="float32")),
    )
    cache = store.upload(tmp_path / "text", "text")
    settings = (f"data.text_cache={cache}", f"train.init_from={classes}")
    finished = train_text_here(data, "s3://bucket/run", *settings)
    assert finished.status == 0, finished.err
    local = train_text_here(
        tiny_data, tmp_path / "run", f"data.text_cache={tmp_path / 'text'}", f"train.init_from={whole_run}"
    )
    assert local.status == 0, local.err
    run = store.download("run", tmp_path / "remote")
    assert_same_checkpoint(run / "6", tmp_path / "run" / "6")
    store.files.rm("bucket/run/6", recursive=True)
    again = train_text_here(data, "s3://bucket/run", "train.is_restore=true")
    assert "resumed from s3://bucket/run/4" in again.out, again.err
    assert_same_checkpoint(store.download("run", tmp_path / "again") / "6", run / "6")
    drawn = call(sample.main, "checkpoint=s3://bucket/run", "prompt=a red apple", "steps=1", "guidance=1", "out=images")
    assert drawn.status == 0, drawn.err
    assert "s3://bucket/run/6: the newest intact checkpoint" in drawn.out and Path("images/grid.png").is_file()


@pytest.mark.slow
def test_a_profile_is_copied_to_the_store(store, tiny_data):
    finished = train_here(tiny_data, "s3://bucket/run", "train.profile=[3,4]")
    assert finished.status == 0, finished.err
    assert any(name.endswith(".xplane.pb") for name in store.files.find("bucket/run/profile"))
