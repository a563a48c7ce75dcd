"""Resuming from the run folder alone: the stored configuration, and over it what is typed."""

import dataclasses
import json
import shlex
import shutil
from pathlib import Path

import pytest
from damage import flip_bit, refused
from runs import NUM_STEPS, assert_same_checkpoint, call, error_line, metrics, steps_of, stored_json, train_here
from training.test_resume import stop_after

from flowdit import train
from flowdit.composition import continued, typed_overrides
from flowdit.config import Config, resolve
from flowdit.models.text_encoder import TextConfig
from flowdit.stored_config import from_stored
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
    assert line.endswith("; the value is from experiment=openmoji_demo, without it that of the run is used")


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


def test_a_folder_without_a_run_is_named(whole_run, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "nowhere", tmp_path / "empty"):
        line = error_line(resume_here(folder))
        assert line == f"error: train.is_restore: there is no run to resume in train.checkpoint_dir={folder}"
    line = refused(lambda: resume_here(whole_run / "6"), whole_run)
    assert line == (
        f"error: train.checkpoint_dir: must be a run folder, {whole_run / '6'} is a checkpoint: give its parent"
    )


def test_damage_of_all_steps_is_named(whole_run, tmp_path):
    run = shutil.copytree(whole_run, tmp_path / "run")
    for step in steps_of(run):
        (run / str(step) / "meta" / "metadata").unlink()
    assert error_line(resume_here(run)).startswith(f"error: {run}: no checkpoint can be read: ")


BEGUN = [
    (stage1, "experiment=openmoji_demo", "optim=adamw_pixart"),
    (stage1, "experiment=tiny", "model/size=s"),
    (stage1, "train={num_steps: 7}", "experiment=tiny"),
    (stage1, "model/size=b", "train=stage1", "train.num_steps=7"),
    (stage1, "experiment=imagenet256_xl2", "data=stage1", "optim.learning_rate=1e-5"),
    (stage2, "experiment=openmoji_text", "optim=adamw_pixart"),
    (stage2, "experiment=openmoji_text", "train=stage2", "text=t5gemma"),
    (stage2, "text=t5gemma", "experiment=small_text"),
    (stage2, "experiment=pixart_alpha_256", "text=wordllama", "text.max_length=8"),
]


@pytest.mark.parametrize("begun", BEGUN, ids=lambda begun: " ".join(begun[1:]))
def test_the_overrides_that_began_a_run_change_nothing(begun, monkeypatch):
    """Whatever the order of groups and presets."""
    stage, *overrides = begun
    both = []

    def compare(composed, _network):
        new = resolve(composed, Config)
        stored = from_stored(json.loads(json.dumps(dataclasses.asdict(new))))
        both.extend([new, resolve(continued(stored, new.train.checkpoint_dir, typed_overrides()), Config)])

    monkeypatch.setattr(train, "_train", compare)
    assert call(stage, "data.path=x", *overrides).err == ""
    new, again = both
    assert again.train.is_restore
    again.train.is_restore = False
    assert again == new


def test_a_typed_option_without_keys_stands_for_its_defaults(monkeypatch):
    found = []

    def compare(composed, _network):
        stored = resolve(composed, Config)
        stored.text = dataclasses.replace(stored.text, encoder="wordllama", max_length=32, dtype="float32")
        found.append(resolve(continued(stored, "x", typed_overrides()), Config).text)

    monkeypatch.setattr(train, "_train", compare)
    call(stage2, "data.path=x", "text=t5gemma")
    assert found == [TextConfig()]


def test_an_unusable_value_of_a_preset_is_named_with_its_remedy(tiny_data, tmp_path):
    arguments = ("experiment=openmoji_demo", f"data.path={tiny_data}", f"train.checkpoint_dir={tmp_path / 'run'}")
    line = refused(lambda: call(stage1, *arguments), tiny_data)
    assert "got 'country-flag'" in line
    assert line.endswith("; the value is from experiment=openmoji_demo, train.sample_labels=null undoes it")
    typed = refused(lambda: call(stage1, *arguments, "train.sample_labels=[country-flag]"), tiny_data)
    assert "experiment" not in typed
