"""The screening of recipes, driven with a training command that writes figures and nothing else."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_module

from benchmarks import recipes
from benchmarks.__main__ import main
from benchmarks.screening import jobs
from benchmarks.screening.jobs import Run
from benchmarks.screening.plan import merged, of_steps, read_plan
from benchmarks.screening.results import Mean, Outcome, first_step_below, mean_of, rows
from flowdit.config import Config, register_schemas, resolve
from flowdit.reporting.metrics import Curve

REPOSITORY = Path(__file__).parents[1]
TRAIN = """
import json, os, signal, sys, time
from pathlib import Path
args = dict(a.split("=", 1) for a in sys.argv[1:])
run, steps = Path(args["train.checkpoint_dir"]), int(args["train.num_steps"])
run.mkdir(parents=True, exist_ok=True)
with open("started", "a") as log:
    log.write(f"{run.name} of {run.parent.name}\\n")
rate, speed = float(args.get("speed", 100)), float(args.get("decay", 0.1))
if args.get("fails"):
    sys.exit("error: fails: must not be set")
saved = [int(p.name) for p in run.iterdir() if p.name.isdigit()]
with (run / "metrics.jsonl").open("a") as file:
    for step in range(max(saved, default=0) + 1, steps + 1):
        entry = {"step": step, "time": float(step), "train/loss": 1.0, "train/steps_per_second": rate}
        if Path("unfinished").exists() and step == 10:
            sys.exit("Killed")
        if (every := int(args["train.validate_every"])) and step % every == 0:
            loss = 1 / (1 + speed * step) + 0.01 * int(args.get("seed", 0))
            entry["validation/loss"] = float(args.get("loss", loss))
        file.write(json.dumps(entry) + "\\n")
        file.flush()
        if Path("hang").exists() and step == 5:
            (run / "3").mkdir()
            time.sleep(60)
        if steps > 1000:
            time.sleep(0.001)
(run / str(steps)).mkdir(exist_ok=True)
"""
EVALUATE = """
import json, sys
from pathlib import Path
args = dict(a.split("=", 1) for a in sys.argv[1:])
assert Path(args["checkpoint"]).is_dir()
out = Path(args["out"])
out.mkdir(parents=True, exist_ok=True)
if Path("unscored").exists():
    sys.exit("error: out of memory")
scores = {"efficientnet": {"kid": {"value": float(args["kid"]), "error": 0.002}}}
(out / "scores.json").write_text(json.dumps({"points": [{"scores": scores}]}))
"""
PLAN = """
stage: 1
baseline: data.path=data speed=100
options:
  good: [decay=0.3]
  worse: decay=0.05
  broken: [fails=true]
