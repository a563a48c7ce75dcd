"""Contenders that live in processes of their own, so that each has its own device memory and can be ended at any time."""

import contextlib
import importlib
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any, NamedTuple


class Contender(NamedTuple):
    """Prepared work: `run` does it once and returns seconds, `facts` are figures about it after the runs."""

    run: Callable[[], float]
    facts: Callable[[], dict[str, Any]]


class WorkerFailed(Exception):
    """The contender raised an error, ended, or took too long; the message is one line."""


class Worker:
    """Makes a contender in another process and passes requests to it. A context manager that ends the process.

    `make` is the name of a function, "module:function", that returns the contender, a `Contender` or another object
    with methods: its module is imported over there, once `environment` is set. With `inside` it is a thread of this
    process instead, which shares the environment and cannot be ended.
    """

    def __init__(self, make: str, *arguments: Any, environment: Mapping[str, str], inside: bool = False):
        self._connection, theirs = multiprocessing.Pipe()
        self._inside = inside
        kind = threading.Thread if inside else multiprocessing.get_context("spawn").Process
        self._worker: Any = kind(target=_serve, args=(theirs, make, arguments, dict(environment)), daemon=True)
        self._worker.start()
        if not inside:
            theirs.close()  # so that the end of the process is seen

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._worker.join(1)
        if not self._inside and self._worker.is_alive():
            self._worker.kill()
            self._worker.join()

    def prepared(self, timeout: float) -> float:
        """Wait until the contender is made; the seconds it took over there."""
        return self._answer(timeout)

    def ask(self, method: str, *arguments: Any, timeout: float) -> Any:
        """What a method of the contender returns. Raises `WorkerFailed`, also after `timeout` seconds."""
        try:
            self._connection.send((method, arguments))
        except OSError:
            raise WorkerFailed("its process has ended") from None
        return self._answer(timeout)

    def _answer(self, timeout: float) -> Any:
        try:
            if timeout <= 0 or not self._connection.poll(timeout):
                raise WorkerFailed("the time is used up")
            problem, answer = self._connection.recv()
        except (EOFError, OSError):
            raise WorkerFailed("its process has ended") from None
        if problem:
            raise WorkerFailed(problem)
        return answer


def _serve(connection: Connection, make: str, arguments: tuple, environment: dict[str, str]) -> None:
    """Make the contender, then answer requests until the other end is closed; an answer is (problem, value)."""
    os.environ.update(environment)
    start = time.perf_counter()
    module, _, function = make.partition(":")
    with connection, contextlib.suppress(EOFError, OSError):  # the other end is closed
        try:
            contender = getattr(importlib.import_module(module), function)(*arguments)
        except Exception as problem:  # the other side goes on without this contender
            connection.send((one_line(problem), None))
            return
        connection.send(("", time.perf_counter() - start))
        while True:
            method, given = connection.recv()
            try:
                answer = "", getattr(contender, method)(*given)
            except Exception as problem:
                answer = one_line(problem), None
            connection.send(answer)


def one_line(problem: Exception) -> str:
    """Class and first line of an error."""
    return f"{type(problem).__name__}: {problem}".strip().splitlines()[0]
