"""Reference curves: from a run to a CSV file, and beside a run in a report."""

import importlib.util
import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from html_page import HOSTILE, Page
from runs import call

from flowdit.report import main
from flowdit.reporting import reference
from flowdit.reporting.metrics import read_metrics
from flowdit.reporting.reading import read_runs
from flowdit.reporting.reference import as_csv, read_reference

REPOSITORY = Path(__file__).parents[1]
FACTS = {"preset": "mine", "commit": "abc", "command": "python train_stage1.py", "hardware": "1 x abacus"}


@pytest.fixture(scope="module")
def exporter():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("export_reference", REPOSITORY / "scripts/export_reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_run(folder: Path, steps: int, every: int = 1) -> Path:
    """A run folder with the figures of a training run alone."""
    folder.mkdir(parents=True)
    lines = []
    for step in range(every, steps + 1, every):
        entry = {"step": step, "time": 1000.0 + step, "train/loss": float(step), "train/learning_rate": 1 / step}
        entry |= {"train/images_per_second": 3.0, "train/extra": 0.5}
        lines.append(entry)
        if step % (10 * every) == 0:
            lines.append({"step": step, "validation/loss": 2.0, "validation/loss_t0.25": 1 / 3, "scores/kid_x": 0.1})
            lines[-1]["validation/loss_t0.75"] = 1.0
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return folder


def curves(folder: Path):
    return read_metrics(epath.Path(folder / "metrics.jsonl"))


def test_short_curves_come_back_as_they_were(tmp_path):
    metrics = curves(write_run(tmp_path / "run", 40))
    (tmp_path / "a.csv").write_text(as_csv(metrics, FACTS))
    found = read_reference(epath.Path(tmp_path / "a.csv"))
    assert found.facts == FACTS
    assert set(found.metrics.curves) == set(metrics.curves) - {"train/images_per_second"}
    for name, curve in found.metrics.curves.items():
        np.testing.assert_array_equal(curve.steps, metrics.curves[name].steps)
        np.testing.assert_allclose(curve.values, metrics.curves[name].values, rtol=1e-4)
    np.testing.assert_allclose(found.metrics.clock.values, metrics.clock.values, rtol=1e-4)


def test_long_curves_are_thinned_to_means(tmp_path):
    metrics = curves(write_run(tmp_path / "run", 200_000, every=100))
    text = as_csv(metrics, FACTS)
    assert len(text) < 100_000
    (tmp_path / "a.csv").write_text(text)
    found = read_reference(epath.Path(tmp_path / "a.csv")).metrics
    loss, rate = found.curves["train/loss"], found.curves["train/learning_rate"]
    assert len(loss.steps) == 400 and loss.steps[-1] == 200_000 and len(found.curves["scores/kid_x"].steps) == 100
    # Each row is the mean since the one before, so that the mean over all steps stays.
    lengths = np.diff(loss.steps, prepend=0)
    assert np.average(loss.values, weights=lengths) == pytest.approx(100_050, rel=1e-4)
    assert rate.values[-1] == pytest.approx(1 / 200_000)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("step,a\n1\n", "row 1 has 1 cells"),
        ("step,a\n-1,2\n", "step must be a number of at least 0, got '-1'"),
        ("step,a\n1,x\n", "could not convert string to float: 'x'"),
        ("a,step\n1,2\n", "the first column must be step"),
        ("step,a,a\n1,2,3\n", "names must be different"),
        ("# only: facts\n", "the first column must be step"),
        ("step,a\n1,\n", "it has none"),
        ("step," + ",".join(map(str, range(500))) + "\n", "must have at most 500 columns"),
        ("step,a\n1,\ud800", "must be text"),
        ("".join(f"# {i}: x\n" for i in range(101)) + "step,a\n1,2\n", "must have at most 100 lines with facts (#)"),
        ("#\n" * 400_000, "must have facts (#) with different names, got '' twice"),  # took 27 s as a quadratic loop
        ("step" + "," * 2**17 + "\n", "row 0 has more than 131072 characters"),
    ],
)
def test_a_file_that_is_no_table_of_figures_is_one_line(tmp_path, text, message):
    (tmp_path / "a.csv").write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(ValueError, match=re.escape(message)) as problem:
        read_runs(str(tmp_path / "a.csv"), [])
    assert str(tmp_path / "a.csv") in str(problem.value) and "\n" not in str(problem.value)


