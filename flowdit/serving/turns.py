"""Turns at the machine: one draw after another, with limits of how many wait, in all and of each visitor."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable
from typing import Any

from flowdit.fields import FieldError


class Job:
    """A draw that waits or runs. `progress` is the fraction that is done."""

    def __init__(self, visitor: str):
        self.visitor = visitor
        self.progress = 0.0
        self.is_running = False
        self.future: concurrent.futures.Future[Any]


class Turns:
    """Runs one job at a time, in the order of arrival.

    A job that has started runs to its end; its length is bounded by the limits of count and steps.
    """

    def __init__(self, max_waiting: int, max_waiting_each: int):
        self._most = max_waiting
        self._most_each = max_waiting_each
        self._jobs: list[Job] = []
        self._lock = threading.Lock()
        self._worker = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="draw")

    def submit(self, visitor: str, work: Callable[[Callable[[float], None]], Any]) -> Job:
        """Queue `work`, which is called with a function that takes its progress.

        Raises `FieldError` if too many jobs are waiting, in all or of this visitor.
        """
        with self._lock:
            own = sum(job.visitor == visitor for job in self._jobs)
            if own >= self._most_each:
                raise FieldError(
                    "queue", f"{own} of your draws are waiting or running, which is the most: try again later"
                )
            waiting = sum(not job.is_running for job in self._jobs)
            if waiting >= self._most:
                raise FieldError("queue", f"{waiting} draws are waiting, which is the most: try again later")
            job = Job(visitor)
            self._jobs.append(job)
            job.future = self._worker.submit(self._run, job, work)
        job.future.add_done_callback(lambda _: self._remove(job))
        return job

    def ahead(self, job: Job) -> int:
        """Jobs that come before this one; 0 when it runs or has ended."""
        with self._lock:
            return self._jobs.index(job) if job in self._jobs and not job.is_running else 0

    def leave(self, job: Job) -> None:
        """Forget a job whose visitor has gone, unless it has started."""
        job.future.cancel()

    def _run(self, job: Job, work: Callable[[Callable[[float], None]], Any]) -> Any:
        with self._lock:
            job.is_running = True
        return work(lambda fraction: setattr(job, "progress", float(fraction)))

    def _remove(self, job: Job) -> None:
        with self._lock:
            self._jobs.remove(job)
