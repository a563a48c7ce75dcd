"""The parent of a command that is one of several processes: it turns an abort of JAX's runtime into one line.

Where another process is lost or cannot be joined, JAX's runtime ends this one by SIGABRT, with a stack trace and from a
thread of C++, so that no Python code can report it. Therefore the command runs in a child process. Its Python output
goes to the console directly; what C++ code writes to file descriptor 2 goes through the parent, which keeps the
runtime's errors back and, after an abort, reports them in one line with an exit status for the scheduler.

This module imports only the standard library, as its process must start at once and stay small.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import importlib.util
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from typing import NoReturn

LOST = 75
"""Exit status after the loss of another process, and of a watchdog: EX_TEMPFAIL of sysexits.h, so start again."""

_PARENT = "FLOWDIT_PARENT"
"""Environment variable of the child: the number of its parent, and a file descriptor of the console's stderr."""
_LAUNCHERS = ("SLURM_STEP_", "OMPI_", "PMI_", "JOB_COMPLETION_INDEX", "WORLD_SIZE")
"""Beginnings of the environment variables that a launcher of several processes sets."""
_TPU_DEVICES = ("/dev/accel0", "/dev/vfio/0")

# What the child tells its parent on file descriptor 2.
_JOINING = "flowdit: joining "
_JOINED = "flowdit: joined"
_ENDED = "flowdit: ended with "

# Lines of the runtime that are kept back: its errors, their further lines, and stack traces.
_HELD = re.compile(
    r"[EFW]\d{4} .*(client\.h|coordination_|preemption_|distributed_|add_port)|\*\*\* Check failure|    @ +0x|RPC: /xla|\s*$"
    r"|\d+$|The (following )?tasks |Additional GRPC error|:[A-Z_]+:|=== Source Location|external/|# of tasks that reached|The first task at"
)
_KEPT_LINES = 400
_FATAL = "Terminating process because"

# What the runtime says, in words for users; the first that matches counts. {0} is its first group.
_WHILE_JOINING = (
    (r"Failed to add port", "mesh.coordinator: its port must be free on the host of the first process, {where}"),
    (
        r"Unexpected task registered with task=(\d+)",
        "mesh.process_id: the coordinator expects fewer processes, got {0}",
    ),
    (
        r"different incarnation|newer incarnation|already in error",
        "mesh.process_id: two processes have the same number, or one was started again before the others have ended",
    ),
    (
        r"DEADLINE_EXCEEDED|Deadline Exceeded|UNAVAILABLE",
        "mesh.init_timeout: not all processes have joined, {where}: one is missing, or the coordinator cannot "
        "be reached",
    ),
)
_WHILE_RUNNING = (
    (r"unhealthy \(stopped sending heartbeats\):\s*([\d\s,]+)", "lost process {0}: it is gone, stopped or unreachable"),
    (r"(\d+) unexpectedly tried to connect", "lost process {0}: it was started again"),
    (
        r"coordination service|CoordinationService",
        "lost process 0, the coordinator: it is gone, stopped or unreachable",
    ),
)


def is_needed(arguments: Iterable[str], environment: Mapping[str, str]) -> bool:
    """Whether the command may be one of several processes. The parent of a single one costs little."""
    if _PARENT in environment:
        return False
    return (
        any(argument.startswith(("mesh.", "--config")) for argument in arguments)
        or any(name.startswith(_LAUNCHERS) for name in environment)
        or is_tpu_host(environment)
    )


def is_tpu_host(environment: Mapping[str, str]) -> bool:
    """Whether this host has TPUs, and may be one of several."""
    has_devices = any(map(os.path.exists, _TPU_DEVICES)) and importlib.util.find_spec("libtpu") is not None
    return "TPU_WORKER_HOSTNAMES" in environment or has_devices


def supervise() -> NoReturn:
    """Run this command again in a child process, and exit with its status, or with `LOST` where the runtime aborts."""
    read, write = os.pipe()
    console = os.dup(2)
    child = subprocess.Popen(
        [sys.executable, *sys.orig_argv[1:]],
        env=os.environ | {_PARENT: f"{os.getpid()} {console}"},
        pass_fds=(console,),
        stderr=write,
        process_group=0,  # Ctrl-C reaches the child only through this process
    )
    os.close(write)
    report = _Report(read)
    _forward_signals(child, report)
    status = child.wait()
    report.finish()
    if status in (-signal.SIGABRT, -signal.SIGSEGV):  # the second, where the coordinator's port is taken
        status = report.explain_abort(status)
    elif status < 0:
        print(f"error: the process was ended by {signal.Signals(-status).name}", file=sys.stderr)
    os._exit(128 - status if status < 0 else status)


