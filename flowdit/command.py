"""What a command prints and how it ends: a user's mistake in one line, and the process with its status at once."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from tqdm import tqdm

from flowdit.errors import first_line

# Where a Hydra message goes on to advice that does not hold here: internal paths, types, and appending with +.
_HYDRA_NOISE = re.compile(r"\n\s*(Config search path|See http|To append|reference_type|object_type).*", re.DOTALL)


def run_command(command: Callable[[], None]) -> None:
    """Run a Hydra entry point whose configuration may be the mistake. After an error the process ends with its status."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let Hydra's errors through to be shortened here
    if not _wants_traceback():
        silence_libraries()
    try:
        with messages_on_stdout(), user_errors():
            command()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except BaseException:
        traceback.print_exc()
        status = 1
    else:
        return
    end_process(status)


class Console(logging.Handler):
    """Prints messages on stdout, warnings after `warning: `; a progress bar on stderr stays below them.

    Of `num_processes` the first alone prints information; each prints its warnings, with its number.
    """

    def __init__(self) -> None:
        super().__init__()
        self.process, self.num_processes = 0, 1

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        if record.levelno >= logging.WARNING:
            line = f"warning: {f'process {self.process}: ' if self.num_processes > 1 else ''}{line}"
        elif self.process > 0:
            return
        with contextlib.suppress(OSError, ValueError):  # a console that is closed or full ends no command
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()


_CONSOLE = Console()


@contextlib.contextmanager
def messages_on_stdout() -> Iterator[None]:
    """Prints what flowdit's modules log as information or more, and hands it to no other handler."""
    logger = logging.getLogger("flowdit")
    level, propagate = logger.level, logger.propagate
    tell_processes_apart(0, 1)
    logger.addHandler(_CONSOLE)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # importing Orbax gives the root logger a handler, which would print all again on stderr
    try:
        yield
    finally:
        logger.removeHandler(_CONSOLE)
        logger.setLevel(level)
        logger.propagate = propagate


def tell_processes_apart(process: int, num_processes: int) -> None:
    """Let only the first of several processes print information, and each say its number in its warnings."""
    _CONSOLE.process, _CONSOLE.num_processes = process, num_processes


def end_process(status: int) -> None:
    """End at once. `sys.exit` waits for the threads of libraries, which after a failed save can take minutes."""
    try:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # a full disk, a closed pipe
                stream.flush()
    finally:
        os._exit(status)


def silence_libraries() -> None:
    """What a library logs of an error, hundreds of lines of tracebacks, would bury the one line that matters."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # Of threads, and of callbacks that come after the loop they belong to has ended; our own errors are printed above.
    sys.excepthook = sys.unraisablehook = threading.excepthook = lambda *_: None


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """A user's mistake ends in one line on stderr and exit status 2; with `FLOWDIT_TRACEBACK=1` in its traceback.

    As a decorator below `hydra.main` it keeps Hydra from printing a line of its own about the job.
    """
    try:
        yield
    except (HydraException, OmegaConfBaseException, ValueError, OSError) as problem:
        if _wants_traceback():
            raise
        with contextlib.suppress(OSError):
            print(f"error: {_one_line(problem)}", file=sys.stderr)
        sys.exit(2)


def _wants_traceback() -> bool:
    return bool(os.environ.get("FLOWDIT_TRACEBACK"))


def _one_line(problem: BaseException) -> str:
    """The first line of an error; of Hydra's, which spread key, value and reason over lines and causes, all that helps."""
    if not isinstance(problem, HydraException | OmegaConfBaseException):
        return first_line(problem)
    parts = [problem, problem.__cause__] if isinstance(problem.__cause__, OmegaConfBaseException) else [problem]
    texts = [" ".join(_HYDRA_NOISE.sub("", str(part)).split()).rstrip(".") for part in parts]
    override = getattr(problem, "override", None)  # what could not be parsed; the message may show a part of it only
    return ": ".join([override, *texts] if override else texts)
