"""Recipes compared at equal minutes or steps, one run after another: the screening of a plan.

`python -m benchmarks recipes PLAN.yaml [out=FOLDER]` does what is missing and writes the results; stopped or killed at
any time, the same command, or `python -m benchmarks recipes FOLDER`, goes on. `benchmarks/plans` has plans. Steps for a
budget of minutes come from a short run of each option.
"""

from __future__ import annotations

from collections.abc import Sequence

from etils import epath

from benchmarks.screening import tables
from benchmarks.screening.jobs import JobError, Jobs, Run, locked
from benchmarks.screening.plan import BASELINE, COMBINED, PLAN, located, read_plan
from benchmarks.screening.results import finalists, outcome
from flowdit.storage import write_whole


class Screening:
    """A plan with what is trained of it, also by earlier starts.

    `failed` has the runs whose training or evaluation failed, which are tried again by the next start.
    """

    def __init__(self, jobs: Jobs):
        self.jobs = jobs
        self.failed: dict[Run, str] = {}
        self.done = jobs.finished()

    def run(self) -> str:
        """Do what is missing; returns the results as Markdown."""
        plan = self.jobs.plan
        options = [BASELINE, *plan.options]
        self._do([Run(option, seed) for seed in plan.seeds for option in options])
        if plan.finals is not None:
            best = finalists(
                [outcome(self.jobs, run) for run in self.done if run.seed in plan.seeds], plan.finals.count
            )
            combined = [COMBINED.join(best)] if len(best) > 1 else []
            self._do([Run(option, seed) for seed in plan.finals.seeds for option in [BASELINE, *best, *combined]])
        return self.write()

    def _do(self, runs: Sequence[Run]) -> None:
        for i, run in enumerate(runs, start=1):
            try:
                if run not in self.done:
                    print(f"[{i}/{len(runs)}] {run}: {self.jobs.steps(run.option):,} steps", flush=True)
                    self.jobs.train(run)
                    self.done.append(run)
            except JobError as problem:
                self._fails(run, str(problem))
                if not any(other.option == BASELINE for other in self.done):
                    raise ValueError(f"the baseline failed: {problem}") from None
                continue
            try:
                self.jobs.evaluate(run)
                self.failed.pop(run, None)
            except JobError as problem:
                self._fails(run, f"its evaluation: {problem}")
            self.write()

    def _fails(self, run: Run, problem: str) -> None:
        self.failed[run] = problem
        print(f"{run} failed: {problem}", flush=True)

    def write(self) -> str:
        """Write the results so far."""
        order = [BASELINE, *self.jobs.plan.options]
        place = lambda run: (order.index(run.option) if run.option in order else len(order), run)
        outcomes = [outcome(self.jobs, run) for run in sorted(self.done, key=place)]
        return tables.write(self.jobs.out, self.jobs.plan, outcomes, self.failed)


def check(arguments: Sequence[str]) -> None:
    """Raise `ValueError` unless the arguments name a plan."""
    read_plan(located(arguments)[0])


def measure(*arguments: str) -> str:
    """Do what is missing of a plan; returns the results as Markdown."""
    file, out = located(arguments)
    with locked(out) as lock:
        plan = read_plan(file)
        jobs = Jobs(plan, out, lock)
        for seed in (*plan.seeds, *(plan.finals.seeds if plan.finals else ())):
            try:
                jobs.check(Run(BASELINE, seed))
            except JobError as problem:  # a folder of other results, which stay as they are
                raise ValueError(str(problem)) from None
        if file.resolve() != (out / PLAN).resolve():
            write_whole(epath.Path(out / PLAN), file.read_text(encoding="utf-8"))
        return Screening(jobs).run()
