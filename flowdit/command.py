"""Running a command: console output, one-line errors, and an exit that does not wait for threads."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
from hydra.errors import HydraException
from omegaconf import DictConfig, Node
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError
from tqdm import tqdm

from flowdit import json_input, leaving
from flowdit.cli import signal_name
from flowdit.command_help import help_text
from flowdit.errors import first_line
from flowdit.joining import ProcessConfig, check_processes, join_processes
from flowdit.overrides import for_hydra, require_own_folders
from flowdit.processes import require_equal
from flowdit.settings import Setting, settings_of

logger = logging.getLogger(__name__)

PLACES = {"data.path", "data.local_dir", "train.checkpoint_dir"}
"""Settings that may differ between the processes of a run: what is there is compared instead."""

# The end of Hydra messages, with advice that does not apply here: internal paths, types, and appending with +.
_HYDRA_NOISE = re.compile(r"\n\s*(Config search path|See http|To append|reference_type|object_type).*", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Command:
    """A command for users: what its `--help` shows, and the settings that it takes.

    Attributes:
        name: as in `flowdit <name>`.
        script: the other way to run it, such as `python train_stage1.py`.
        config_name: its YAML file in `configs`.
        schema: the dataclass of its settings.
        folder: the setting that names the folder it writes to.
        summary: what it does, in a sentence.
        examples: arguments of useful calls.
        hidden: beginnings of keys that have no effect in it and are left out of `--help`.
        if_stopped: what to do after a signal.
        configs: the package with the YAML file.
    """

    name: str
    script: str
    config_name: str
    schema: type
    folder: str
    summary: str
    examples: tuple[str, ...]
    hidden: tuple[str, ...] = ()
    if_stopped: str = ""
    configs: str = "flowdit.configs"

    def settings(self) -> dict[str, Setting]:
        return settings_of(self.schema)

    def help(self) -> str:
        shown = [setting for key, setting in self.settings().items() if not key.startswith(self.hidden or ("-",))]
        texts = (self.name, self.script, self.summary, self.examples)
        return help_text(*texts, shown, config=self.config_name, configs=self.configs)


class Stopped(KeyboardInterrupt):
    """SIGTERM or Ctrl-C."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


class Unfinished(SystemExit):
    """The end of a run that was stopped in order before its last step."""

    code: int


def run_command(job: Callable[[], None], command: Command) -> None:
    """Run a Hydra entry point with one-line errors, also for the configuration. After an error the process exits."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise Hydra's errors, to shorten them here
    if not wants_traceback():
        silence_libraries()
    try:
        with messages_on_stdout(), user_errors(), signals_as_exceptions():
            if {"--help", "-h"} & set(sys.argv[1:]):
                print(command.help())
                return
            sys.argv[1:] = for_hydra(sys.argv[1:], command.settings())
            require_own_folders(sys.argv[1:], command.folder)
            job()
    except Unfinished as end:
        leaving.finish(end.code)
        raise  # the processes part in order, as at the end of a complete run
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt as stop:
        number = stop.number if isinstance(stop, Stopped) else signal.SIGINT
        line, status = f"stopped by {signal_name(number)}", 128 + number
        print(": ".join(filter(None, [line, command.if_stopped])), file=sys.stderr)
        leaving.tell_others(line, status)
    except BaseException as problem:
        if ended := leaving.explain(problem):
            line, status = ended
            print(f"error: {line}", file=sys.stderr)
        else:
            traceback.print_exc()
            line, status = first_line(problem), 1
        leaving.tell_others(line, status)
    else:
        leaving.finish()
        return
    end_process(status)


@contextlib.contextmanager
def signals_as_exceptions() -> Iterator[None]:
    """Raise `Stopped` on SIGTERM and Ctrl-C, so that temporary files are removed; a training run handles them itself."""

    def stop(number: int, _frame: object) -> None:
        raise Stopped(number)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Console(logging.Handler):
    """Prints messages on stdout, warnings after `warning: `; a progress bar on stderr stays below them.

    With several processes only the first prints information; each prints its warnings, with its index.
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
        with contextlib.suppress(OSError, ValueError):  # a closed or full console must not end the command
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()


