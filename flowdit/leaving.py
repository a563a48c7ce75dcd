"""The end of one of several processes: all others learn of it and end too, with a line that says why.

A process that fails leaves a note in the key-value store of `jax.distributed`; a thread of every other process finds it
within a second, also where its main thread waits for a collective operation that will never end. Where a connection
breaks, the threads hold a roll call, which names the processes that do not answer. A process that no thread can end,
JAX's own heartbeats find (`supervisor`).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import threading
import time
from typing import Any, NoReturn

from jax._src import distributed

from flowdit import supervisor
from flowdit.errors import first_line

_POLL_SECONDS = 1.0
_ROLL_CALL_SECONDS = 5.0
_NOTES = "flowdit/end/"
_FAILED = f"{_NOTES}failed"
_ROLL_CALL = f"{_NOTES}roll-call"
_CONNECTION = re.compile(r"Gloo \w+ failed|external/gloo|\bNCCL\b|nccl[A-Z]|CoordinationService|Barrier timed out")
"""In the texts of errors of JAX and Orbax, which have no type of their own; also where another error quotes them."""
_finished = threading.Event()


def _client() -> Any:
    """The key-value store and barriers of `jax.distributed`, which JAX has no public name for; Orbax uses it as well."""
    return distributed.global_state.client


def is_one_of_several() -> bool:
    """Whether this process has joined others."""
    return _client() is not None and distributed.global_state.num_processes > 1


def watch_others() -> None:
    """Start the thread that ends this process after the end of another one."""
    if is_one_of_several():
        threading.Thread(target=_watch, name="watch-others", daemon=True).start()


def finish(status: int = 0) -> None:
    """This process has done its work and ends with `status`: from now on the end of others does not matter."""
    _finished.set()
    supervisor.ended(status)


def require_same_count(count: int | None, timeout: float) -> None:
    """Raise `ValueError` unless `mesh.num_processes` is that of the first process: JAX's runtime does not compare it."""
    number, key = distributed.global_state.process_id, "flowdit/num_processes"
    if number == 0:
        _client().key_value_set(key, str(count))
    elif (first := _client().blocking_key_value_get(key, int(1000 * timeout))) != str(count):
        raise ValueError(
            f"mesh.num_processes: must be equal in all processes, got {first} in process 0 and {count} in process {number}"
        )


def tell_others(line: str, status: int) -> None:
    """Before this process ends with an error: make the others end with its `line` and `status`."""
    if not is_one_of_several():
        return
    _finished.set()
    number = distributed.global_state.process_id
    with contextlib.suppress(Exception):  # an earlier note stays, and the store may be gone
        _client().key_value_set(_FAILED, json.dumps({"process": number, "line": line, "status": status}))
    supervisor.ended(status)
    _outlive_others()


def explain(problem: BaseException) -> tuple[str, int] | None:
    """If the end of other processes has caused `problem`, a line that names them and the exit status; otherwise None."""
    if not is_one_of_several() or not _is_of_connection(problem):
        return None
    _finished.set()  # from now on here, and not in the thread
    with contextlib.suppress(Exception):
        if ended := _read_note(dict(_client().key_value_dir_get(_NOTES))):
            return ended
    with contextlib.suppress(Exception):  # another process has called already
        _client().key_value_set(_ROLL_CALL, "")
    line = _call_roll() or f"the connection between the processes has failed: {first_line(problem)}"
    return line, supervisor.LOST


def _read_note(notes: dict[str, str]) -> tuple[str, int] | None:
    if _FAILED not in notes:
        return None
    note = json.loads(notes[_FAILED])
    return f"process {note['process']} has failed: {note['line']}", note["status"]


def _is_of_connection(problem: BaseException | None) -> bool:
    while problem is not None:
        if _CONNECTION.search(str(problem)):
            return True
        problem = problem.__cause__ or problem.__context__
    return False


def _call_roll() -> str | None:
    """Wait for all processes; a line that names those that do not come, None if all do."""
    try:
        _client().wait_at_barrier("flowdit/roll-call", int(1000 * _ROLL_CALL_SECONDS))
    except Exception as answer:
        names = re.findall(r"^\d+$", str(answer).partition("timed out task names:")[2], re.MULTILINE)
        if not names:
            return "lost process 0, the coordinator: it is gone, stopped or unreachable"
        return f"lost process {', '.join(names)}: it is gone, stopped or unreachable"
    return None


def _watch() -> None:
    while not _finished.wait(_POLL_SECONDS):
        with contextlib.suppress(Exception):  # a store that is gone is reported by JAX's runtime
            notes = dict(_client().key_value_dir_get(_NOTES))
            if ended := _read_note(notes):
                _end(*ended)
            if _ROLL_CALL in notes:
                line = _call_roll() or "the connection between the processes has failed in another process"
                _end(line, supervisor.LOST)


def _end(line: str, status: int) -> NoReturn:
    """End this process from a thread; its main thread may never return."""
    supervisor.ended(status)
    with contextlib.suppress(OSError, ValueError):
        print(f"error: {line}", file=sys.stderr, flush=True)
        sys.stdout.flush()
    _outlive_others()
    os._exit(status)


def _outlive_others() -> None:
    """The first process serves the store: it waits until all others have read it."""
    if distributed.global_state.process_id == 0:
        time.sleep(2 * _POLL_SECONDS)
