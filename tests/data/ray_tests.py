"""Ray in tests: work for it, its folder of logs and sockets, and processes that belong to a command."""

import contextlib
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from flowdit.fields import FieldError

REPOSITORY = Path(__file__).parents[2]


class SquareMaker(NamedTuple):
    """Makes workers that square numbers and give the number of their process.

    They fail at negative numbers, and kill themselves at 3 the first time, and at 100 every time.
    """

    folder: Path

    def __call__(self) -> Callable[[int], tuple[int, int]]:
        return self._work

    def _work(self, item: int) -> tuple[int, int]:
        if item < 0:
            raise FieldError("dtype", f"must be finite, got {item}")
        if item == 100 or (item == 3 and not (self.folder / "killed").exists()):
            (self.folder / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.1)
        return item**2, os.getpid()


@contextlib.contextmanager
def ray_folder() -> Iterator[Path]:
    """A folder for Ray's logs and sockets, removed at the end; its path is short, as those of sockets are limited.

    Workers can import this package and this module.
    """
    made = tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True)
    with made as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        patch.setenv("PYTHONPATH", f"{REPOSITORY}{os.pathsep}{Path(__file__).parent}")
        yield Path(folder)


def processes_in(folder: Path) -> dict[int, str]:
    """Running processes whose working directory is `folder`, other than this one, with their command lines."""
    found = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and int(entry.name) != os.getpid() and (entry / "cwd").readlink() == folder:
                found[int(entry.name)] = (entry / "cmdline").read_text(errors="replace").replace("\0", " ").strip()
    return found


def workers_in(folder: Path) -> list[int]:
    """The workers of Ray Data in `folder`."""
    return sorted(number for number, line in processes_in(folder).items() if "MapWorker" in line)


def wait_until(condition: Callable[[], object], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)


def end_processes_in(folder: Path) -> None:
    """Kill what is left: two helpers of Ray outlive a killed command by a minute."""
    for number in processes_in(folder):
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