budget: {steps: 20}
finals: {}
validations: 10
evaluate:
  settings: [num_images=8]
  parts: {pair: [kid=0.5], subject: [kid=0.25]}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder of a screening whose commands are fakes."""
    fake = tmp_path / "repository"
    (fake / "flowdit").mkdir(parents=True)
    (fake / "train_stage1.py").write_text(TRAIN)
    (fake / "flowdit/__init__.py").touch()
    (fake / "flowdit/evaluate.py").write_text(EVALUATE)
    (tmp_path / "plan.yaml").write_text(PLAN)
    monkeypatch.setattr(jobs, "REPOSITORY", fake)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out/results.json").read_text(), parse_constant=pytest.fail)


def started(folder: Path) -> list[str]:
    return (folder / "started").read_text().splitlines()


def test_a_plan_is_done_once_and_its_failures_are_tried_again(folder):
    page = recipes.measure("plan.yaml", "out=out")
    found = results(folder)
    rows = {row["option"]: row for row in found["finals"]}
    assert [(row["option"], row["seeds"]) for row in found["screening"]] == [
        ("baseline", [0]),
        ("good", [0]),
        ("worse", [0]),
    ]
    assert [(row, rows[row]["seeds"]) for row in rows] == [("baseline", [1, 2, 3]), ("good", [1, 2, 3])]
    # 1 / (1 + 0.3 s) is the baseline's 1 / (1 + 0.1 x 20) at 6.67 steps, with the loss rising by 0.01 a seed.
    (good,) = (run for run in found["runs"] if (run["option"], run["seed"]) == ("good", 0))
    assert good["lowest"] == pytest.approx(1 / 7) and rows["good"]["lowest"]["value"] == pytest.approx(1 / 7 + 0.02)
    assert rows["good"]["steps_to"]["value"] == pytest.approx(6.5, abs=0.5) and rows["good"]["reached"] == 3
    assert rows["good"]["steps_to"]["half"] == pytest.approx(0, abs=1e-9)
    assert rows["baseline"]["steps_to"]["value"] == pytest.approx(20)
    assert rows["good"]["share"]["value"] == pytest.approx(rows["good"]["steps_to"]["value"] / 20)
    assert rows["good"]["difference"]["half"] == pytest.approx(0, abs=1e-9)
    assert rows["good"]["minutes_to"]["value"] == pytest.approx(rows["good"]["steps_to"]["value"] / 100 / 60)
    assert found["screening"][2]["steps_to"] is None and "| 0 of 1 reached |" in page
    assert found["failed"] == [{"option": "broken", "seed": 0, "problem": "error: fails: must not be set"}]
    assert "| 0.5000 ± 0.0020 | 0.2500 ± 0.0020 |" in page
    assert (folder / "out/results.svg").read_text().startswith("<svg") and page in (
        folder / "out/results.md"
    ).read_text()

    before = started(folder)
    recipes.measure("out")
    assert started(folder) == [*before, "seed0 of broken"]


def test_minutes_become_steps_by_the_speed_of_each_option(folder):
    plan = PLAN.replace("budget: {steps: 20}", "budget: {minutes: 0.01}\ntiming_steps: 12")
    plan = plan.replace("decay=0.3", "decay=0.3, speed=50").replace("  broken: [fails=true]\n", "")
    (folder / "plan.yaml").write_text(plan.replace("finals:", "# finals:"))
    recipes.measure("plan.yaml", "out=out")
    rows = results(folder)["screening"]
    assert [(row["option"], row["steps"], row["rate"]) for row in rows] == [
        ("baseline", 60, 100.0),
        ("good", 30, 50.0),
        ("worse", 60, 100.0),
    ]
    assert not list((folder / "out/runs").glob("*/timing"))


def test_a_stopped_driver_stops_its_run_and_goes_on_from_its_checkpoint(folder):
    (folder / "hang").touch()
    code = f"from benchmarks.screening import jobs; jobs.REPOSITORY = jobs.Path({str(jobs.REPOSITORY)!r})\n"
    code += "from benchmarks import recipes; recipes.measure('plan.yaml', 'out=out')"
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.DEVNULL) as driver:
        try:
            run = folder / "out/runs/baseline/seed0"
            while not (run / "3").exists() and driver.poll() is None:
                time.sleep(0.05)
            with pytest.raises(ValueError, match="out: a driver, or a process that it has started, is still running"):
                recipes.measure("out")
            driver.send_signal(signal.SIGTERM)
            assert driver.wait(timeout=60) != 0
        finally:
            driver.kill()
    (folder / "hang").unlink()
    recipes.measure("out")
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, *range(4, 21)]


SHORT = PLAN.replace("  broken: [fails=true]\n", "").replace("finals: {}\n", "")


def test_a_run_with_other_settings_is_refused_alone_and_nothing_finished_is_lost(folder):
    (folder / "plan.yaml").write_text(SHORT)
    recipes.measure("plan.yaml", "out=out")
    before = started(folder)
    (folder / "plan.yaml").write_text(
        SHORT.replace("decay=0.3", "decay=0.4").replace("  worse", "  new: [decay=0.2]\n  worse")
    )
    page = recipes.measure("plan.yaml", "out=out")
    assert "Failed: good, seed 0: " in page and "was begun with other settings (decay=0.3, decay=0.4)" in page
    assert [row["option"] for row in results(folder)["screening"]] == ["baseline", "new", "worse"]
    assert started(folder) == [*before, "seed0 of new"]


def test_a_baseline_with_other_settings_is_refused_before_anything_is_replaced(folder):
    (folder / "plan.yaml").write_text(SHORT)
    recipes.measure("plan.yaml", "out=out")
    files = [folder / "out" / name for name in ("plan.yaml", "results.json", "results.md")]
    before = [file.read_text() for file in files]
    (folder / "plan.yaml").write_text(SHORT.replace("speed=100", "speed=50"))
    with pytest.raises(ValueError, match=r"baseline/seed0: was begun with other settings \(speed=100, speed=50\)"):
        recipes.measure("plan.yaml", "out=out")
    assert [file.read_text() for file in files] == before


def test_an_option_that_failed_before_its_first_checkpoint_may_be_corrected(folder):
    recipes.measure("plan.yaml", "out=out")
    (folder / "plan.yaml").write_text(PLAN.replace("fails=true", "decay=0.2"))
    page = recipes.measure("plan.yaml", "out=out")
    assert "Failed" not in page and "| good+broken |" in page
    assert "good+broken: without decay=0.2 of broken, as a better option sets the same" in page


def test_the_table_keeps_all_finished_runs_while_others_are_done(folder, monkeypatch):
    recipes.measure("plan.yaml", "out=out")
    rows = {(row["option"], tuple(row["seeds"])) for row in results(folder)["finals"]}
    monkeypatch.setattr(recipes.Jobs, "evaluate", _stopped_at_the_second())
    with pytest.raises(KeyboardInterrupt):
        recipes.measure("out")
    assert {(row["option"], tuple(row["seeds"])) for row in results(folder)["finals"]} == rows


def _stopped_at_the_second() -> Any:
    seen = []

    def evaluate(self: Any, run: Run) -> None:
        seen.append(run)
        if len(seen) == 2:
            raise KeyboardInterrupt

    return evaluate


def test_results_may_be_moved(folder):
    (folder / "plan.yaml").write_text(SHORT)
    page = recipes.measure("plan.yaml", "out=out")
    before = started(folder)
    (folder / "out").rename(folder / "moved")
    assert recipes.measure("moved") == page and started(folder) == before


def test_an_evaluation_that_fails_is_no_failed_run_and_its_success_leaves_no_failure(folder):
    (folder / "plan.yaml").write_text(SHORT)
    (folder / "unscored").touch()
    page = recipes.measure("plan.yaml", "out=out")
    assert "Failed: baseline, seed 0: its evaluation: error: out of memory" in page and "| worse |" in page
    before = started(folder)
    (folder / "unscored").unlink()
    assert "Failed" not in recipes.measure("out") and started(folder) == before


def test_a_failure_is_told_by_the_log_of_its_own_attempt(folder):
    (folder / "plan.yaml").write_text(SHORT.replace("worse: decay=0.05", "worse: fails=true"))
    assert "worse, seed 0: error: fails: must not be set" in recipes.measure("plan.yaml", "out=out")
    (folder / "plan.yaml").write_text(SHORT)
    (folder / "unfinished").touch()
    assert "worse, seed 0: Killed" in recipes.measure("plan.yaml", "out=out")


def test_a_timing_is_done_again_for_other_settings_unless_a_run_has_begun(folder):
    out = folder / "jobs"
    text = SHORT.replace("{steps: 20}", "{minutes: 0.01}\ntiming_steps: 12")
    with (folder / "lock").open("w") as lock:
        timed = lambda text, option: jobs.Jobs(read_plan(_written(folder, text)), out, lock.fileno()).rate(option)
        assert timed(text, "good") == 100
        assert timed(text.replace("decay=0.3", "speed=50"), "good") == 50
        count = len(started(folder))
        assert timed(text.replace("decay=0.3", "speed=50"), "good") == 50 and len(started(folder)) == count
        (out / "runs/good/seed0/3").mkdir(parents=True)
        with pytest.raises(jobs.JobError, match="runs/good: its timing has other settings than the plan"):
            timed(text.replace("timing_steps: 12", "timing_steps: 18"), "good")


def _written(folder: Path, text: str) -> Path:
    (folder / "plan.yaml").write_text(text)
    return folder / "plan.yaml"


def test_runs_without_a_finite_loss_have_no_figure(folder):
    plan = PLAN.replace("worse: decay=0.05", "worse: loss=nan\n  huge: loss=1e30")
    (folder / "plan.yaml").write_text(plan.replace("  broken: [fails=true]\n", ""))
    page = recipes.measure("plan.yaml", "out=out")
    rows = {row["option"]: row for row in results(folder)["screening"]}
    assert rows["worse"]["lowest"] is None and rows["good"]["lowest"]["value"] == pytest.approx(1 / 7)
    assert "worse, seed 0: no finite validation loss" in page
    chart = (folder / "out/results.svg").read_text()
    assert "nan" not in chart and "e+" not in chart and "good" in chart and "huge" not in chart
    (folder / "plan.yaml").write_text(SHORT.replace("speed=100", "loss=nan"))
    assert "baseline, seed 0: no finite validation loss" in recipes.measure("plan.yaml", "out=none")


def test_a_baseline_that_fails_ends_the_screening(folder):
    (folder / "plan.yaml").write_text(PLAN.replace("speed=100", "fails=true"))
    with pytest.raises(ValueError, match="the baseline failed: error: fails: must not be set"):
        recipes.measure("plan.yaml")


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("stage: 1", "stage: 3", "stage"),
        ("{steps: 20}", "{steps: 20, minutes: 1}", "budget: must be minutes or steps"),
        ("good:", "../good:", "options: names must be"),
        ("good:", "good+worse:", "options: names must be"),
        ("finals: {}", "finals: {seeds: [0, 1]}", "finals.seeds: must not be seeds of the screening"),
        ("good:", "baseline:", "options: must not name"),
        ("validations: 10", "validation: 10", "validation: is not a known field"),
        ("stage: 1", "stage: [", "is not YAML"),
    ],
)
def test_a_wrong_plan_is_an_error_of_one_line(folder, monkeypatch, capsys, old, new, problem):
    (folder / "plan.yaml").write_text(PLAN.replace(old, new))
    monkeypatch.setattr("sys.argv", ["benchmarks", "recipes", "plan.yaml"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert f"plan.yaml: {problem}" in capsys.readouterr().err and not (folder / "started").exists()


def test_the_arguments_are_a_plan_or_a_folder(folder):
    for wrong in ((), ("plan.yaml", "more"), ("missing",)):
        with pytest.raises(ValueError, match="recipes: must be a plan|missing: cannot be read"):
            recipes.check(wrong)


def test_later_overrides_replace_earlier_ones():
    assert merged(["optim=adamw", "a=1", "+b=2"], ["optim=muon", "b=3"]) == ["a=1", "optim=muon", "b=3"]


def test_a_share_is_of_the_steps_of_the_run(folder):
    assert of_steps(["a=20%", "b=12.5%", "c=5", "d=x%"], 1000) == ["a=200", "b=125", "c=5", "d=x%"]
    (folder / "plan.yaml").write_text(PLAN.replace("decay=0.3", "decay=0.3, late=50%"))
    recipes.measure("plan.yaml", "out=out")
    assert "late=10" in json.loads((folder / "out/runs/good/seed0.json").read_text())["overrides"]


@pytest.mark.parametrize("file", sorted((REPOSITORY / "benchmarks/plans").glob("*.yaml")), ids=lambda file: file.stem)
def test_the_plans_of_the_repository_compose(file):
    plan = read_plan(file)
    register_schemas(Config)
    with initialize_config_module("flowdit.configs", version_base="1.3"):
        for option in ("baseline", *plan.options):
            overrides = of_steps(plan.overrides(option), 1000)
            config = resolve(compose({1: "config", 2: "config_stage2"}[plan.stage], overrides), Config)
            config.check()
            assert config.model.name == {1: "ccdit", 2: "pixart"}[plan.stage]  # else the command refuses the preset
            assert config.data.feature_cache or not config.map_readers


def test_in_a_combination_the_better_option_wins(folder):
    (folder / "plan.yaml").write_text(PLAN.replace("fails=true", "decay=0.2, wide=true"))
    plan = read_plan(folder / "plan.yaml")
    assert plan.overrides("good+broken") == ["data.path=data", "speed=100", "wide=true", "decay=0.3"]
    assert plan.replaced("good+broken") == ["decay=0.2 of broken"] and plan.replaced("good") == []
    assert str(Run("good", 3)) == "good, seed 3"


def test_there_is_no_mean_of_the_steps_unless_all_seeds_reach_the_loss_of_their_baseline():
    def run(option: str, seed: int, *losses: float) -> Outcome:
        curve = Curve(np.array([10, 20, 30]), np.array(losses))
        return Outcome(Run(option, seed), steps=30, rate=1.0, measured=None, validation=curve, scores={})

    base = [run("baseline", seed, 3.0, 2.0, 1.0 + seed) for seed in range(3)]
    some = [run("some", 0, 3.0, 2.0, 1.5), run("some", 1, 3.0, 2.0, 1.0), run("some", 2, 3.0, 1.0, 1.0)]
    found = rows([*base, *some, *(one._replace(run=Run("all", one.run.seed)) for one in some[1:])])
    assert (found[1].reached, found[1].compared, found[1].steps_to, found[1].share) == (2, 3, None, None)
    assert found[2].share is not None and found[2].share.half is not None
    assert found[2].steps_to == mean_of([20.0, 15.0]) and found[2].share == mean_of([1.0, 0.75])


def test_the_step_at_a_loss_is_interpolated_and_an_interval_is_students():
    curve = Curve(np.array([0, 10, 20, 30]), np.array([1.0, np.nan, 0.5, 0.7]))
    assert [first_step_below(curve, level) for level in (2.0, 0.75, 0.5, 0.4)] == [0.0, 10.0, 20.0, None]
    assert mean_of([2.0]) == Mean(2.0, None, 1)
    assert mean_of([1.0, 2.0, 3.0]).half == pytest.approx(4.302653 / 3**0.5)


@pytest.mark.slow
def test_a_screening_of_the_tiny_preset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    subprocess.run([sys.executable, "-m", "flowdit.prepare", "out=data"], check=True, stdout=subprocess.DEVNULL)
    (tmp_path / "plan.yaml").write_text(
        "stage: 1\nbaseline: experiment=tiny data.path=data\noptions: {low: [optim.learning_rate=1e-4]}\n"
        "budget: {minutes: 0.002}\ntiming_steps: 6\nvalidations: 2\n"
        "evaluate: {settings: [num_images=16, steps=2, metrics=kid], parts: {all: []}}\n"
    )
    page = recipes.measure("plan.yaml", "out=out")
    assert "kid_efficientnet, all" in page and page.count("\n| ") == 3
