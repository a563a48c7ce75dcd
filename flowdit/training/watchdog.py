"""A thread beside the training loop: it warns of batches that do not come, and ends a process whose steps do not finish.

It needs the interpreter: code that waits and keeps Python's lock stops it too. The other processes of a run then end by
their own limit.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import logging
import os
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import jax
from etils import epath

import flowdit
from flowdit import leaving
from flowdit.data.stream import TrainStream
from flowdit.supervisor import LOST

logger = logging.getLogger(__name__)

FACTOR = 20
"""The automatic limit, in median steps."""
LEAST_SECONDS = 300.0
TIMED_STEPS = 3
STEPS_BEHIND = 3
FOLDER = "stalled"


class StepClock:
    """Counts the seconds since the last finished step. `timeout` is `mesh.step_timeout`."""

    def __init__(self, timeout: float | None):
        self._timeout = timeout
        self._finished = 0
        self._times: collections.deque[float] = collections.deque(maxlen=100)
        self.seconds = 0.0

    @property
    def limit(self) -> float | None:
        """The seconds allowed; None for no limit (yet): the first step, which compiles, has none."""
        if self._timeout is not None:
            return self._timeout if self._timeout and self._finished else None
        if len(self._times) < TIMED_STEPS:
            return None
        return max(LEAST_SECONDS, FACTOR * statistics.median(self._times))

    def tick(self, elapsed: float, finished: int) -> bool:
        """Note that `finished` steps have finished, `elapsed` seconds after the last call; True beyond the limit."""
        self.seconds += elapsed
        if new := finished - self._finished:
            if self._finished:
                self._times.extend([self.seconds / new] * min(new, 100))
            self._finished = finished
            self.restart()
        return self.limit is not None and self.seconds > self.limit

    def restart(self, finished: int | None = None) -> None:
        """Count from now on; steps that have `finished` in a pause are not timed."""
        self.seconds = 0.0
        self._finished = self._finished if finished is None else finished


class StallClock:
    """Counts the seconds that the main thread waits for one thing, and warns. `timeout` is `data.stall_timeout`."""

    def __init__(self, timeout: float):
        self._timeout = timeout
        self._thing: str | None = None
        self._seconds, self._next_warning = 0.0, timeout

    def tick(self, elapsed: float, thing: str | None, details: Callable[[], str] = str) -> None:
        """Note that the main thread waits for `thing`, or for nothing.

        Warns after the time-out, twice the time-out, and so on; and once the wait is over.
        """
        self._seconds += elapsed
        if thing != self._thing:
            if self._next_warning > self._timeout:
                logger.warning("%s: over after %.0f s", self._thing, self._seconds)
            self._thing = thing
            self._seconds, self._next_warning = 0.0, self._timeout
        elif thing is not None and self._timeout and self._seconds >= self._next_warning:
            more = f": {text}" if (text := details()) else ""
            logger.warning("%s for %.0f s (data.stall_timeout)%s", thing, self._seconds, more)
            self._next_warning *= 2


class Watchdog:
    """As a context manager around the loop, the thread with the clocks. Without time-outs it does nothing."""

    def __init__(self, step_timeout: float | None, stall_timeout: float, stream: TrainStream, folder: epath.Path):
        self._steps = StepClock(step_timeout)
        self._stream = stream
        self._batches, self._saves = StallClock(stall_timeout), StallClock(stall_timeout)
        self._folder = folder
        self._running: collections.deque[Any] = collections.deque()
        self._first, self._finished = 0, 0
        self._is_paused = False
        self._storing: str | None = None
        self._ended = threading.Event()
        self._tick_seconds = min([1.0, *(seconds / 10 for seconds in (step_timeout, stall_timeout) if seconds)])
        self._is_on = step_timeout != 0 or stall_timeout > 0
        self._thread: threading.Thread | None = None
        self._watched = threading.get_ident()

    def started(self, step: int, metrics: Any) -> None:
        """Note that `step` is started. Waits for the step three before it, so that others are still queued."""
        if not self._is_on:
            return
        self._first = self._first or step
        self._running.append(metrics)
        if len(self._running) > STEPS_BEHIND:
            jax.block_until_ready(self._running.popleft())
            self._finished += 1

    @contextlib.contextmanager
    def paused(self, storing: str | None = None) -> Iterator[None]:
        """Do not count the time within as that of a step. All steps must have finished.

        `storing` says what is being stored, for a warning if the storage stalls.
        """
        self._finished += len(self._running)
        self._running.clear()
        self._is_paused, self._storing = True, storing
        try:
            yield
        finally:
            self._is_paused, self._storing = False, None

    def __enter__(self) -> Watchdog:
        self._watched = threading.get_ident()
        if self._is_on:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._ended.wait(self._tick_seconds):
            now = time.monotonic()
            # While the whole process is stopped (Ctrl-Z), this thread is too, and nothing is to be counted.
            elapsed, before = min(now - before, 2 * self._tick_seconds), now
            self._tick_stalls(elapsed)
            if self._is_paused:
                self._steps.restart(self._finished)
            elif self._steps.tick(elapsed, self._finished):
                self._expire()
                return

    def _tick_stalls(self, elapsed: float) -> None:
        number = self._stream.waiting_for
        if number is None:
            self._batches.tick(elapsed, None)
        else:
            reading = functools.partial(self._stream.describe_reading, number)
            self._batches.tick(elapsed, f"waiting for batch {number}", reading)
        self._saves.tick(elapsed, self._storing)

    def _expire(self) -> None:
        """End the process, after saying where its threads are; a disk or console that hangs may be the cause."""
        try:
            for metrics in list(self._running):
                if not _within(0.5, functools.partial(jax.block_until_ready, metrics)):
                    break
                self._finished += 1
            stacks = {thread: _stack(frame) for thread, frame in sys._current_frames().items()}
            line, last = self._line(stacks.get(self._watched, [])), self._first + self._finished - 1
            file = self._folder / FOLDER / f"{last}-process{jax.process_index()}.txt"
            if _within(5.0, lambda: _write(file, f"{line}\n\n{_tracebacks(stacks)}")):
                line += f"; tracebacks of all threads: {file}"
            number = f"process {jax.process_index()}: " if jax.process_count() > 1 else ""
            _within(5.0, lambda: os.write(2, f"error: {number}{line}\n".encode()))
            _within(5.0, lambda: leaving.tell_others(line, LOST))
        finally:
            os._exit(LOST)

    def _line(self, stack: list[str]) -> str:
        package = os.path.dirname(flowdit.__file__)
        own = next((place for place in stack if place.startswith(package)), None)
        places = " -> ".join(dict.fromkeys([*filter(None, [own]), *stack[:1]])) or "unknown"
        last = self._first + self._finished - 1
        return (
            f"mesh.step_timeout: no step has finished for {self._steps.seconds:.0f} s after step {last} "
            f"(limit {self._steps.limit:.0f} s); the main thread was in {places}"
        )


def _stack(frame: FrameType) -> list[str]:
    """`file:line function` of each call, the innermost first. Reads no source files."""
    return [f"{f.f_code.co_filename}:{line} {f.f_code.co_name}" for f, line in traceback.walk_stack(frame)]


def _tracebacks(stacks: dict[int, list[str]]) -> str:
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"thread {names.get(thread, thread)}, innermost call first\n" + "".join(f"  {place}\n" for place in stack)
        for thread, stack in stacks.items()
    )


def _write(file: epath.Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def _within(seconds: float, function: Callable[[], Any]) -> bool:
    """Call `function` in a thread; whether it has ended within `seconds` without an error."""
    done = threading.Event()

    def call() -> None:
        with contextlib.suppress(Exception):
            function()
            done.set()

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    return done.is_set()
