"""The HTML page about runs: what it shows, that it loads nothing, and that nothing in a file becomes markup."""

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from html_page import HOSTILE, Page, assert_loads_nothing
from PIL import Image
from runs import call, error_line, metrics

from flowdit.image_grid import save_grid
from flowdit.report import main
from flowdit.reporting import grids
from flowdit.reporting import metrics as report_metrics
from flowdit.reporting.html import json_for_script, tag
from flowdit.reporting.metrics import Curve, read_metrics, thinned
from flowdit.reporting.reading import short_names
from flowdit.reporting.svg import ticks


def report(tmp_path: Path, *arguments: str) -> Page:
    finished = call(main, f"out={tmp_path / 'report.html'}", *arguments)
    assert (finished.status, finished.err) == (0, ""), finished.err
    return Page((tmp_path / "report.html").read_text())


@pytest.fixture
def run(whole_run, tmp_path) -> Path:
    """A copy of a finished run with two preview grids."""
    folder = tmp_path / "runs" / "mine"
    shutil.copytree(whole_run, folder)
    for step in (3, 6):
        images = np.full((2, 64, 64, 3), 40 * step, np.uint8)
        save_grid(folder / "samples" / f"{step:08d}.png", images, ["a", "b"], columns=2)
    return folder


def write_lines(folder: Path, *entries: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    return folder


def entry(step: int, loss: float, time: float = 0.0, **figures: float) -> dict:
    return {"step": step, "time": 1.7e9 + time, "train/loss": loss, **figures}


def test_a_report_has_curves_samples_settings_hardware_and_licence(run, tmp_path):
    page = report(tmp_path, f"run={run}")
    losses = metrics(run, "train/loss")
    (line,) = page.chart("Loss")["series"]
    assert line["x"] == list(losses) and line["y"] == pytest.approx(list(losses.values()), rel=1e-5)
    assert {"Gradient norm", "Learning rate", "Training loss by t"} <= {c["title"] for c in page.data()["charts"]}
    shots = [attributes for name, attributes in page.elements if name == "img"]
    assert [shot["alt"] for shot in shots] == ["samples of mine at step 3", "samples of mine at step 6"]
    assert all((shot["src"] or "").startswith("data:image/webp;base64,") for shot in shots)
    assert "model.hidden_dim 32 1152" in page.text, "settings that are not the defaults"
    assert re.search(r"hardware \d+ CPU cores", page.text) and "jax 0." in page.text
    assert "licence CC0" in page.text and "48 training, 8 validation" in page.text
    assert "Step 6 complete" in page.text and "batches of 8" in page.text


def test_the_page_loads_nothing(run, tmp_path):
    page = report(tmp_path, f"run={run}")
    assert_loads_nothing(page)


def test_charts_are_drawn_without_javascript(run, tmp_path):
    page = report(tmp_path, f"run={run}")
    paths = [attributes["d"] or "" for name, attributes in page.elements if name == "path"]
    assert len(paths) == sum(len(chart["series"]) for chart in page.data()["charts"])
    assert all(re.fullmatch(r"M[\d. ]+(L[\d. ]+)*", path) for path in paths)


def test_nothing_in_a_file_becomes_markup(run, tmp_path):
    (run / "metrics.jsonl").write_text(
        json.dumps(entry(1, 1.0, **{f"train/{HOSTILE}": 1.0, HOSTILE: 2.0, f"scores/{HOSTILE}": 3.0})) + "\n"
    )
    (run / "skipped").mkdir()
    (run / "skipped" / "1.json").write_text(json.dumps({"first_not_finite": {"layer": HOSTILE, "value": "x"}}))
    score = {HOSTILE: {"value": 1.0, "error": 0.1}}
    points = [
        {"settings": {"guidance": g, HOSTILE: HOSTILE}, "evaluations": g, "scores": {HOSTILE: score}} for g in (1, 2)
    ]
    content = {"points": points, "checkpoint": {HOSTILE: HOSTILE}, "features": {HOSTILE: {"identity": HOSTILE}}}
    (run / "scores.json").write_text(json.dumps(content))
    named = run.rename(run.with_name("<b>run"))
    page = report(tmp_path, f"run={named}", f"title={HOSTILE}")
    assert [name for name, _ in page.elements].count("script") == 2 and len(page.scripts) == 2
    assert not {"b", "alert"} & {name for name, _ in page.elements}
    assert all(not key.startswith("on") for _, attributes in page.elements for key in attributes)
    assert HOSTILE in page.text, "the text itself is shown"


def test_text_in_a_checkpoint_is_escaped(run, tmp_path, monkeypatch):
    from flowdit.reporting import reading

    meta = reading.newest_meta(epath.Path(run))
    assert meta is not None
    manifest = dataclasses.replace(meta.manifest, license=HOSTILE, attribution=f"&lt;{HOSTILE}")
    hostile = dataclasses.replace(meta, manifest=manifest, hardware=HOSTILE, versions={HOSTILE: HOSTILE})
    hostile.config.data.path = HOSTILE
    monkeypatch.setattr(reading, "newest_meta", lambda folder: hostile)
    page = report(tmp_path, f"run={run}")
    assert len(page.scripts) == 2 and page.text.count(HOSTILE) >= 6 and f"&lt;{HOSTILE}" in page.text


def test_json_cannot_end_its_script():
    text = json_for_script({"a": HOSTILE})
    assert "<" not in text and json.loads(text) == {"a": HOSTILE}
    assert tag("p", "<", title='"', hidden=True) == '<p title="&quot;" hidden>&lt;</p>'


def test_what_differs_between_runs_is_listed(run, tmp_path):
    from flowdit.reporting import reading

    other = tmp_path / "runs" / "other"
    shutil.copytree(run, other)
    original = reading.newest_meta

    def changed(folder):
        meta = original(folder)
        assert meta is not None
        if folder.name == "other":
            meta.config.optim.learning_rate = 0.5
        return meta

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "newest_meta", changed)
        page = report(tmp_path, f"run={run}", f"compare={other}")
    assert "What differs between the runs setting mine other optim.learning_rate 0.001 0.5" in page.text
    assert "mine: settings that are not the defaults" in page.text
    assert [line["name"] for line in page.chart("Loss")["series"]] == ["mine, training", "other, training"]
    assert "Training loss by t, newest step" in {chart["title"] for chart in page.data()["charts"]}


