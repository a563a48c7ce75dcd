"""A run that is stopped at any step and resumed ends like an uninterrupted one, bit by bit on the same devices."""

import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from runs import (
    FAST,
    NUM_STEPS,
    assert_same_checkpoint,
    finish,
    metrics,
    start,
    steps_of,
    stored_arrays,
    stored_json,
    train_here,
    wait_for_line,
)

from flowdit.data.loader import Source, open_source
from flowdit.data.manifest import Manifest
from flowdit.data.schema import LabelField, record_schema
from flowdit.data.stream import TrainStream
from flowdit.tracking import Progress

LONG = ("train.num_steps=60", "train.save_every=10")
"""Long enough that a signal sent at step 15 arrives well before the end."""

SAVE_THAT_HANGS = """
import time
from flowdit.checkpoint import writer as checkpoint_writer
write_checksums = checkpoint_writer.write_checksums
def hang(folder):
    if folder.name.startswith("20."):
        print("saving", flush=True)
        time.sleep(600)
    write_checksums(folder)
checkpoint_writer.write_checksums = hang
from flowdit.train import stage1
stage1()
"""


def stop_after(monkeypatch: pytest.MonkeyPatch, count: int, number: int = signal.SIGTERM) -> None:
    """Send a signal to this process during the `count`-th step from now."""
    add, seen = Progress.add, []

    def add_and_signal(self, metrics):
        add(self, metrics)
        seen.append(metrics)
        if len(seen) == count:
            signal.raise_signal(number)

    monkeypatch.setattr(Progress, "add", add_and_signal)


def tiny_source(data: Path) -> Source:
    manifest = Manifest.read(data)
    return open_source(
        data, manifest, schema=record_schema(manifest.latent_shape, {"label": LabelField(manifest.num_classes)})
    )


def next_batch(data: Path, run: Path) -> dict[str, np.ndarray]:
    """The first batch of a run resumed from its newest checkpoint."""
    stream = TrainStream(tiny_source(data), seed=0, batch_size=8)
    stream.set_state(stored_json(run / str(steps_of(run)[-1]), "dataset"))
    return next(stream)


@pytest.mark.parametrize(
    ("stops", "number"),
    [
        ((2,), signal.SIGINT),
        pytest.param((5,), signal.SIGTERM, marks=pytest.mark.slow),
        ((1, 3), signal.SIGTERM),
    ],
)
def test_resume_is_exact(tiny_data, whole_run, tmp_path, stops, number):
    run, at = tmp_path / "run", 0
    for stop in stops:
        with pytest.MonkeyPatch.context() as patch:
            stop_after(patch, stop - at, number)
            requeue = number == signal.SIGTERM
            finished = train_here(tiny_data, run, "train.is_restore=null", f"train.requeue={str(requeue).lower()}")
        assert (finished.status, finished.err) == (75 if requeue else 0, "")
        assert f"stopped by signal; checkpoint: {run / str(stop)}" in finished.out
        assert steps_of(run)[-1] == stop
        at = stop
    finished = train_here(tiny_data, run, "train.is_restore=true", "train.requeue=true")
    assert finished.status == 0
    assert f"resumed from {run / str(at)}" in finished.out
    assert_same_checkpoint(run / str(NUM_STEPS), whole_run / str(NUM_STEPS))
    assert metrics(run, "train/loss") == metrics(whole_run, "train/loss")
    assert metrics(run, "train/learning_rate") == metrics(whole_run, "train/learning_rate")
    assert metrics(run, "train/total_flops") == metrics(whole_run, "train/total_flops")


