"""The plan of a screening, from a YAML file: a baseline, options of it, seeds and a budget."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator
from pydantic.dataclasses import dataclass

from flowdit.fields import require
from flowdit.json_input import STRICT, Count, InputError, Positive, parse

BASELINE = "baseline"
NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
COMBINED = "+"
"""Between the names of a combination, the best first."""
SHARE = re.compile(r"=(\d+(?:\.\d+)?)%$")
PLAN = "plan.yaml"
"""The copy of a plan in the folder of its results."""


def _split(value: Any) -> Any:
    return shlex.split(value) if isinstance(value, str) else value


Overrides = Annotated[list[str], BeforeValidator(_split)]
"""Overrides as on a command line: a list, or one text. A value such as `20%` is that share of a run's steps."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class Budget:
    """How long each run trains: either minutes of training, without compilation and evaluations, or steps."""

    minutes: Positive | None = None
    steps: Count | None = None


@dataclass(frozen=True, config=STRICT, kw_only=True)
class Evaluation:
    """Calls of `flowdit.evaluate` for a finished run: settings of all, and those of each part by its name."""

    settings: Overrides = dataclasses.field(default_factory=list)
    parts: dict[str, Overrides] = dataclasses.field(default_factory=lambda: {"all": []})


@dataclass(frozen=True, config=STRICT, kw_only=True)
class Finals:
    """After the screening, the `count` best options, their combination and the baseline run with other `seeds`."""

    count: Count = 3
    seeds: list[int] = dataclasses.field(default_factory=lambda: [1, 2, 3])


@dataclass(frozen=True, config=STRICT, kw_only=True)
class Plan:
    """A screening.

    Attributes:
        stage: 1 or 2, the training command.
        baseline: overrides of every run.
        options: overrides of each option by its name, over those of the baseline.
        budget: how long each run trains.
        seeds: seeds of every option and of the baseline.
        finals: which options run with other seeds; null: none.
        validations: how often a run is validated, evenly spaced.
        saves: how often a run is saved, evenly spaced; an interrupted run continues from there.
        timing_steps: steps of the short runs by which minutes become steps.
        loss: the figure in `metrics.jsonl` by which options are compared.
        evaluate: scores of finished runs; null: none.
    """

    stage: Literal[1, 2]
    baseline: Overrides
    options: dict[str, Overrides]
    budget: Budget
    seeds: list[int] = dataclasses.field(default_factory=lambda: [0])
    finals: Finals | None = None
    validations: Count = 20
    saves: Count = 5
    timing_steps: Count = 60
    loss: str = "validation/loss"
    evaluate: Evaluation | None = None

    def __post_init__(self) -> None:
        require("seeds", self.seeds, bool(self.seeds), "must be at least one seed")
        is_one = (self.budget.minutes is None) != (self.budget.steps is None)
        require("budget", dataclasses.asdict(self.budget), is_one, "must be minutes or steps")
        final = self.finals.seeds if self.finals else []
        rule = "must not be seeds of the screening, which chose the options"
        require("finals.seeds", final, not set(final) & set(self.seeds), rule)
        require("timing_steps", self.timing_steps, self.timing_steps >= 4, "must be at least 4")
        for name in (*self.options, *(self.evaluate.parts if self.evaluate else ())):
            rule = "names must be of letters, digits, _, . and -"
            require("options", name, NAME.fullmatch(name) is not None, rule)
        require("options", BASELINE, BASELINE not in self.options, "must not name an option like the baseline")

    def overrides(self, option: str) -> list[str]:
        """The overrides of an option over those of the baseline. In a combination `a+b` those of `a` replace `b`'s."""
        parts = [] if option == BASELINE else option.split(COMBINED)
        return merged(self.baseline, *(self.options[part] for part in reversed(parts)))

    def replaced(self, option: str) -> list[str]:
        """The overrides of a combination that do not count, as an option before sets the same key."""
        used, parts = self.overrides(option), option.split(COMBINED)
        return [
            f"{override} of {part}" for part in parts for override in self.options.get(part, ()) if override not in used
        ]

    def knows(self, option: str, seed: int) -> bool:
        """Whether a run may be one of this plan."""
        is_seed = seed in self.seeds or self.is_final(seed)
        return is_seed and (option == BASELINE or all(part in self.options for part in option.split(COMBINED)))

    def is_final(self, seed: int) -> bool:
        """Whether a seed is one of the finals."""
        return self.finals is not None and seed in self.finals.seeds


def merged(*groups: Iterable[str]) -> list[str]:
    """Overrides of which later ones replace earlier ones of the same key, as Hydra takes no group twice."""
    found: dict[str, str] = {}
    for override in (override for group in groups for override in group):
        key = override.partition("=")[0].lstrip("+~")
        found.pop(key, None)
        found[key] = override
    return list(found.values())


def of_steps(overrides: Iterable[str], steps: int) -> list[str]:
    """Overrides with `key=20%` as that share of the steps of the run."""
    share = lambda found: f"={round(float(found[1]) / 100 * steps)}"
    return [SHARE.sub(share, override) for override in overrides]


def read_plan(file: Path) -> Plan:
    """Read a plan. Raises `ValueError` naming the file and the key for what is no plan."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        return parse(Plan, content)
    except OSError as problem:
        raise ValueError(f"{file}: cannot be read: {problem.strerror}") from problem
    except yaml.YAMLError as problem:
        raise ValueError(f"{file}: is not YAML: {' '.join(str(problem).split())}") from None
    except (InputError, UnicodeDecodeError) as problem:
        raise ValueError(f"{file}: {problem}") from None


def located(arguments: Sequence[str]) -> tuple[Path, Path]:
    """The file of a plan and the folder of its results, from the arguments: a plan, or the folder of one begun before.

    Raises `ValueError` for other arguments.
    """
    if len(arguments) not in (1, 2) or (len(arguments) == 2 and not arguments[1].startswith("out=")):
        raise ValueError(f"recipes: must be a plan or the folder of its results, and out=FOLDER, got {list(arguments)}")
    given = Path(arguments[0])
    out = Path(arguments[1].removeprefix("out=")) if len(arguments) == 2 else None
    if given.is_dir() and out is None:
        return given / PLAN, given
    return given, out or Path("checkpoints/recipes") / given.stem