def test_a_run_without_checkpoints_is_shown_without_settings(tmp_path):
    folder = write_lines(tmp_path / "young", entry(1, 2.0, 1.0), '{"step": 2, "train/lo')
    finished = call(main, f"run={folder}", f"out={tmp_path / 'a.html'}")
    assert finished.status == 0 and "no intact checkpoint: configuration and data are unknown" in finished.out
    assert "unreadable lines left out: 1" in finished.out
    page = Page((tmp_path / "a.html").read_text())
    assert "Unknown, as there is no intact checkpoint: young." in page.text
    assert "Unreadable lines of metrics.jsonl, which are left out: young 1." in page.text


def test_steps_that_were_done_again_replace_those_before(tmp_path):
    first = "train/first_step_seconds"
    folder = write_lines(
        tmp_path / "run",
        entry(1, 9.0, 100, **{first: 10.0}),
        entry(10, 8.0, 200),
        entry(20, 7.0, 300),
        {"step": 20, "validation/loss": 1.0},
        "[1]",
        "null",
        '{"step": true}',
        '{"step": -1}',
        "\xff\x00",
        "[" * 3000,
        entry(11, 6.0, 1000, **{first: 50.0}),
        entry(20, math.nan, 1100),
        {"step": 20, "validation/loss": 2.0},
        {"step": 10, "scores/late": 5.0, "text": "x", "flag": True},
        '{"step": 30, "train/loss": 5.0, "time": "no", "big": ' + "9" * 400 + "}",
    )
    found = read_metrics(epath.Path(folder / "metrics.jsonl"))
    assert found.curves["train/loss"].steps.tolist() == [1, 10, 11, 20, 30]
    np.testing.assert_array_equal(found.curves["train/loss"].values, [9, 8, 6, np.nan, 5])
    assert found.curves["validation/loss"].values.tolist() == [2.0]
    assert found.curves["scores/late"].steps.tolist() == [10], "an entry for an earlier step removes nothing"
    assert found.unreadable == 6 and "text" not in found.curves and "flag" not in found.curves
    start, resumed = found.sessions
    assert (start.first_step, start.last_step, start.repeated, start.hours) == (1, 20, 0, pytest.approx(210 / 3600))
    assert (resumed.first_step, resumed.last_step, resumed.repeated) == (11, 30, 10)
    assert dict(zip(found.clock.steps.tolist(), found.clock.values * 3600, strict=True)) == pytest.approx(
        {1: 10, 10: 110, 11: 260, 20: 360}
    )


