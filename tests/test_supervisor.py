"""The parent of one of several processes: what it passes on, and what it makes of an abort."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import REPOSITORY

from flowdit.supervisor import is_needed

COMMAND = """
import os, sys, time
from flowdit import supervisor
if supervisor.is_needed(["mesh.coordinator=a:1"], os.environ):
    supervisor.supervise()
supervisor.start_child()
def write(text): os.write(2, text.encode() + b"\\n")
"""
FATAL = "F1129 15:21:07.053978   25991 client.h:80] Terminating process because the JAX distributed service detected"
HEARTBEAT = f"{FATAL} fatal errors. absl::Status: UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n1\n2\nThe tasks have crashed."
COORDINATOR = (
    f"{FATAL} errors. UNAVAILABLE: Failed to send RPC to coordination service. Either the leader task\n    @ 0x7f07 x()"
)
NOT_ALL = (
    f"{FATAL} fatal errors. absl::Status: DEADLINE_EXCEEDED: Deadline Exceeded\n\nRPC: /xla.coordination/RegisterTask"
)


def start(body: str) -> subprocess.Popen[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "FLOWDIT_PARENT"}
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND + body],
        env=inherited | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("body", "status", "err"),
    [
        ("print('a line', file=sys.stderr); write('from C++'); sys.exit(3)", 3, {"a line", "from C++"}),
        # Lines of the runtime are not shown if the command has ended by itself.
        (f"write({FATAL!r}); print('error: mine', file=sys.stderr); sys.exit(2)", 2, {"error: mine"}),
        (
            f"supervisor.joined(); write({HEARTBEAT!r}); os.abort()",
            75,
            {"error: lost process 1, 2: it is gone, stopped or unreachable"},
        ),
        (
            f"supervisor.joined(); write({COORDINATOR!r}); os.abort()",
            75,
            {"error: lost process 0, the coordinator: it is gone, stopped or unreachable"},
        ),
        (
            f"supervisor.joining('process 1 of 2 at a:1, after 9 s'); write({NOT_ALL!r}); os.abort()",
            2,
            {
                "error: mesh.init_timeout: not all processes have joined, process 1 of 2 at a:1, after 9 s: one is "
                "missing, or the coordinator cannot be reached"
            },
        ),
        (
            "supervisor.joining('process 0 of 2 at a:1, after 9 s'); write('E1129 1 add_port.cc:83] Failed to add port'); "
            "os.kill(os.getpid(), 11)",
            2,
            {
                "error: mesh.coordinator: its port must be free on the host of the first process, "
                "process 0 of 2 at a:1, after 9 s"
            },
        ),
        # An error of the runtime that has not ended anything, long before another end.
        (
            "supervisor.joined(); write('E1129 1 coordination_service_agent.cc:1] coordination service'); os.abort()",
            134,
            {
                "E1129 1 coordination_service_agent.cc:1] coordination service",
                "error: the process was ended by SIGABRT",
            },
        ),
        # An end that is not the runtime's: nothing is hidden.
        (
            "write('E1129 1 client.h:1] odd'); os.abort()",
            134,
            {"E1129 1 client.h:1] odd", "error: the process was ended by SIGABRT"},
        ),
        (f"supervisor.joined(); supervisor.ended(0); write({COORDINATOR!r}); os.abort()", 0, set()),
        ("os.kill(os.getpid(), 9)", 137, {"error: the process was ended by SIGKILL"}),
    ],
)
def test_an_end_is_one_line_and_a_status(body, status, err):
    process = start(body)
    _, written = process.communicate(timeout=60)
    assert (process.returncode, set(written.splitlines())) == (status, err)


def test_signals_reach_the_child_and_it_ends_with_its_parent():
    body = """
import signal
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, _: print(signal.Signals(number).name, flush=True))
print(os.getpid(), flush=True)
while True:
    time.sleep(0.05)
"""
    process = start(body)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    for number in (signal.SIGTERM, signal.SIGINT):
        process.send_signal(number)
        assert process.stdout.readline() == f"{number.name}\n"
    process.send_signal(signal.SIGTSTP)
    wait_for(lambda: state(child) == state(process.pid) == "T")
    process.send_signal(signal.SIGCONT)
    wait_for(lambda: "T" not in (state(child), state(process.pid)))
    process.kill()
    process.wait()
    wait_for(lambda: state(child) in ("", "Z"))


def state(number: int) -> str:
    """Of a process: "S", "T" (stopped), "Z" (ended, but not waited for), ...; empty if there is none."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_among_others_a_second_interrupt_kills():
    process = start(
        "supervisor.joined(); import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    time.sleep(1)  # two at once are one
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 137


@pytest.mark.parametrize(
    ("arguments", "environment", "expected"),
    [
        (["data.path=x"], {}, False),
        (["mesh.fsdp=2"], {}, True),
        ([], {"SLURM_STEP_NODELIST": "a"}, True),
        ([], {"SLURM_JOB_ID": "1"}, False),
        ([], {"WORLD_SIZE": "2"}, True),
        (["--config-dir=x"], {}, True),
        (["mesh.fsdp=2"], {"FLOWDIT_PARENT": "1 5"}, False),
    ],
)
def test_who_gets_a_parent(arguments, environment, expected):
    assert is_needed(arguments, environment) is expected
