"""`train.keep_best`: the best checkpoint by a figure of an evaluation is kept beside the newest ones."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest
from damage import flip_bit
from runs import call, error_line, metrics, steps_of, stored_json, train_here

import flowdit
from flowdit import sample
from flowdit.checkpoint.retention import Retention
from flowdit.tracking import Report
from flowdit.training import setup
from flowdit.training.evaluations import Evaluation

VALUES = {1: 5.0, 2: 4.0, 3: 4.5, 4: math.nan, 5: 3.0, 6: 3.5, 7: 3.2, 8: 6.0, 9: 7.0, 10: 3.0}
BEST = ("train.keep_best=score", "train.keep_last=1", "train.num_steps=10", "optim.warmup_steps=0")


@dataclasses.dataclass
class Score(Evaluation):
    """Reports the value for its step, and notes the steps at which it was called."""

    every: int = 1
    metrics = {"score": "min"}
    calls: list[int] = dataclasses.field(default_factory=list)

    def __call__(self, step, state):
        self.calls.append(step)
        return Report({"score": VALUES[step]}, line=f"score {VALUES[step]}")


@pytest.fixture
def score(monkeypatch) -> Score:
    evaluation, made = Score(), setup.make_evaluations
    check = lambda config, *rest: [*made(dataclasses.replace(config, train=plain(config.train)), *rest), evaluation]
    monkeypatch.setattr(setup, "make_evaluations", check)
    return evaluation


def plain(train):
    return dataclasses.replace(train, keep_best=None)


def best_of(run: Path) -> tuple[int, float]:
    best = json.loads((run / "best.json").read_text())
    return best["step"], best["value"]


def test_what_is_kept_at_a_save():
    def kept(steps, **settings):
        infos = [type("Info", (), {"step": step}) for step in steps]
        flags = Retention(**settings).should_preserve(infos, context=None)
        return [step for step, flag in zip(steps, flags, strict=True) if flag]

    steps = [10, 20, 30, 40, 50]
    assert kept(steps, keep_last=2, keep_every=None) == [40, 50]
    assert kept(steps, keep_last=2, keep_every=20) == [20, 40, 50]
    assert kept(steps, keep_last=2, keep_every=None, protected={10}) == [10, 40, 50]
    assert kept(steps, keep_last=1, keep_every=None, protected={50}) == [40, 50]
    assert kept(steps, keep_last=None, keep_every=None) == steps


def test_an_improvement_forces_a_save_and_the_best_is_kept_beside_the_newest(score, tiny_data, tmp_path):
    run = tmp_path / "run"
    done = train_here(tiny_data, run, *BEST, "train.save_every=4")
    assert (done.status, done.err) == (0, "")
    assert best_of(run) == (5, 3.0)  # 10 equals it and is later
    assert steps_of(run) == [5, 10]
    assert "step 5  best score 3 so far" in done.out
    assert "warning: step 4: score is nan, which is not counted for train.keep_best" in done.out
    assert stored_json(run / "5", "meta")["best"] == {
        "metric": "score",
        "mode": "min",
        "value": 3.0,
        "step": 5,
        "measured": 5,
    }
    assert flowdit.load(str(run / "best")).trained.step == 5
    assert flowdit.load(str(run)).trained.step == 10
    line = call(sample.main, f"checkpoint={run / 'best'}", "steps=1", f"out={tmp_path / 'out'}")
    assert f"{run / '5'}: the best checkpoint of the run" in line.out
    flip_bit(run / "5" / "meta" / "metadata")
    line = error_line(call(sample.main, f"checkpoint={run / 'best'}", "steps=1", f"out={tmp_path / 'out2'}"))
    assert line.startswith(f"error: checkpoint: {run / '5'}") and "content differs from its checksum" in line


@pytest.mark.parametrize("stop", [5, pytest.param(3, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.slow)])
def test_a_stopped_run_has_the_best_of_an_uninterrupted_one(score, tiny_data, tmp_path, stop):
    """It stops where an evaluation is due, which is made up for at the resume."""
    run = tmp_path / "run"
    settings = (*BEST, "train.save_every=4")
    done = train_here(tiny_data, run, *settings, f"train.num_steps={stop}")
    assert done.status == 0, done.err
    (run / "best.json").unlink()  # as if killed after the save, before it was written
    done = train_here(tiny_data, run, *settings, "train.is_restore=true")
    assert (done.status, done.err) == (0, "")
    assert score.calls == [*range(1, stop + 1), *range(stop, 11)]
    assert best_of(run) == (5, 3.0) and steps_of(run) == [5, 10]


@pytest.mark.slow
def test_a_resume_continues_from_what_is_written(score, tiny_data, tmp_path):
    run = tmp_path / "run"
    assert train_here(tiny_data, run, *BEST, "train.num_steps=7", "train.keep_last=3").status == 0
    assert best_of(run) == (5, 3.0)
    done = train_here(tiny_data, run, *BEST, "train.is_restore=true", "train.num_steps=8")
    assert score.calls == [*range(1, 9)], "the evaluation of step 7 is in best.json"
    assert done.status == 0 and best_of(run) == (5, 3.0)
    lost = shutil.copytree(run, tmp_path / "lost")
    shutil.rmtree(lost / "5")
    done = train_here(tiny_data, lost, *BEST, "train.is_restore=true", "train.num_steps=9")
    assert "step 5 was the best by score (3), but its checkpoint is gone; the best is counted anew" in done.out
    assert best_of(lost) == (8, 6.0)
    flip_bit(run / "5" / "meta" / "metadata")
    other = ("train.keep_best_mode=max", "train.is_restore=true", "train.num_steps=9")
    changed = shutil.copytree(run, tmp_path / "changed")
    done = train_here(tiny_data, changed, *BEST, *other)
    assert "step 5 was the best by score (3); by score, max, it is counted anew" in done.out
    assert best_of(changed) == (9, 7.0)
    done = train_here(tiny_data, run, *BEST, "train.is_restore=true", "train.num_steps=9")
    assert "the best checkpoint is damaged, the best is counted anew" in done.out and (run / "5.damaged").is_dir()
    assert best_of(run) == (8, 6.0)


@pytest.mark.slow
def test_the_validation_loss_of_a_real_run(tiny_data, tmp_path):
    run = tmp_path / "run"
    settings = ("train.keep_best=validation/loss", "train.validate_every=1", "train.save_every=0", "train.keep_last=1")
    assert train_here(tiny_data, run, *settings).status == 0
    losses = metrics(run, "validation/loss")
    step = min(losses, key=lambda step: losses[step])
    assert best_of(run) == (step, losses[step])
    assert step in steps_of(run) and 6 in steps_of(run)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ("train.keep_best=loss", "train.validate_every=3"),
            "train.keep_best: must be a figure of an evaluation (validation/loss, validation/loss_t0.0625, ",
        ),
        (("train.keep_best=validation/loss",), "train.keep_best: must be null where no evaluation reports figures ("),
        (("train.keep_best_mode=best",), "train.keep_best_mode: must be one of auto, min, max, got 'best'"),
    ],
)
def test_a_metric_that_nothing_reports_is_one_line(tiny_data, tmp_path, settings, message):
    assert error_line(train_here(tiny_data, tmp_path / "run", *settings)).startswith(f"error: {message}")