_CONSOLE = Console()


@contextlib.contextmanager
def messages_on_stdout() -> Iterator[None]:
    """Print the messages of flowdit's modules from level INFO, without passing them to other handlers."""
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


def console_is_set_up() -> bool:
    """Whether this code runs within `messages_on_stdout`."""
    return _CONSOLE in logging.getLogger("flowdit").handlers


def join_others(settings: DictConfig, *, ends_gracefully: bool = False) -> None:
    """Join the other processes of this command by the section `mesh` of its settings (`joining.join_processes`).

    From then on only the first process prints information. Raises `ValueError` for settings that cannot work, or differ
    between the processes.
    """
    names = [field.name for field in dataclasses.fields(ProcessConfig)]
    config = ProcessConfig(**{name: settings.mesh[name] for name in names})
    check_processes(config)
    line = join_processes(config, ends_gracefully=ends_gracefully)
    tell_processes_apart(jax.process_index(), jax.process_count())
    if line is not None:
        logger.info(line)
    own = {f"mesh.{name}" for name in names} | PLACES
    require_equal({key: value for key, value in _flat(settings) if key not in own})


def _flat(settings: DictConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key in settings:
        node = settings._get_node(key)
        if isinstance(node, DictConfig) and not node._is_none() and not node._is_missing():
            yield from _flat(node, f"{prefix}{key}.")
        else:
            value = node._value() if isinstance(node, Node) else node
            yield f"{prefix}{key}", value if isinstance(value, int | float | str | None) else str(node)


def tell_processes_apart(process: int, num_processes: int) -> None:
    """With several processes, print information only from the first, and the number of the process in warnings."""
    _CONSOLE.process, _CONSOLE.num_processes = process, num_processes


def end_process(status: int) -> None:
    """Exit at once. `sys.exit` waits for threads of libraries, which can take minutes after a failed save."""
    try:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # a full disk, a closed pipe
                stream.flush()
    finally:
        os._exit(status)


def silence_libraries() -> None:
    """Suppress the error logs of libraries, hundreds of lines of tracebacks, which would hide the error line."""
    for name in ("absl", "asyncio", "gcsfs"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # Errors of threads, and of callbacks after their loop has ended; our own errors are printed elsewhere.
    sys.excepthook = sys.unraisablehook = threading.excepthook = lambda *_: None


USER_ERRORS = (HydraException, OmegaConfBaseException, ValueError, OSError)
"""What a user's mistake raises."""


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Report a user's mistake as one line on stderr with exit status 2; with `FLOWDIT_TRACEBACK=1` as a traceback."""
    try:
        yield
    except Exception as problem:
        ended = None if wants_traceback() else leaving.explain(problem)
        if ended is None and isinstance(problem, USER_ERRORS) and not wants_traceback():
            ended = (one_line(problem), 2)
        if ended is None:
            raise
        line, status = ended
        with contextlib.suppress(OSError):
            print(f"error: {line}", file=sys.stderr)
        leaving.tell_others(line, status)
        sys.exit(status)


def wants_traceback() -> bool:
    return bool(os.environ.get("FLOWDIT_TRACEBACK"))


def one_line(problem: BaseException) -> str:
    """The first line of an error; for Hydra's errors, key, value and reason from several lines and causes."""
    if isinstance(problem, ValidationError):
        return json_input.one_line(problem)
    if not isinstance(problem, HydraException | OmegaConfBaseException):
        return first_line(problem)
    parts = [problem, problem.__cause__] if isinstance(problem.__cause__, OmegaConfBaseException) else [problem]
    texts = [" ".join(_HYDRA_NOISE.sub("", str(part)).split()).rstrip(".") for part in parts]
    override = getattr(problem, "override", None)  # as given; the message may have only a part of it
    return ": ".join([override, *texts] if override else texts)