def test_a_large_file_is_not_read(tmp_path, monkeypatch):
    (tmp_path / "a.csv").write_text("step,a\n1,2\n")
    monkeypatch.setattr(reference, "LARGEST_FILE", 4)
    with pytest.raises(ValueError, match="must have at most 4 bytes"):
        read_reference(epath.Path(tmp_path / "a.csv"))


def test_figures_are_counted(tmp_path, monkeypatch):
    (tmp_path / "a.csv").write_text("step,a,b\n1,2,\n2,3,4\n")
    monkeypatch.setattr(reference, "MOST_POINTS", 3)
    assert len(read_reference(epath.Path(tmp_path / "a.csv")).metrics.curves) == 2
    monkeypatch.setattr(reference, "MOST_POINTS", 2)
    with pytest.raises(ValueError, match="must have at most 2 figures"):
        read_reference(epath.Path(tmp_path / "a.csv"))


def test_numbers_that_are_not_finite_are_gaps(tmp_path):
    (tmp_path / "a.csv").write_text("step,a\n1,nan\n2,inf\n3,1e300\n4,5\n")
    values = read_reference(epath.Path(tmp_path / "a.csv")).metrics.curves["a"].values
    np.testing.assert_array_equal(values, [np.nan, np.nan, np.nan, 5])


def test_a_run_is_shown_beside_reference_curves(tmp_path):
    run = write_run(tmp_path / "mine", 30)
    facts = FACTS | {"batch size": "64", "command": f"python {HOSTILE}"}
    (tmp_path / "theirs.csv").write_text(as_csv(curves(write_run(tmp_path / "other", 50)), facts))
    out = tmp_path / "report.html"
    finished = call(main, f"run={run}", f"compare={tmp_path / 'theirs.csv'}", f"out={out}")
    assert finished.status == 0
    page = Page(out.read_text())
    assert [run["batch"] for run in page.data()["runs"]] == [None, 64]
    assert {line["name"] for line in page.chart("Loss")["series"]} == {
        f"{run}, {kind}" for run in ("mine", "theirs.csv") for kind in ("training", "validation")
    }
    assert len(page.chart("Validation loss by t, newest step")["series"]) == 2
    assert f"commit abc, command python {HOSTILE}" in page.text and "1 x abacus" in page.text


def test_the_exporter_writes_curves_chart_and_table(exporter, tmp_path):
    run = write_run(tmp_path / "run", 20)
    file = exporter.export(str(run), FACTS, tmp_path / "out")
    assert file.name == "mine.csv" and str(tmp_path) not in file.read_text()
    chart = file.with_suffix(".svg").read_text()
    assert chart.startswith("<svg xmlns") and "Validation loss by t" in chart
    row = exporter.table(tmp_path / "out").splitlines()[2]
    assert row.startswith("| `mine` | 20 | 20.0000 | 2.0000 at 10 |") and "| 1 x abacus | abc |" in row
    exporter.export(str(run), FACTS | {"command": "python x a=../b/c,d/e-1 'f=[g/h,i~]'"}, tmp_path / "out")


@pytest.mark.parametrize(
    "part",
    ["a=/home/me", "'a=~/b'", "a=[/home/me/a,/home/me/b]", "{b:/home/me}", "a=b,/c", "s3://bucket/a", "~me/a", "/a"],
)
def test_a_command_with_an_absolute_path_is_not_published(exporter, tmp_path, part):
    run = write_run(tmp_path / "run", 20)
    with pytest.raises(ValueError, match="command: must have no absolute path"):
        exporter.export(str(run), FACTS | {"command": f"python x {part}"}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_commit_of_changed_files_must_be_given(exporter, tmp_path):
    git = lambda *arguments: subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True, capture_output=True)
    git("init")
    for name in ("code.py", "docs/reference/README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("a")
    git("add", ".")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-m", "a")
    (tmp_path / "docs/reference/README.md").write_text("b")
    assert re.fullmatch("[0-9a-f]{12}", exporter.current_commit(tmp_path))
    (tmp_path / "code.py").write_text("b")
    with pytest.raises(ValueError, match="--commit: must be given, as files changed since HEAD: M code.py"):
        exporter.current_commit(tmp_path)


def test_the_table_of_the_page_is_that_of_the_files(exporter):
    page = (REPOSITORY / "docs/reference/README.md").read_text()
    assert page.endswith(f"{exporter.table(REPOSITORY / 'docs/reference')}\n")
    for file in (REPOSITORY / "docs/reference").glob("*.csv"):
        assert file.stat().st_size < 100_000 and {"command", "commit"} <= set(read_reference(epath.Path(file)).facts)
