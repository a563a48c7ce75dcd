"""Which checkpoints of a run are kept, and its best one: `best.json` in the run folder, read as `<run>/best`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Collection, Sequence
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from flowdit.checkpoint.files import CheckpointError
from flowdit.checkpoint.meta import Best
from flowdit.json_input import InputError, parse_file
from flowdit.processes import from_first
from flowdit.storage import has_been_committed, write_whole

BEST_FILE = "best.json"
BEST_NAME = "best"


@dataclasses.dataclass
class Retention(ocp.checkpoint_managers.PreservationPolicy):
    """Keeps the newest `keep_last` steps and every multiple of `keep_every`, and besides these the steps `protected`.

    Protected steps do not count as one of the newest, and the newest step is always kept.
    """

    keep_last: int | None
    keep_every: int | None
    protected: Collection[int] = ()

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Orbax asks it at every save, with all steps including the new one, oldest first."""
        steps = [info.step for info in checkpoints]
        others = [step for step in steps if step not in self.protected]
        kept = {*self.protected, *steps[-1:], *(others if self.keep_last is None else others[-self.keep_last :])}
        return [step in kept or (self.keep_every is not None and step % self.keep_every == 0) for step in steps]


def write_best(folder: epath.Path, best: Best) -> None:
    """Write `best.json`, whole or not at all."""
    write_whole(folder / BEST_FILE, json.dumps(dataclasses.asdict(best), indent=1) + "\n")


def read_best(folder: epath.Path) -> Best | None:
    """The content of `best.json`; None if there is none, or nothing that can be read."""
    with contextlib.suppress(InputError):
        return parse_file(Best, folder / BEST_FILE)
    return None


def is_best_name(path: epath.Path) -> bool:
    """Whether `path` is `<run>/best`, which is no folder, of a run with a `best.json`."""
    return path.name == BEST_NAME and (path.parent / BEST_FILE).exists() and not path.exists()


def best_step(path: epath.Path) -> epath.Path:
    """The checkpoint for which `<run>/best` stands. All processes must call it. Raises `CheckpointError`."""

    def find() -> str:
        try:
            step = parse_file(Best, path.parent / BEST_FILE).step
        except InputError as problem:
            raise CheckpointError(str(problem)) from None
        if not has_been_committed(path.parent / str(step)):
            raise CheckpointError(f"{path}: there is no checkpoint {path.parent / str(step)}, which {BEST_FILE} names")
        return str(step)

    return path.parent / from_first(find)