def test_a_run_that_ended_before_its_first_checkpoint_starts_again(tiny_data, whole_run, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()
    assert train_here(tiny_data, tmp_path / "run", "train.is_restore=true").status == 0
    assert_same_checkpoint(tmp_path / "run" / str(NUM_STEPS), whole_run / str(NUM_STEPS))


def test_the_next_batch_is_that_of_an_uninterrupted_run(tiny_data, tmp_path, monkeypatch):
    # The loader and the copy to the devices are ahead of the step: prefetched batches must not count as seen.
    stop_after(monkeypatch, 3)
    train_here(tiny_data, tmp_path / "run")
    stream = TrainStream(tiny_source(tiny_data), seed=0, batch_size=8)
    expected = [next(stream) for _ in range(4)][3]
    np.testing.assert_equal(next_batch(tiny_data, tmp_path / "run"), expected)


def test_a_finished_run_resumes_without_steps(tiny_data, whole_run, tmp_path):
    run = shutil.copytree(whole_run, tmp_path / "run")
    finished = train_here(tiny_data, run, "train.is_restore=true")
    assert finished.status == 0, finished.err
    assert_same_checkpoint(run / str(NUM_STEPS), whole_run / str(NUM_STEPS))


def test_resume_on_another_mesh_has_the_same_losses(tiny_data, whole_run, tmp_path):
    run = copy_up_to(whole_run, tmp_path / "run", 2)
    assert train_here(tiny_data, run, "train.is_restore=true", "mesh.fsdp=4").status == 0
    assert_close_losses(run, whole_run)


def test_resume_on_one_device_instead_of_four_has_the_same_losses(tiny_data, whole_run, tmp_path):
    run = copy_up_to(whole_run, tmp_path / "run", 2)
    finished = finish(start_training(tiny_data, run, "train.is_restore=true"))
    assert finished.status == 0, finished.err
    assert "1 cpu device(s)" in finished.out
    assert_close_losses(run, whole_run)


def test_the_dtype_of_the_first_moment_may_change_on_resume(tiny_data, whole_run, tmp_path):
    """It is cast, which is logged; a resume without a change stays exact."""
    run, narrow = copy_up_to(whole_run, tmp_path / "run", 2), "optim.first_moment_dtype=bfloat16"
    resumed = train_here(tiny_data, run, "train.is_restore=true", narrow)
    assert "changed since the checkpoint: optim.first_moment_dtype: float32 -> bfloat16" in resumed.out
    for step, moment in ((2, "float32"), (4, "bfloat16")):
        arrays = stored_arrays(run / str(step)).items()
        dtypes = {part: x.dtype for name, x in arrays for part in ("mu", "nu") if f".{part}." in name}
        assert dtypes == {"mu": moment, "nu": "float32"}
    losses, expected = metrics(run, "train/loss"), metrics(whole_run, "train/loss")
    assert losses[3] == pytest.approx(expected[3], rel=1e-5) and losses[6] == pytest.approx(expected[6], rel=1e-2)
    again = copy_up_to(run, tmp_path / "again", 4)
    assert train_here(tiny_data, again, "train.is_restore=true", narrow).err == ""
    assert_same_checkpoint(again / str(NUM_STEPS), run / str(NUM_STEPS))
    wide = "optim.first_moment_dtype=float32"
    back = train_here(tiny_data, again, "train.is_restore=true", "train.num_steps=7", wide)
    assert "optim.first_moment_dtype: bfloat16 -> float32" in back.out
    assert back.status == 0 and np.isfinite(metrics(again, "train/loss")[7])


@pytest.mark.slow
def test_wsd_with_more_steps_from_before_the_decay_is_the_longer_run(tiny_data, tmp_path):
    wsd, long = ("optim.schedule=wsd", "optim.decay_steps=2", "optim.warmup_steps=1"), f"train.num_steps={NUM_STEPS}"
    assert train_here(tiny_data, tmp_path / "long", *wsd).status == 0
    assert train_here(tiny_data, tmp_path / "short", *wsd, "train.num_steps=4").status == 0
    rates = metrics(tmp_path / "long", "train/learning_rate")
    assert rates[4] > rates[5] > rates[6] > 0
    run = copy_up_to(tmp_path / "short", tmp_path / "run", 2)
    assert train_here(tiny_data, run, *wsd, long, "train.is_restore=true").status == 0
    assert_same_checkpoint(run / str(NUM_STEPS), tmp_path / "long" / str(NUM_STEPS))


def copy_up_to(whole: Path, run: Path, step: int) -> Path:
    """A copy of a run without the checkpoints after `step`."""
    shutil.copytree(whole, run)
    (run / "metrics.jsonl").unlink()
    for later in steps_of(run):
        if later > step:
            shutil.rmtree(run / str(later))
    return run


def assert_close_losses(run: Path, whole: Path) -> None:
    losses, expected = metrics(run, "train/loss"), metrics(whole, "train/loss")
    assert sorted(losses) == [3, 4, 5, 6]
    np.testing.assert_allclose([losses[step] for step in losses], [expected[step] for step in losses], rtol=1e-5)


def start_training(data: Path, run: Path, *overrides: str, script: str = "from flowdit.train import stage1; stage1()"):
    return start("-c", script, "experiment=tiny", *FAST, f"data.path={data}", f"train.checkpoint_dir={run}", *overrides)


@pytest.fixture(scope="module")
def long_run(tiny_data, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("long") / "run"
    finished = finish(start_training(tiny_data, run, *LONG))
    assert finished.status == 0, finished.err
    return run


def resume_and_compare(data: Path, run: Path, long_run: Path) -> None:
    assert steps_of(run) and not (run / "60").exists()
    finished = finish(start_training(data, run, *LONG, "train.is_restore=true"))
    assert "resumed from" in finished.out
    assert (finished.status, finished.err) == (0, "")
    assert_same_checkpoint(run / "60", long_run / "60")
    assert [path.name for path in run.iterdir() if "tmp" in path.name] == []


def wait_for_folder(path: Path, process: subprocess.Popen[str]) -> None:
    while not path.exists():
        assert process.poll() is None, finish(process).err
        time.sleep(0.01)


def test_killed_run_resumes_exactly(tiny_data, tmp_path, long_run):
    run = tmp_path / "run"
    process = start_training(tiny_data, run, *LONG)
    wait_for_folder(run / "10", process)
    process.kill()
    assert finish(process).status == -signal.SIGKILL
    resume_and_compare(tiny_data, run, long_run)


def test_run_killed_in_the_middle_of_a_save_resumes_exactly(tiny_data, tmp_path, long_run):
    run = tmp_path / "run"
    process = start_training(tiny_data, run, *LONG, script=SAVE_THAT_HANGS)
    wait_for_line(process, "saving")
    process.kill()
    finish(process)
    assert steps_of(run) == [10]
    assert [path.name for path in run.glob("20*")] == ["20.orbax-checkpoint-tmp"]
    resume_and_compare(tiny_data, run, long_run)


def test_sigterm_saves_and_exits_cleanly(tiny_data, tmp_path):
    run = tmp_path / "run"
    process = start_training(tiny_data, run, *LONG)
    wait_for_line(process, "step 15/60")
    process.terminate()
    finished = finish(process)
    assert (finished.status, finished.err) == (0, "")
    assert f"stopped by signal; checkpoint: {run / str(steps_of(run)[-1])}" in finished.out
    assert steps_of(run)[-1] == max(metrics(run, "train/loss")) < 60
