"""The settings of `python -m flowdit.report`."""

from __future__ import annotations

import dataclasses
from typing import Any

from flowdit.config import as_list
from flowdit.fields import FREE_TEXT, require
from flowdit.storage import require_local

MOST_RUNS = 8
"""The page has as many colours."""


@dataclasses.dataclass
class ReportConfig:
    """Settings of `python -m flowdit.report`.

    Attributes:
        run: the run folder, local or in an object store; the run may still be training.
        compare: other run folders, or files of reference curves such as `docs/reference/openmoji_demo.csv`, to draw beside
            it, one or a list.
        scores: results of `flowdit.evaluate`, a `scores.json` or its folder, one or a list; those in the run folders are
            found without it.
        title: title of the page; null: the names of the runs.
        grids: preview grids of each run that are embedded, evenly spaced, with the first and the last; 0: none.
        out: the HTML file. An earlier report is replaced, another file is not.
    """

    run: str = "???"
    compare: Any = None
    scores: Any = None
    title: str | None = dataclasses.field(default=None, metadata=FREE_TEXT)
    grids: int = 12
    out: str = "report.html"

    def __post_init__(self) -> None:
        self.compare = [str(folder) for folder in as_list(self.compare) or []]
        self.scores = [str(folder) for folder in as_list(self.scores) or []]

    def check(self) -> None:
        """Raise `FieldError` naming the first field that breaks a rule."""
        rule = f"must be at most {MOST_RUNS - 1} run folders"
        require("compare", self.compare, len(self.compare) < MOST_RUNS, rule)
        require("grids", self.grids, self.grids >= 0, "must be 0 (none) or more")
        require("out", self.out, self.out.lower().endswith(".html"), "must be a file that ends in .html")
        require_local("out", self.out)
