"""Resuming from the run folder alone: the stored configuration, and over it what is typed."""

import shlex
import shutil
from pathlib import Path

import pytest
from damage import flip_bit, refused
from runs import NUM_STEPS, assert_same_checkpoint, call, metrics, steps_of, stored_json, train_here
from training.test_resume import stop_after

from flowdit.train import stage1, stage2

TYPED = ("optim.learning_rate=3e-3", "train.drop_rate=0.25", "train.sample_labels=[sun]", "wandb.project='${seed}'")


def resume_here(run: Path, *typed: str, stage=stage1):
    return call(stage, "train.is_restore=true", f"train.checkpoint_dir={run}", *typed)


@pytest.fixture(scope="module")
def typed_run(tiny_data, tmp_path_factory) -> Path:
    """An uninterrupted run with settings that no preset has."""
    run = tmp_path_factory.mktemp("typed") / "run"
    finished = train_here(tiny_data, run, *TYPED)
    assert finished.status == 0, finished.err
    return run


def test_the_printed_line_continues_the_run_exactly(tiny_data, typed_run, tmp_path, monkeypatch):
    run = tmp_path / "my, runs"
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        stopped = train_here(tiny_data, run, *TYPED)
    command = next(line for line in stopped.out.splitlines() if line.startswith("resume with: "))
    program, name, *typed = shlex.split(command.removeprefix("resume with: "))
    assert (program, name, typed) == (
        *("flowdit", "train-stage1"),
        ["train.is_restore=true", f"train.checkpoint_dir={run}"],
    )
    finished = call(stage1, *typed)
    assert finished.status == 0, finished.err
    assert "changed since" not in finished.out and "resume with" not in finished.out
    assert_same_checkpoint(run / str(NUM_STEPS), typed_run / str(NUM_STEPS))
    assert metrics(run, "train/loss") == metrics(typed_run, "train/loss")
    stored = stored_json(run / str(NUM_STEPS), "meta")["config"]
    assert stored["wandb"]["project"] == stored_json(typed_run / "2", "meta")["config"]["wandb"]["project"]


def test_typed_settings_go_over_the_stored_ones(typed_run, tmp_path):
    run = shutil.copytree(typed_run, tmp_path / "run")
    finished = resume_here(run, "train.num_steps=8", "optim.learning_rate=1e-4", "train.log_every=2")
    assert finished.status == 0, finished.err
    changes = [line for line in finished.out.splitlines() if line.startswith("changed since the checkpoint: ")]
    assert [line.split(": ")[1] for line in changes] == [
        *("optim.learning_rate", "train.checkpoint_dir", "train.log_every", "train.num_steps"),
    ]
    assert steps_of(run)[-1] == 8
    stored = stored_json(run / "8", "meta")["config"]
    assert (stored["optim"]["learning_rate"], stored["train"]["drop_rate"]) == (1e-4, 0.25)
    assert stored["train"]["checkpoint_dir"] == str(run)


def test_a_typed_preset_stands_for_its_keys(typed_run, tmp_path):
    run = shutil.copytree(typed_run, tmp_path / "run")
    finished = resume_here(run, "experiment=tiny")
    assert finished.status == 0, finished.err
    assert "changed since the checkpoint: optim.learning_rate: 0.003 -> 0.001" in finished.out
    assert "changed since the checkpoint: train.sample_labels: ['sun'] -> [0, 1]" in finished.out
    assert "train.drop_rate" not in finished.out  # not in the preset
    line = refused(lambda: resume_here(run, "experiment=openmoji_demo"), run)
    assert line.startswith("error: data.path: data/openmoji: no such folder")
    assert line.endswith("; the value is from experiment=openmoji_demo, data.path=... undoes it")


def test_the_configuration_is_that_of_the_step_that_is_restored(typed_run, tmp_path):
    run = shutil.copytree(typed_run, tmp_path / "run")
    assert resume_here(run, "train.num_steps=8", "train.drop_rate=0.75").status == 0
    flip_bit(next((run / "8" / "model_ema").glob("**/d/*")))
    finished = resume_here(run, "train.num_steps=8")
    assert finished.status == 0, finished.err
    assert f"resumed from {run / '6'}" in finished.out
    assert stored_json(run / "8", "meta")["config"]["train"]["drop_rate"] == 0.25


def test_the_command_of_the_other_stage_is_named_first(whole_run, tmp_path):
    run = shutil.copytree(whole_run, tmp_path / "run")
    line = refused(lambda: resume_here(run, "data.long_caption_prob=1", stage=stage2), run)
    assert line == (
        f"error: train.checkpoint_dir: {run} holds a run of the other stage, resume it with "
        f"flowdit train-stage1 train.is_restore=true train.checkpoint_dir={run}"
    )


def test_a_folder_without_a_run_is_named(tmp_path):
    finished = resume_here(tmp_path / "nowhere", "data.path=x")
    assert finished.status == 2
    (tmp_path / "empty").mkdir()
    assert resume_here(tmp_path / "empty", "data.path=x").status == 2


def test_an_unusable_value_of_a_preset_is_named_with_its_remedy(tiny_data, tmp_path):
    arguments = ("experiment=openmoji_demo", f"data.path={tiny_data}", f"train.checkpoint_dir={tmp_path / 'run'}")
    line = refused(lambda: call(stage1, *arguments), tiny_data)
    assert "got 'country-flag'" in line
    assert line.endswith("; the value is from experiment=openmoji_demo, train.sample_labels=null undoes it")
    typed = refused(lambda: call(stage1, *arguments, "train.sample_labels=[country-flag]"), tiny_data)
    assert "experiment" not in typed
