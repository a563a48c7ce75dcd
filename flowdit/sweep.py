"""`--multirun`: several runs by one command, one after another, or each in a process that Hydra's launcher starts."""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import traceback
from collections.abc import Callable, Iterator

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from flowdit import leaving
from flowdit.command import (
    USER_ERRORS,
    console_is_set_up,
    messages_on_stdout,
    one_line,
    silence_libraries,
    user_errors,
    wants_traceback,
)

logger = logging.getLogger(__name__)


def job(function: Callable[[DictConfig], None]) -> Callable[[DictConfig], None]:
    """A decorator below `hydra.main`: a user's mistake is reported as by `user_errors`, without Hydra's message.

    A job of a sweep prints its error and raises it as a `ValueError` with the number of the job, so that the other jobs
    go on; the command then ends with the first of the errors.
    """

    # Neither a generator nor a lock may be in its closure: launchers pickle it.
    @functools.wraps(function)
    def run(composed: DictConfig) -> None:
        with _job_of_sweep() if is_job() else user_errors():
            function(composed)

    return run


def is_job() -> bool:
    """Whether this run is one of several of a sweep."""
    return HydraConfig.get().mode == RunMode.MULTIRUN


def ends_sweep() -> bool:
    """Whether a signal to this run, a job of a sweep, should also keep the jobs after it from starting."""
    is_last = is_job() and _is_in_process()
    if is_last:
        logger.info("the sweep ends here, jobs after this one are not started")
    return is_last


def _is_in_process() -> bool:
    return HydraConfig.get().runtime.choices.get("hydra/launcher") == "basic"


@contextlib.contextmanager
def _job_of_sweep() -> Iterator[None]:
    number = HydraConfig.get().job.num
    with contextlib.ExitStack() as stack:
        if not console_is_set_up():  # a process of a launcher, which `run_command` has not seen
            silence_libraries()
            stack.enter_context(messages_on_stdout())
        overrides = " ".join(HydraConfig.get().overrides.task).replace("\\", "")  # without Hydra's escapes
        logger.info("job %s: %s", number, overrides)
        try:
            yield
        except Exception as problem:
            if leaving.is_one_of_several():  # the others may be waiting for this one, so they end as well
                with user_errors():
                    raise
            is_mistake = isinstance(problem, USER_ERRORS)
            line = f"job {number}: {one_line(problem)}"
            if is_mistake and not wants_traceback():
                print(f"error: {line}", file=sys.stderr)
            else:
                traceback.print_exc()
            raise (ValueError if is_mistake else RuntimeError)(line) from None  # an error that can be pickled
