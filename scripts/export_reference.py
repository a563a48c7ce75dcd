"""Reference curves of a preset from a run folder: CSV and chart in `docs/reference`, and their row in its table.

    python scripts/export_reference.py checkpoints/demo openmoji_demo \
        --command "python train_stage1.py experiment=openmoji_demo"

Run it at the commit that trained, without changes to its files, or give it as `--commit`.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

from etils import epath

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from flowdit.errors import first_line
from flowdit.reporting.charts import curve_charts, time_charts
from flowdit.reporting.figure import figure
from flowdit.reporting.metrics import Curve
from flowdit.reporting.reading import RunRecord, read_runs
from flowdit.reporting.reference import SUFFIX, as_csv, read_reference
from flowdit.reporting.series import Chart

FOLDER = ROOT / "docs" / "reference"
PAGE = FOLDER / "README.md"
MARK = "<!-- written by scripts/export_reference.py -->"
HEAD = ("preset", "steps", "training loss", "validation loss, lowest", "hardware", "commit", "files")
ABSOLUTE = re.compile(r"(?<![\w./~*+@%-])[/~]")
"""A / or ~ that nothing of a relative path stands before."""


def export(folder: str, facts: dict[str, str], out: Path) -> Path:
    """Write the CSV and the chart of a run with the facts `preset`, `command`, `commit` and `hardware`.

    Raises `ValueError` for a run or a command that cannot be published.
    """
    (run,) = read_runs(folder, [])
    if ABSOLUTE.search(facts["command"]):
        raise ValueError(f"command: must have no absolute path or address, got {facts['command']!r}")
    facts = facts | {"batch size": str(run.batch_size or "")}
    if run.meta is not None:
        facts |= {"jax": run.meta.versions.get("jax", ""), "hardware": facts["hardware"] or run.meta.hardware}
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"{facts['preset']}{SUFFIX}"
    file.write_text(as_csv(run.metrics, {name: value for name, value in facts.items() if value}), encoding="utf-8")
    (written,) = read_runs(str(file), [])
    file.with_suffix(".svg").write_text(figure(charts(written)), encoding="utf-8")
    return file


def charts(run: RunRecord) -> list[Chart]:
    """Losses, validation loss by t, gradient norm and scores."""
    wanted = ("Loss", "Gradient norm")
    curves = [chart for chart in curve_charts([run]) if chart.title in wanted or chart.section == "scores"]
    by_time = [chart for chart in time_charts([run]) if chart.title.startswith("Validation")]
    return [*curves[:1], *by_time[:1], *curves[1:]]


def table(folder: Path) -> str:
    """The Markdown table of the files in a folder."""
    rows = [HEAD, ("---",) * len(HEAD)]
    for file in sorted(folder.glob(f"*{SUFFIX}")):
        facts, metrics = read_reference(epath.Path(file))
        loss, validation = metrics.curve("train/loss"), metrics.curve("validation/loss")
        steps = max(int(curve.steps[-1]) for curve in metrics.curves.values())
        losses = ("" if loss is None else f"{loss.last:.4f}", "" if validation is None else _lowest(validation))
        about = (facts.get("hardware", ""), facts.get("commit", ""))
        files = f"[CSV]({file.name}), [chart]({file.stem}.svg)"
        rows.append((f"`{facts.get('preset', file.stem)}`", f"{steps:,}", *losses, *about, files))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _lowest(curve: Curve) -> str:
    best = curve.values.argmin()
    return f"{curve.values[best]:.4f} at {curve.steps[best]:,}"


def current_commit(repository: Path) -> str:
    """HEAD. Raises `ValueError` if files in git other than reference curves differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(repository), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)docs/reference")
    if changed:
        raise ValueError(f"--commit: must be given, as files changed since HEAD: {first_line(ValueError(changed))}")
    return git("rev-parse", "--short=12", "HEAD")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="the run folder")
    parser.add_argument("preset", help="name of the preset, and of the files")
    parser.add_argument("--command", required=True, help="the command that trained")
    parser.add_argument("--commit", help="the commit that trained (default: this one)")
    parser.add_argument("--hardware", default="", help="the devices (default: those in the checkpoint)")
    given = parser.parse_args()
    try:
        commit = given.commit or current_commit(ROOT)
        facts = {"preset": given.preset, "commit": commit, "command": given.command, "hardware": given.hardware}
        file = export(given.run, facts, FOLDER)
    except (ValueError, OSError, subprocess.CalledProcessError) as problem:
        parser.error(first_line(problem))
    before = PAGE.read_text(encoding="utf-8").partition(MARK)[0]
    PAGE.write_text(f"{before}{MARK}\n\n{table(FOLDER)}\n", encoding="utf-8")
    print(f"written: {file} ({file.stat().st_size / 1e3:.0f} kB), {file.with_suffix('.svg')}, {PAGE}")


if __name__ == "__main__":
    main()
