"""What the TPU compiler says of the training step of XL/2: cycles, memory and collectives. No TPU is needed.

Nothing is run, so the figures have no noise: they show whether a change made the step faster. 256 tokens of latents
4x32x32, 32 images a device, bfloat16; stage 2 with 120 text tokens of width 2304. Each row is a call of `flowdit.plan`
in its own process.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.timing import table
from flowdit.hardware import GIGA
from flowdit.planning.machines import parse_topology

IMAGES = 32
STAGES = {1: "imagenet256_xl2", 2: "pixart_alpha_256"}


class Row(NamedTuple):
    """A topology, the settings of the mesh, and what the backward pass keeps."""

    topology: str
    mesh: str = ""
    remat: str = "lean"


ROWS = {
    "v5e-one": Row("v5e:1", remat="full"),
    "v5e-data": Row("v5e:4x4", remat="full"),
    "v5e-fsdp16": Row("v5e:4x4", "mesh.fsdp=16"),
    "v5e-hybrid": Row("v5e:4x4", "mesh.data=4 mesh.fsdp=4"),
    "v5e-tensor2": Row("v5e:4x4", "mesh.tensor=2 mesh.fsdp=8"),
    "v5p-fsdp4": Row("v5p:2x2x1", "mesh.fsdp=4"),
    "v6e-fsdp4": Row("v6e:2x2", "mesh.fsdp=4"),
}
HEADER = [
    *("row", "machine", "remat", "M cycles an image", "in kernels", "of peak", "GB", "collectives, GB"),
    *("communication, ms", "step, ms", "of peak with it", "compile, s"),
]


def command(row: Row, stage: int, settings: list[str], out: str) -> list[str]:
    """The plan of a row: its own settings, and those given, which take precedence."""
    devices = parse_topology(row.topology).num_devices
    own = [f"experiment={STAGES[stage]}", f"topology={row.topology}", *row.mesh.split(), f"model.remat={row.remat}"]
    own += [f"train.batch_size={IMAGES * devices}", "train.gradient_accum=1", "shape.latent=[4,32,32]", f"out={out}"]
    given = {setting.partition("=")[0] for setting in settings}
    own = [setting for setting in own if setting.partition("=")[0] not in given]
    return [sys.executable, "-m", "flowdit.plan", *own, *settings]


def cells(name: str, found: dict[str, Any], remat: str) -> list[str]:
    """A row of the table from a plan's JSON."""
    topology = parse_topology(found["topology"])
    mesh = " ".join(f"{axis}={size}" for axis, size in found["mesh"].items() if size > 1)
    machine = f"{found['topology'].replace(':', ' ')} {mesh}".strip()
    memory = f"{sum(found['memory'].values()) / GIGA:.1f}"
    if found["compute_seconds"] is None:
        return [name, machine, remat, "does not fit", "", "", memory, "", "", "", "", f"{found['compile_seconds']:.0f}"]
    images, peak = found["batch_size"] / found["devices"], topology.peak("bfloat16")
    share = found["image_flops"] * found["batch_size"] / found["devices"] / peak / found["compute_seconds"]
    kernels = found["kernel_flops"] / peak * topology.machine.clock / images  # type: ignore[union-attr]
    collectives = [f"{kind} {each['bytes'] / GIGA:.2f}" for kind, each in found["collectives"].items()]
    step, utilisation = found["step_seconds"], found["utilisation"]
    return [
        name,
        machine,
        remat,
        f"{found['cycles'] / images / 1e6:.2f}",
        f"+ {kernels / 1e6:.2f} at peak" if kernels else "none",
        f"{share:.1%}",
        memory,
        ", ".join(collectives) or "none",
        f"{found['communication_seconds'] * 1e3:.1f}",
        " to ".join(dict.fromkeys(f"{seconds * 1e3:.0f}" for seconds in step)),
        " to ".join(dict.fromkeys(f"{value:.1%}" for value in utilisation)),
        f"{found['compile_seconds']:.0f}",
    ]


def failed(name: str, row: Row, errors: str) -> list[str]:
    """A row of the table from what a plan that failed has printed on stderr: its first line that is an error."""
    lines = [line for line in errors.splitlines() if line.strip()] or ["no message"]
    reason = next((line for line in lines if line.startswith("error: ")), lines[-1])
    return [name, f"{row.topology} {row.mesh}".strip(), row.remat, f"failed: {reason}", *[""] * (len(HEADER) - 4)]


def chosen_rows(arguments: Sequence[str]) -> list[tuple[str, int]]:
    """Names and stages of the rows among `arguments`, or all. Raises `ValueError` for an argument that is none."""
    chosen = [argument for argument in arguments if "=" not in argument] or list(ROWS)
    found = []
    for given in chosen:
        rows = [(name, stage) for name in ROWS for stage in STAGES if given in (name, f"{name}/{stage}")]
        if not rows:
            raise ValueError(f"row: must be one of {', '.join(ROWS)}, with /1 or /2 for one stage, got {given!r}")
        found += rows
    return found


def check(arguments: Sequence[str]) -> None:
    """Raise `ValueError` for an argument that is neither a row nor a setting."""
    chosen_rows(arguments)


def measure(*arguments: str) -> str:
    """The table, of the rows among `arguments` (`v5e-fsdp16`, for one stage `v5e-fsdp16/2`) or all."""
    settings = [argument for argument in arguments if "=" in argument]
    found, versions = [], "no plan was made"
    for name, stage in chosen_rows(arguments):
        row, title = ROWS[name], f"{name}/{stage}"
        with tempfile.TemporaryDirectory() as folder:
            planned = subprocess.run(command(row, stage, settings, folder), capture_output=True, text=True)
            if planned.returncode == 0:
                content = json.loads((Path(folder) / "plan.json").read_text())
                versions = content["versions"]
                line = cells(title, content["plans"][0], content["settings"]["model"]["remat"])
            else:
                line = failed(title, row, planned.stderr)
        print(" | ".join(line), flush=True)
        found.append(line)
    return f"{versions}\n\n{table(HEADER, found)}"