def test_a_line_without_an_end_takes_no_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(report_metrics, "LONGEST_LINE", 100)
    long = '{"step": 2, "train/loss": 2, "name": "' + "x" * 1000
    folder = write_lines(tmp_path / "run", entry(1, 1.0), long + '"}', entry(3, 3.0), long)
    found = read_metrics(epath.Path(folder / "metrics.jsonl"))
    assert found.curves["train/loss"].steps.tolist() == [1, 3] and found.unreadable == 2
    monkeypatch.setattr(report_metrics, "LARGEST_FILE", 150)
    assert read_metrics(epath.Path(folder / "metrics.jsonl")).curves["train/loss"].steps.tolist() == [1]


def test_long_curves_keep_their_peaks():
    values = np.sin(np.arange(50_000) / 3000)
    values[31_234] = 40.0
    thin = thinned(Curve(np.arange(50_000), values))
    assert len(thin.steps) <= 1000 and thin.steps[[0, -1]].tolist() == [0, 49_999]
    assert thin.values.max() == 40 and thin.steps[thin.values.argmax()] == 31_234
    assert len(thinned(Curve(np.arange(5000), np.full(5000, np.nan))).steps) <= 1000


def test_scores_are_shown_with_errors_floor_and_best(run, tmp_path):
    points = [
        {
            "settings": {"guidance": guidance, "steps": 20},
            "evaluations": 40.0,
            "scores": {"efficientnet": {"fd": {"value": 10 / guidance}, "kid": {"value": 0.1, "error": 0.02}}},
        }
        for guidance in (1.0, 2.0)
    ]
    floor = {"identity": "efficientnet-lite0 pool", "floor": {"fd": {"value": 1.25}}, "floor_count": 500}
    content = {
        "checkpoint": {"name": str(run / "6"), "step": 6},
        "images": {"count": 64},
        "features": {"efficientnet": floor},
        "points": [*points, {"scores": 3}],
        "best": {"metric": "fd", "features": "efficientnet", "point": 1},
    }
    (run / "evaluation").mkdir()
    (run / "evaluation" / "scores.json").write_text(json.dumps(content))
    page = report(tmp_path, f"run={run}")
    assert "best 2 40 5 0.1 ± 0.02" in page.text and "real images, 500 against others 1.25" in page.text
    assert "images.count 64" in page.text and "efficientnet-lite0 pool" in page.text
    assert f"64 images of step 6 of {run / '6'}" in page.text
    chart = page.chart("Frechet distance in efficientnet by guidance")
    assert chart["levels"] == {"real images": 1.25} and chart["note"] == "lower is better"
    assert chart["series"][0]["y"] == [10.0, 5.0] and chart["series"][0]["best"] == 1
    (run / "evaluation" / "scores.json").write_text("{}")
    assert "has no points with scores" in call(main, f"run={run}", f"out={tmp_path / 'report.html'}").out
    refused = error_line(call(main, f"run={run}", f"scores={run / 'evaluation'}", f"out={tmp_path / 'report.html'}"))
    assert refused.startswith("error: scores: ") and "has no points with scores" in refused


