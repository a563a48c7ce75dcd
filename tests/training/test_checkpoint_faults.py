"""Failing saves, runs that end with an error, and checkpoints that do not match their folder."""

import dataclasses
import json
import shutil
import threading
import time
from pathlib import Path

import grain
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader
from damage import SHARD, flip_bit, refused, write_payloads
from runs import (
    FAST,
    assert_same_checkpoint,
    call,
    error_line,
    finish,
    metrics,
    start,
    steps_of,
    stored_arrays,
    stored_json,
    train_here,
    wait_for_line,
)

from flowdit import convert, sample
from flowdit.checkpoint import files as checkpoint_files
from flowdit.checkpoint import writer as checkpoint_writer
from flowdit.checkpoint.files import DamagedCheckpoint, verify_files, write_checksums
from flowdit.checkpoint.meta import RunMeta
from flowdit.checkpoint.writer import checkpoint_bytes
from flowdit.line_files import append_line
from flowdit.tracking import Progress
from flowdit.training import loop

SLOW_STEPS = """
import time
from flowdit.tracking import Progress
add = Progress.add
def slow(self, metrics):
    time.sleep(0.05)
    add(self, metrics)
Progress.add = slow
from flowdit.train import stage1
stage1()
"""
LIMITED_FILES = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n" + SLOW_STEPS
"""Writing a file of more than 100 kB fails, as on a disk that fills up."""
LONG = ("train.num_steps=60", "train.save_every=20", "train.log_every=1")


@pytest.fixture
def run(whole_run, tmp_path) -> Path:
    """A copy of a finished run with checkpoints 2, 4 and 6."""
    return shutil.copytree(whole_run, tmp_path / "run")


def start_slowly(data: Path, run: Path, script: str):
    settings = ("experiment=tiny", *FAST, *LONG, f"data.path={data}", f"train.checkpoint_dir={run}")
    return start("-c", script, *settings)


