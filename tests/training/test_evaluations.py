"""Evaluations between steps: the loop calls each that is due, and refers to none by name."""

import dataclasses

import pytest
from runs import error_line, metrics, train_here, write_tiny_data

from flowdit.data.manifest import Manifest, Part
from flowdit.tracking import Progress, Report
from flowdit.training import setup
from flowdit.training.evaluations import Evaluation


@dataclasses.dataclass
class Norm(Evaluation):
    """The sum of squares of the EMA weights."""

    every: int
    folder = "norms"
    broken: bool = False

    def __call__(self, step, state):
        if self.broken:
            raise OSError("no room")
        norm = sum(float((leaf**2).sum()) for leaf in state.ema.blocks.mlp.up.weight)
        return Report({"norm": norm}, line=f"norm {norm:.3f}")


@pytest.fixture
def evaluated(tiny_data, tmp_path, monkeypatch):
    """A run with an additional evaluation."""

    def run(evaluation, *overrides):
        made = setup.make_evaluations
        monkeypatch.setattr(setup, "make_evaluations", lambda *arguments: [*made(*arguments), evaluation])
        finished = train_here(tiny_data, tmp_path / "run", *overrides)
        assert (finished.status, finished.err) == (0, "")
        return tmp_path / "run", finished.out

    return run


def test_an_evaluation_is_called_when_it_is_due_and_after_the_last_step(evaluated):
    run, out = evaluated(Norm(every=4))
    norms = metrics(run, "norm")
    assert list(norms) == [4, 6] and norms[4] != norms[6]
    assert f"step 4  norm {norms[4]:.3f}" in out


def test_write_errors_do_not_end_the_run_and_are_reported_once(evaluated):
    run, out = evaluated(Norm(every=2, broken=True))
    assert out.count(f"warning: {run / 'norms'} cannot be written (no room): continuing without it") == 1
    assert (run / "6").is_dir()


def test_validation_also_has_the_loss_of_each_part_of_the_split(tmp_path):
    part = lambda i: "subject" if i % 3 == 1 else "pair"
    data = write_tiny_data(tmp_path / "data", extra=lambda i: {"columns.held_out": part(i)})
    plain = train_here(data, tmp_path / "plain", "train.validate_every=6")
    parts = tuple(Part(name, sum(part(i) == name for i in range(8))) for name in ("pair", "subject"))
    dataclasses.replace(Manifest.read(data), validation_parts=parts).write(data)
    finished = train_here(data, tmp_path / "run", "train.validate_every=6", "train.keep_best=validation/loss_pair")
    assert (plain.err, finished.err) == ("", "")
    run = tmp_path / "run"
    whole, pair, subject = (metrics(run, f"validation/loss{end}")[6] for end in ("", "_pair", "_subject"))
    assert whole == metrics(tmp_path / "plain", "validation/loss")[6] and pair != subject
    assert whole == pytest.approx((5 * pair + 3 * subject) / 8, rel=1e-6)
    gains = [metrics(folder, "validation/condition_gain")[6] for folder in (run, tmp_path / "plain")]
    assert gains[0] == gains[1] and abs(gains[0]) < metrics(run, "validation/loss_t0.9375")[6]
    write_tiny_data(tmp_path / "other", extra=lambda i: {"columns.held_out": "else"})
    dataclasses.replace(Manifest.read(tmp_path / "other"), validation_parts=parts).write(tmp_path / "other")
    line = error_line(train_here(tmp_path / "other", tmp_path / "no", "train.validate_every=6"))
    assert "record 0: columns.held_out: must be one of pair, subject, got 'else'" in line


def test_profile_of_a_window_of_steps(tiny_data, tmp_path):
    finished = train_here(tiny_data, tmp_path / "run", "train.profile=[3,4]")
    assert (finished.status, finished.err) == (0, "")
    assert f"step 4  profile of steps 3 to 4: {tmp_path / 'run' / 'profile'}" in finished.out
    (trace,) = traces(tmp_path / "run")
    assert trace.stat().st_size > 1000


def traces(run):
    return list((run / "profile").rglob("*.xplane.pb"))


@pytest.mark.slow
def test_a_profile_is_written_if_the_run_ends_in_its_window_and_continues_on_resume(tiny_data, tmp_path):
    run = tmp_path / "run"
    seen, add = [], Progress.add

    def add_and_fail(self, values):
        add(self, values)
        seen.append(values)
        if len(seen) == 4:
            raise ValueError("enough")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "add", add_and_fail)
        assert error_line(train_here(tiny_data, run, "train.profile=[2,6]")) == "error: enough"
    assert len(traces(run)) == 1
    finished = train_here(tiny_data, run, "train.profile=[2,6]", "train.is_restore=true")
    assert f"step 6  profile of steps 6 to 6: {run / 'profile'}" in finished.out
    assert len(traces(run)) == 2


def test_a_profile_that_cannot_be_written_does_not_end_the_run(tiny_data, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "profile").write_text("mine")
    (run / "metrics.jsonl").write_text("")
    finished = train_here(tiny_data, run, "train.profile=[2,3]", "train.is_restore=true")
    assert (finished.status, finished.err) == (0, "")
    assert finished.out.count(f"warning: {run / 'profile'} cannot be written") == 1


@pytest.mark.parametrize("window", ["[1,4]", "[4]", "[5,4]", "[5,7]"])
def test_invalid_windows(tiny_data, tmp_path, window):
    line = error_line(train_here(tiny_data, tmp_path / "run", f"train.profile={window}"))
    assert line.startswith("error: train.profile: must be null or two steps in [2, num_steps=6]")
