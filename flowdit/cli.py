"""`flowdit train-stage1 | prepare | verify | inspect | sample | serve | evaluate | report ...`: one console command beside the modules.

This module imports only the standard library: JAX and the others take seconds to import, and a signal in that time must
already end in a line.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys

from flowdit import supervisor

COMMANDS = {
    "train-stage1": ("flowdit.train", "stage1", "train a class-conditional or unconditional model"),
    "train-stage2": ("flowdit.train", "stage2", "train a text-conditional model"),
    "prepare": ("flowdit.prepare", "main", "turn a folder of images into a data set of latents"),
    "verify": ("flowdit.verify", "main", "check a data set against its manifest"),
    "inspect": ("flowdit.inspect", "main", "write an HTML page about a data set"),
    "sample": ("flowdit.sample", "main", "sample images from a trained model"),
    "evaluate": ("flowdit.evaluate", "main", "score a trained model against real images"),
    "serve": ("flowdit.serve", "main", "open a page in the browser to try a trained model"),
    "plan": ("flowdit.plan", "main", "say what a training run costs on machines that are not there"),
    "report": ("flowdit.report", "main", "write an HTML page about a training run, or several"),
    "convert": ("flowdit.convert", "main", "convert a model between formats"),
}
"""Module, function and summary of every command."""
SEVERAL_PROCESSES = ("train-stage1", "train-stage2", "sample", "evaluate")
"""Commands that may run as several processes."""


def main() -> None:
    """Run the command named by the first argument."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("--help", "-h", "help"):
        print(usage())
    elif name not in COMMANDS:
        print(f"error: flowdit: must be followed by one of {', '.join(COMMANDS)}, got {name!r}", file=sys.stderr)
        sys.exit(2)
    else:
        sys.argv[:2] = [f"{sys.argv[0]} {name}"]
        run(name)


def usage() -> str:
    """The commands with their summaries."""
    lines = [f"  {name:<14}{summary}" for name, (_, _, summary) in COMMANDS.items()]
    return "\n".join(
        ["usage: flowdit <command> [key=value ...]", "", *lines, "", "flowdit <command> --help lists its settings."]
    )


def run(name: str) -> None:
    """Import the module of a command, and run it with the arguments in `sys.argv`."""
    start(name)
    module, function, _ = COMMANDS[name]
    getattr(importlib.import_module(module), function)()


def start(name: str) -> None:
    """What a command does before its imports: give a process that may be one of several its parent, watch for signals."""
    if name in SEVERAL_PROCESSES and supervisor.is_needed(sys.argv[1:], os.environ):
        supervisor.supervise()
    supervisor.start_child()
    watch_for_signals(name)


def watch_for_signals(name: str) -> None:
    """Until the command handles signals itself, end with a line on SIGTERM or Ctrl-C.

    At once, as an exception within an import may be caught by the imported library.
    """

    def end(number: int, _frame: object) -> None:
        line = f"{signal_name(number)} received while starting: {name} has ended, nothing was written\n"
        os.write(2, line.encode())
        os._exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)


def signal_name(number: int) -> str:
    """The name of a signal for users."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
