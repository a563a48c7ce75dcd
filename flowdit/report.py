"""`python -m flowdit.report run=checkpoints [compare=...]`: one HTML file about a training run, or several."""

from __future__ import annotations

from flowdit.cli import watch_for_signals

if __name__ == "__main__":
    watch_for_signals("report")

import logging
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # JAX is imported with the checkpoints, and must not take a busy device
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from flowdit.command import Command, run_command
from flowdit.config import resolve
from flowdit.reporting.config import ReportConfig
from flowdit.reporting.page import GENERATOR, make_page
from flowdit.reporting.reading import read_runs
from flowdit.reporting.results import read_results
from flowdit.reporting.shell import check_replaceable, write_page
from flowdit.sweep import job

# By its name, as this module is `__main__` when it is run.
logger = logging.getLogger("flowdit.report")

COMMAND = Command(
    name="report",
    script="python -m flowdit.report",
    config_name="report",
    schema=ReportConfig,
    folder="out",
    summary="Write one HTML file about a training run: curves, samples, scores, settings, hardware, data.",
    examples=(
        "run=checkpoints",
        "run=checkpoints/wide compare=[checkpoints/narrow,checkpoints/deep] out=widths.html",
        "run=s3://bucket/runs/xl2 scores=scores/xl2",
    ),
)


@hydra.main(version_base="1.3", config_path="configs", config_name="report")
@job
def _report(composed: DictConfig) -> None:
    config: ReportConfig = resolve(composed, ReportConfig)
    config.check()
    out = Path(config.out)
    check_replaceable(out, GENERATOR, "a report")
    runs = read_runs(config.run, config.compare)
    page = make_page(runs, read_results(runs, config.scores), config.title, config.grids)
    write_page(out, page)
    logger.info("written: %s (%.1f MB)", out, out.stat().st_size / 1e6)


def register_schema() -> None:
    """Register the command's dataclass with Hydra."""
    ConfigStore.instance().store(name="report_schema", node=ReportConfig)


def main() -> None:
    register_schema()
    run_command(_report, COMMAND)


if __name__ == "__main__":
    main()
