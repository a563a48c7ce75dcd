"""Checkpoints: damage is detected, reported and skipped; which ones are kept; they cannot run code."""

import pickle
import pickletools
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from damage import flip_bit
from runs import assert_same_checkpoint, error_line, steps_of, stored_arrays, train_here

from flowdit import load
from flowdit.checkpoint.files import DamagedCheckpoint, verify_files
from flowdit.training import loop


@pytest.fixture
def run(whole_run, tmp_path) -> Path:
    """A copy of a finished run with checkpoints 2, 4 and 6."""
    return shutil.copytree(whole_run, tmp_path / "run")


def largest_file(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def cut_short(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def remove(path: Path) -> Path:
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    return path


DAMAGES: dict[str, Callable[[Path], Path]] = {
    "flipped bit in state": lambda step: flip_bit(largest_file(step / "state")),
    "flipped bit in EMA": lambda step: flip_bit(largest_file(step / "model_ema")),
    "flipped bit in dataset": lambda step: flip_bit(largest_file(step / "dataset")),
    "flipped bit in meta": lambda step: flip_bit(largest_file(step / "meta")),
    "truncated file": lambda step: cut_short(largest_file(step / "state")),
    "deleted file": lambda step: remove(largest_file(step / "state")),
    "missing item": lambda step: remove(step / "model_ema"),
    "missing meta": lambda step: remove(step / "meta"),
    "missing checksums": lambda step: remove(step / "checksums.json"),
    "damaged checksums": lambda step: cut_short(step / "checksums.json"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damage_is_found_and_named(run, damage):
    verify_files(run / "6")
    damaged = damage(run / "6")
    with pytest.raises(DamagedCheckpoint, match=f"^{damaged}"):
        verify_files(run / "6")


@pytest.mark.parametrize(
    "name",
    [
        "missing meta",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("flipped bit in state", "damaged checksums")),
    ],
)
def test_damaged_newest_checkpoint_is_reported_and_skipped(tiny_data, whole_run, run, name):
    damaged = DAMAGES[name](run / "6")
    finished = train_here(tiny_data, run, "train.is_restore=true")
    assert (finished.status, finished.err) == (0, "")
    (notice,) = [line for line in finished.out.splitlines() if " is damaged " in line]
    assert notice.startswith(f"warning: checkpoint {run / '6'} is damaged and skipped: {damaged}")
    assert f"resumed from {run / '4'}" in finished.out
    assert (run / "6.damaged").is_dir()
    # The step is saved again, with the same content.
    assert_same_checkpoint(run / "6", whole_run / "6")


def test_several_damaged_checkpoints_are_skipped(tiny_data, run):
    for step in ("4", "6"):
        flip_bit(largest_file(run / step / "state"))
    finished = train_here(tiny_data, run, "train.is_restore=true")
    assert f"resumed from {run / '2'}" in finished.out
    assert steps_of(run) == [2, 4, 6]
    assert sorted(path.name for path in run.glob("*.damaged")) == ["4.damaged", "6.damaged"]


def test_step_that_is_damaged_a_second_time_replaces_the_renamed_one(tiny_data, run):
    (run / "6.damaged").mkdir()  # by an earlier resume
    flip_bit(largest_file(run / "6" / "state"))
    assert train_here(tiny_data, run, "train.is_restore=true").status == 0
    verify_files(run / "6")
    assert (run / "6.damaged" / "state").is_dir()
    assert sorted(path.name for path in run.glob("6*")) == ["6", "6.damaged"]


def test_only_damaged_checkpoints_give_one_line_and_are_kept(tiny_data, run):
    for step in ("2", "4", "6"):
        flip_bit(largest_file(run / step / "state"))
    line = error_line(train_here(tiny_data, run, "train.is_restore=true"))
    assert line.startswith(f"error: {run}: no checkpoint can be read: ")
    assert steps_of(run) == [2, 4, 6]


def test_leftovers_of_an_interrupted_save_are_ignored(tiny_data, run):
    shutil.copytree(run / "6", run / "8.orbax-checkpoint-tmp")
    finished = train_here(tiny_data, run, "train.is_restore=true")
    assert (finished.status, finished.err) == (0, "")
    assert f"resumed from {run / '6'}" in finished.out


def test_keeps_the_newest_and_every_multiple(tiny_data, tmp_path):
    train_here(tiny_data, tmp_path / "run", "train.save_every=1", "train.keep_last=2", "train.keep_every=3")
    assert steps_of(tmp_path / "run") == [3, 5, 6]


@pytest.mark.slow
def test_last_step_is_saved_off_the_interval(tiny_data, tmp_path):
    train_here(tiny_data, tmp_path / "run", "train.save_every=4")
    assert steps_of(tmp_path / "run") == [4, 6]


def is_pickle(content: bytes) -> bool:
    try:
        list(pickletools.genops(content))
    except Exception:
        return False
    return True


def test_checkpoint_holds_no_pickle_and_is_read_without_one(whole_run, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("a checkpoint was unpickled")

    files = [path for path in (whole_run / "6").rglob("*") if path.is_file()]
    assert [path for path in files if is_pickle(path.read_bytes())] == []
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    assert load(str(whole_run / "6")).trained.step == 6


def test_sampling_reads_the_moving_average(whole_run):
    stored = stored_arrays(whole_run / "6")
    loaded = load(str(whole_run / "6")).trained.model.patch_embed.weight
    np.testing.assert_array_equal(loaded, stored["model_ema.patch_embed.weight"])
    assert not np.array_equal(loaded, stored["state.model.patch_embed.weight"])


def test_too_many_skipped_steps_end_the_run_and_report_the_last_good_checkpoint(tiny_data, run, monkeypatch):
    batches = loop.prefetch_to_device

    def not_finite(mesh, stream, encode):
        for batch, data_state in batches(mesh, stream, encode):
            yield batch | {"latent": batch["latent"] * np.float32("nan")}, data_state

    monkeypatch.setattr(loop, "prefetch_to_device", not_finite)
    for step in ("4", "6"):
        shutil.rmtree(run / step)
    before = stored_arrays(run / "2")
    settings = ("train.is_restore=true", "train.max_skipped_in_row=3", "train.save_every=0")
    line = error_line(train_here(tiny_data, run, *settings))
    assert line.startswith("error: train.max_skipped_in_row: the last 3 steps")
    assert line.endswith(f"last good checkpoint: {run / '2'}; see {run / 'skipped' / '3.json'}")
    assert steps_of(run) == [2]
    np.testing.assert_equal(stored_arrays(run / "2"), before)