def fail_saves(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Make the next `count` saves fail in the background, at their end."""
    failures = iter(range(count))

    def fail(folder: Path) -> None:
        if next(failures, None) is not None:
            raise OSError(28, "No space left on device", str(folder / "checksums.json"))
        write_checksums(folder)

    monkeypatch.setattr(checkpoint_writer, "write_checksums", fail)


def slow_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make steps slow enough that a background save ends before the next one is due."""
    add = Progress.add
    monkeypatch.setattr(Progress, "add", lambda self, metrics: (time.sleep(0.05), add(self, metrics)))


def test_failed_save_is_detected_and_the_current_state_saved(tiny_data, tmp_path, monkeypatch):
    fail_saves(monkeypatch, 1)
    slow_down(monkeypatch)
    run = tmp_path / "run"
    finished = train_here(tiny_data, run, *LONG)
    assert (finished.status, finished.err) == (0, "")
    (warning,) = [line for line in finished.out.splitlines() if line.startswith("warning: ")]
    assert warning.startswith(f"warning: checkpoint {run / '20'}: could not be written: [Errno 28]")
    instead, *rest = steps_of(run)
    assert 20 < instead < 40 and rest == [40, 60]
    assert warning.endswith(f"last good: none; saving step {instead} at once")
    assert stored_json(run / str(instead), "dataset")["next_batch"] == instead


def test_two_failed_saves_end_the_run_and_name_the_last_good_one(tiny_data, run, monkeypatch):
    fail_saves(monkeypatch, 2)
    slow_down(monkeypatch)
    finished = train_here(tiny_data, run, *LONG, "train.is_restore=true")
    assert finished.status == 2
    line = error_line(finished)
    step = int(line.partition(": could not be written: ")[0].rpartition("/")[2])
    assert 20 < step < 40
    assert line.endswith(f"last good: {run / '6'}")
    assert f"checkpoint {run / '20'}: could not be written" in finished.out
    assert steps_of(run) == [2, 4, 6]


def test_failed_save_leaves_no_old_checkpoint_behind(tiny_data, run, monkeypatch):
    """Orbax removes checkpoints to delete from its list first, and a failed save deletes nothing."""
    fail_saves(monkeypatch, 1)
    finished = train_here(tiny_data, run, "train.is_restore=true", "train.num_steps=12", "train.keep_last=2")
    assert (finished.status, finished.err) == (0, "")
    assert "could not be written" in finished.out
    assert len(steps_of(run)) == 2 and steps_of(run)[-1] == 12


def test_full_console_does_not_end_the_run(tiny_data, tmp_path):
    run = tmp_path / "run"
    script = "import sys; sys.stdout = open('/dev/full', 'w')\nfrom flowdit.train import stage1; stage1()"
    settings = ("experiment=tiny", *FAST, f"data.path={tiny_data}", f"train.checkpoint_dir={run}")
    assert finish(start("-c", script, *settings, PYTHONUNBUFFERED="")).status in (
        0,
        120,
    )  # 120: Python's status if flushing fails at exit
    assert steps_of(run) == [2, 4, 6]


def test_failed_last_save_is_tried_again(tiny_data, whole_run, tmp_path, monkeypatch):
    fail_saves(monkeypatch, 1)
    finished = train_here(tiny_data, tmp_path / "run", "train.save_every=0")
    assert (finished.status, finished.err) == (0, "")
    assert "could not be written" in finished.out
    assert_same_checkpoint(tmp_path / "run" / "6", whole_run / "6")


def test_process_exits_after_its_error_line(tiny_data, tmp_path):
    """With a run folder replaced by a file, threads of the storage library would wait for minutes."""
    run = tmp_path / "run"
    process = start_slowly(tiny_data, run, SLOW_STEPS)
    wait_for_line(process, "step 20/60")
    while not (run / "20").is_dir():  # it is saved in the background
        time.sleep(0.01)
    run.rename(tmp_path / "moved")
    run.write_text("in the way")
    threading.Thread(target=process.stdout.read, daemon=True).start()
    line = process.stderr.readline()
    reported = time.monotonic()
    assert process.wait(timeout=60) == 2
    assert time.monotonic() - reported < 10
    assert line == f"error: checkpoint {run / '40'}: could not be written: " + line.partition("written: ")[2]
    assert "Not a directory" in line and process.stderr.read() == ""
    assert steps_of(tmp_path / "moved") == [20]


def test_file_that_cannot_be_written_is_one_line_with_its_name(tiny_data, tmp_path):
    run = tmp_path / "run"
    finished = finish(start_slowly(tiny_data, run, LIMITED_FILES))
    line = error_line(finished)
    assert "File too large" in line and ".orbax-checkpoint-tmp/" in line and line.endswith("last good: none")
    assert f"warning: checkpoint {run / '20'}: could not be written" in finished.out
    assert sorted(metrics(run, "train/loss"))[:3] == [1, 2, 3]


def test_space_check_counts_more_than_arrays(whole_run):
    meta = RunMeta.parse(stored_json(whole_run / "6", "meta"))
    small = {"array": np.zeros(4, np.float32)}
    long = dataclasses.replace(meta, versions={"x" * 1000 + str(i): "1" for i in range(1000)})
    assert checkpoint_bytes(small, long) - checkpoint_bytes(small, meta) > 1_000_000
    on_disk = sum(path.stat().st_size for path in (whole_run / "6").rglob("*") if path.is_file())
    assert checkpoint_bytes(stored_arrays(whole_run / "6"), meta) > on_disk


def spoil_late_record(data: Path) -> None:
    """Replace a record that is read in the sixth and last batch of a run by random bytes."""
    order = grain.MapDataset.range(48).seed(0).shuffle()
    late = min(order[i] for i in range(40, 48))
    reader = ArrayRecordReader(str(data / SHARD))
    payloads = reader.read_all()
    reader.close()
    payloads[late] = b"junk"
    write_payloads(data, payloads)


def test_bad_record_saves_first(tiny_data, whole_run, tmp_path):
    """The steps before the bad record are saved, as after a signal."""
    data, run = shutil.copytree(tiny_data, tmp_path / "data"), tmp_path / "run"
    spoil_late_record(data)
    settings = ("train.save_every=0", "data.prefetch=1", "data.num_threads=1")
    finished = train_here(data, run, *settings)
    assert f"{data / SHARD}: record " in error_line(finished)
    (step,) = steps_of(run)
    assert f"warning: the run ends with an error; step {step} is saved: {run / str(step)}" in finished.out
    assert stored_json(run / str(step), "dataset")["next_batch"] == step
    expected = metrics(whole_run, "train/loss")
    assert metrics(run, "train/loss") == {n: expected[n] for n in range(1, step + 1)}
    # A restart reads it at once: nothing new to save.
    again = train_here(data, run, *settings, "train.is_restore=true")
    assert error_line(again) == error_line(finished) and "is saved" not in again.out


def test_allowed_bad_record_is_reported_and_skipped(tiny_data, tmp_path):
    """Damaged after the data were prepared: by default the hash check of small data sets refuses it."""
    data, run = shutil.copytree(tiny_data, tmp_path / "data"), tmp_path / "run"
    flip_bit(data / SHARD, 0.4)  # within a record, as the middle is a header of the file
    assert "sha256" in error_line(train_here(data, run))
    finished = train_here(data, run, "data.max_bad_records=1")
    assert (finished.status, finished.err) == (0, "")
    (warning,) = [line for line in finished.out.splitlines() if line.startswith("warning: ")]
    assert warning.startswith(f"warning: bad record, the next one is read instead: {data / SHARD}: record ")
    assert "  bad records 1" in finished.out and metrics(run, "data/bad_records")[6] == 1


def test_logging_failures_do_not_end_the_run(tiny_data, whole_run, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").mkdir()
    (run / "samples").write_text("in the way")
    finished = train_here(tiny_data, run, "train.sample_every=3", "train.is_restore=true", "train.sample_labels=[cat]")
    assert (finished.status, finished.err) == (0, "")
    warnings = [line for line in finished.out.splitlines() if line.startswith("warning: ")]
    problems = ((run / "metrics.jsonl", "Is a directory"), (run / "samples", "File exists"))
    expected = [f"warning: {path} cannot be written ({problem}): continuing without it" for path, problem in problems]
    assert warnings == expected
    assert_same_checkpoint(run / "6", whole_run / "6")


@pytest.mark.parametrize("cut", ['{"step": 2, "tra', "{", "x" * 100_000])
def test_truncated_line_of_the_log_does_not_corrupt_the_next(tmp_path, cut):
    file = tmp_path / "metrics.jsonl"
    append_line(file, '{"step": 1}')
    with file.open("a") as stream:
        stream.write(cut)
    append_line(file, '{"step": 3}')
    append_line(file, '{"step": 4}')
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 3, 4]


def rewrite_checksums(step_folder: Path, change) -> None:
    file = step_folder / checkpoint_files.CHECKSUMS
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


CHECKSUMS = {
    "an empty object": lambda sums: {},
    "an empty list": lambda sums: [],
    "pairs": lambda sums: list(sums.items()),
    "a file left out": lambda sums: dict(list(sums.items())[1:]),
    "a file too many": lambda sums: sums | {"state/no_such_file": "0" * 64},
    "numbers": lambda sums: dict.fromkeys(sums, 0),
}


@pytest.mark.parametrize("change", CHECKSUMS.values(), ids=CHECKSUMS.keys())
def test_checksums_must_cover_every_file(run, change):
    rewrite_checksums(run / "6", change)
    with pytest.raises(DamagedCheckpoint, match=str(run / "6")):
        verify_files(run / "6")


def test_other_folders_are_not_part_of_a_checkpoint(run):
    (run / "6" / ".git").mkdir()
    (run / "6" / ".git" / "HEAD").write_text("ref")
    verify_files(run / "6")


def test_unreadable_file_is_not_reported_as_damaged(tiny_data, run):
    """Permissions or a network disk: the checkpoint may be intact, so it is not renamed."""
    (run / "6" / "checksums.json").unlink()
    (run / "6" / "checksums.json").mkdir()
    line = refused(lambda: train_here(tiny_data, run, "train.is_restore=true"), run)
    assert line == f"error: {run / '6' / 'checksums.json'}: cannot be read: Is a directory"


def test_checkpoint_with_empty_checksums_is_skipped(tiny_data, run):
    rewrite_checksums(run / "6", lambda sums: {})
    finished = train_here(tiny_data, run, "train.is_restore=true", "train.num_steps=5")
    assert (finished.status, finished.err) == (0, "")
    assert f"checkpoint {run / '6'} is damaged and skipped: {run / '6'}" in finished.out
    assert f"resumed from {run / '4'}" in finished.out and (run / "6.damaged").is_dir()


def test_folder_must_be_named_after_its_step(tiny_data, run):
    (run / "6").rename(run / "8")
    line = refused(lambda: train_here(tiny_data, run, "train.is_restore=true", "train.num_steps=9"), run)
    assert line == f"error: {run / '8'}: must be named after its step, 6"


def test_intact_checkpoint_of_another_format_is_not_renamed(tiny_data, run):
    file = run / "6" / "meta" / "metadata"
    file.write_text(file.read_text().replace('"format": 1', '"format": 2'))
    write_checksums(run / "6")
    line = refused(lambda: train_here(tiny_data, run, "train.is_restore=true"), run)
    assert line == f"error: {run / '6'}: metadata: format: must be 1, got 2"


def test_checkpoint_of_another_model_is_not_renamed(tiny_data, run, tmp_path):
    line = refused(lambda: train_here(tiny_data, run, "train.is_restore=true", "model.depth=3"), run)
    assert line == "error: model.depth: must be 2 as in the checkpoint to resume, got 3"


@pytest.mark.parametrize("main", [sample.main, convert.main], ids=["sample", "convert"])
@pytest.mark.parametrize("word", ["config", "latent_mean", "{"])
def test_damaged_metadata_are_detected_before_parsing(run, main, word):
    file = run / "6" / "meta" / "metadata"
    text = file.read_text()
    file.write_text(text.replace(word, chr(ord(word[0]) ^ 1) + word[1:], 1))
    arguments = [f"checkpoint={run / '6'}"] if main is sample.main else [f"source={run / '6'}", "target=out"]
    line = refused(lambda: call(main, *arguments), run)
    field = arguments[0].partition("=")[0]
    assert line == f"error: {field}: {file}: content differs from its checksum"


@pytest.mark.slow
def test_logged_learning_rate_is_the_one_used(tiny_data, tmp_path, monkeypatch):
    """Skipped steps do not update, and the schedule counts updates."""
    batches, numbers = loop.prefetch_to_device, iter(range(100))

    def second_and_third_not_finite(mesh, stream, encode):
        for batch, data_state in batches(mesh, stream, encode):
            factor = np.float32("nan" if next(numbers) in (1, 2) else 1)
            yield batch | {"latent": batch["latent"] * factor}, data_state

    monkeypatch.setattr(loop, "prefetch_to_device", second_and_third_not_finite)
    run = tmp_path / "run"
    assert train_here(tiny_data, run, "train.save_every=1", "optim.learning_rate=1e-3").status == 0
    counts = {step: int(stored_arrays(run / str(step))["state.opt_state.1.0.count"]) for step in steps_of(run)}
    assert list(counts.values()) == [1, 1, 1, 2, 3, 4]
    used = {step: 1e-3 * count / 4 for step, count in counts.items()}  # four steps of warm-up
    assert metrics(run, "train/learning_rate") == pytest.approx(used, rel=1e-5)