def _forward_signals(child: subprocess.Popen, report: _Report) -> None:
    """SIGTERM, Ctrl-C and Ctrl-Z. In a child that has joined others the first Ctrl-C is SIGTERM, the second kills."""
    interrupts = 0

    def forward(number: int, _frame: object) -> None:
        nonlocal interrupts
        if number == signal.SIGINT and report.has_joined:
            interrupts += 1
            number = signal.SIGTERM if interrupts == 1 else signal.SIGKILL
        with contextlib.suppress(ProcessLookupError):
            child.send_signal(signal.SIGSTOP if number == signal.SIGTSTP else number)
        if number == signal.SIGTSTP:
            os.kill(os.getpid(), signal.SIGSTOP)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTSTP, signal.SIGCONT):
        signal.signal(number, forward)


class _Report:
    """What C++ code of the child has written: passed on, but for the runtime's errors and the child's own marks."""

    def __init__(self, read: int):
        self._lines = collections.deque[str](maxlen=_KEPT_LINES)
        self._where = ""
        self.has_joined = False
        self._status: int | None = None
        self._reader = threading.Thread(target=self._read, args=(read,), daemon=True)
        self._reader.start()

    def finish(self) -> None:
        """Wait for the rest; processes that the child has started may keep the pipe open."""
        self._reader.join(timeout=1)

    def explain_abort(self, status: int) -> int:
        """Report the abort of the child in one line, and return the exit status; `status` is that of the child."""
        if self._status is not None:  # it was already leaving
            return self._status
        text = "\n".join(self._lines)
        # While running only the runtime's last words count: its earlier errors need not have ended anything.
        last = text[text.rfind(_FATAL) :] if _FATAL in text else ""
        for pattern, line in _WHILE_RUNNING if self.has_joined else _WHILE_JOINING:
            if found := re.search(pattern, last if self.has_joined else text):
                numbers = [", ".join(re.findall(r"\d+", group)) for group in found.groups()]
                print(f"error: {line.format(*numbers, where=self._where)}", file=sys.stderr)
                return LOST if self.has_joined else 2
        name = signal.Signals(-status).name
        print(*filter(None, [text, f"error: the process was ended by {name}"]), sep="\n", file=sys.stderr)
        return status

    def _read(self, read: int) -> None:
        with os.fdopen(read, errors="replace") as stream:
            for line in stream:
                if line.startswith(_JOINING):
                    self._where = line.removeprefix(_JOINING).strip()
                elif line.startswith(_JOINED):
                    self.has_joined = True
                elif line.startswith(_ENDED):
                    self._status = int(line.removeprefix(_ENDED))
                elif _HELD.match(line):
                    self._lines.append(line.rstrip())
                else:
                    sys.stderr.write(line)
                    sys.stderr.flush()


_is_child = False


def start_child() -> None:
    """In a supervised process, write to the console, and end with the parent. Must be called before other imports."""
    global _is_child
    if _PARENT not in os.environ:
        return
    _is_child = True
    parent, descriptor = map(int, os.environ.pop(_PARENT).split())
    sys.stderr = os.fdopen(descriptor, "w", buffering=1, errors="backslashreplace")
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        _end_without(parent)  # it may have ended before
    else:
        threading.Thread(target=_watch_parent, args=(parent,), daemon=True).start()


def _end_without(parent: int) -> None:
    if os.getppid() != parent:
        os._exit(128 + signal.SIGKILL)


def _watch_parent(parent: int) -> None:
    while True:
        time.sleep(1)
        _end_without(parent)


def joining(where: str) -> None:
    """Tell the parent that the processes are being joined; `where` says which, and how long."""
    _tell(f"{_JOINING}{where}")


def joined() -> None:
    """Tell the parent that all processes have been joined."""
    _tell(_JOINED)


def ended(status: int) -> None:
    """Tell the parent that this process is leaving with `status`, so that an abort from now on is of no interest."""
    _tell(f"{_ENDED}{status}")


def _tell(line: str) -> None:
    if _is_child:
        with contextlib.suppress(OSError):
            os.write(2, f"{line}\n".encode())