def test_a_grid_that_is_no_image_is_left_out(run, tmp_path, monkeypatch):
    (run / "samples" / "00000003.png").write_bytes(b"\x89PNG\r\n\x1a\n nonsense")
    finished = call(main, f"run={run}", f"out={tmp_path / 'report.html'}")
    assert finished.status == 0 and "warning: " in finished.out and "00000003.png left out" in finished.out
    monkeypatch.setattr(grids, "MOST_PIXELS", 100)
    assert not any(name == "img" for name, _ in report(tmp_path, f"run={run}").elements)


def test_embedded_images_stay_within_their_bound(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (60, 1200, 3), np.uint8)
    files = {}
    for step in range(9):
        files[step] = epath.Path(tmp_path / f"{step}.png")
        Image.fromarray(noise).save(files[step])
    embedded = grids.embed(files, 3, 600_000)
    assert [grid.step for grid in embedded] == [0, 4, 8] and all(grid.width <= grids.WIDEST for grid in embedded)
    assert sum(len(grid.uri) for grid in embedded) <= 600_000 * 4 / 3 + 200
    assert grids.embed(files, 3, 3_000) == [] and grids.spaced([1, 2, 3], 1) == [3] and grids.spaced([1], 0) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run=nothing"], "run: must be a run folder with metrics.jsonl: nothing: there is no such folder"),
        (["run={run}/6"], "run: must be a run folder, {run}/6 is a checkpoint: give its parent"),
        (["run={run}/.."], "run: must be a run folder with metrics.jsonl: {run}/..: it holds the run folders"),
        (["run={run}", "compare=[{run},{run}]"], "compare: must be other run folders, {run} is given twice"),
        (
            ["run={run}", "compare=none"],
            "compare: must be a run folder with metrics.jsonl: none: there is no such folder",
        ),
        (["run={run}", "out=page.pdf"], "out: must be a file that ends in .html, got 'page.pdf'"),
        (["run={run}", "out=s3://bucket/a.html"], "out: must be a local folder"),
        (["run={run}", "out={run}/mine.html"], "out: {run}/mine.html exists and is not a report: give another name"),
        (["run={run}", "grids=-1"], "grids: must be 0 (none) or more, got -1"),
        (["run={run}", "scores=none"], "scores: must be a scores.json of flowdit.evaluate or its folder, got none"),
        ([], "run: must be given, as in run=..."),
    ],
)
def test_mistakes_are_one_line(run, arguments, message):
    (run / "mine.html").write_text("<html>my own page</html>")
    line = error_line(call(main, *(argument.format(run=run) for argument in arguments)))
    assert line.startswith(f"error: {message.format(run=run)}")
    assert (run / "mine.html").read_text() == "<html>my own page</html>"


def test_empty_metrics_are_one_line(tmp_path):
    folder = write_lines(tmp_path / "run", "", "{")
    assert error_line(call(main, f"run={folder}")) == f"error: run: {folder}/metrics.jsonl has no figures yet"


def test_an_earlier_report_is_replaced(run, tmp_path):
    report(tmp_path, f"run={run}", "title=first")
    assert "second" in report(tmp_path, f"run={run}", "title=second").text


def test_runs_of_the_same_name_are_told_apart():
    assert short_names(["a/one", "b/one"]) == ["a/one", "b/one"]
    assert short_names(["s3://b/x/one", "y/two"]) == ["one", "two"]


def test_ticks_are_round():
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0] and ticks(97, 1103) == [200, 400, 600, 800, 1000]
    assert ticks(1, 1) == []
