"""Accelerators by the name of a topology, such as `v5e:4x4` or `h100:8`: published memory, links and clocks."""

from __future__ import annotations

import math
from typing import NamedTuple

from flowdit.fields import FieldError
from flowdit.hardware import GIGA, PEAKS, TERA

GIB = 2.0**30


class Tpu(NamedTuple):
    """A TPU generation. `link` is the bytes/s of one link between chips in one direction; each chip has two for each of
    the `dimensions` of the torus. A side is closed to a ring if it is a multiple of `ring`.
    """

    kind: str
    dimensions: int
    clock: float
    memory: float
    link: float
    ring: int


class Gpu(NamedTuple):
    """A GPU: memory in bytes, its bandwidth, and bytes/s to other GPUs in one direction, within a node of up to
    `NODE` GPUs and between nodes.
    """

    kind: str
    memory: float
    bandwidth: float
    link: float
    network: float


NODE = 8
"""GPUs of one node."""

# Memory: what a program can use by the compiler's message for one that is too large (libtpu 0.0.42.1). Google Cloud TPU
# documentation, "System architecture" of each version: dimensions of the torus, and the bidirectional bandwidth of a
# chip, here over its ports and directions: v5e 400 GB/s over 4 ports, v6e 800 over 4, v5p 1200 over 6. Clock: the
# published peak over the operations of the matrix units a cycle (v5e 4 units of 128 x 128, v5p 8 of them, v6e 4 times as
# many products as v5e). Sides of v5e and v6e are rings at 16 chips, those of v5p where the slice consists of whole cubes
# of 4 x 4 x 4. Not v4: for it the compiler treats the two halves of a chip as two devices, which is not how JAX runs it.
TPUS: dict[str, Tpu] = {
    "v5e": Tpu("TPU v5 lite", 2, 1.5 * GIGA, 15.75 * GIB, 50 * GIGA, 16),
    "v5p": Tpu("TPU v5", 3, 1.75 * GIGA, 95.74 * GIB, 100 * GIGA, 4),
    "v6e": Tpu("TPU v6 lite", 2, 1.75 * GIGA, 31.25 * GIB, 100 * GIGA, 16),
}

# NVIDIA's data sheets: memory, its bandwidth, and NVLink (half of the published sum of both directions) or PCIe. Between
# nodes, the network adapter of NVIDIA's DGX systems for each GPU: 200 Gbit/s with A100, 400 with H100, H200 and B200.
# L40S and RTX 4090 are in no such system: 200 and 100 Gbit/s are assumptions.
GPUS: dict[str, Gpu] = {
    "a100-40gb": Gpu("NVIDIA A100-SXM4-40GB", 40 * GIGA, 1555 * GIGA, 300 * GIGA, 25 * GIGA),
    "a100-80gb": Gpu("NVIDIA A100-SXM4-80GB", 80 * GIGA, 2039 * GIGA, 300 * GIGA, 25 * GIGA),
    "h100": Gpu("NVIDIA H100 80GB HBM3", 80 * GIGA, 3350 * GIGA, 450 * GIGA, 50 * GIGA),
    "h200": Gpu("NVIDIA H200", 141 * GIGA, 4800 * GIGA, 450 * GIGA, 50 * GIGA),
    "b200": Gpu("NVIDIA B200", 180 * GIGA, 8000 * GIGA, 900 * GIGA, 50 * GIGA),
    "l40s": Gpu("NVIDIA L40S", 48 * GIGA, 864 * GIGA, 32 * GIGA, 25 * GIGA),
    "rtx4090": Gpu("NVIDIA GeForce RTX 4090", 24 * GIGA, 1008 * GIGA, 32 * GIGA, 12.5 * GIGA),
}


class Topology(NamedTuple):
    """Machines of one kind: `sides` of the torus of TPU chips, or the number of GPUs."""

    name: str
    machine: Tpu | Gpu
    sides: tuple[int, ...]

    @property
    def num_devices(self) -> int:
        """Devices as JAX sees them."""
        return math.prod(self.sides)

    @property
    def is_tpu(self) -> bool:
        return isinstance(self.machine, Tpu)

    def peak(self, dtype: str) -> float:
        """Published FLOP/s of a device in matrix products of `dtype`."""
        bfloat16, float32 = PEAKS[self.machine.kind]
        peak = bfloat16 if dtype == "bfloat16" else float32
        assert peak is not None
        return peak * TERA


def parse_topology(name: str) -> Topology:
    """A topology from its name. Raises `FieldError` that lists the known machines."""
    machine, _, shape = name.lower().partition(":")
    if machine in TPUS:
        return _tpu(name, TPUS[machine], machine, shape)
    if machine in GPUS:
        if not shape.isdigit() or int(shape) < 1:
            raise FieldError("topology", f"must have a number of GPUs, as in {machine}:8, got {name}")
        return Topology(f"{machine}:{shape}", GPUS[machine], (int(shape),))
    known = ", ".join([f"{tpu}:<sides>" for tpu in TPUS] + [f"{gpu}:<number>" for gpu in GPUS])
    raise FieldError("topology", f"must be one of {known}, such as v5e:4x4, v5p:2x2x1 or h100:8, got {name}")


def _tpu(name: str, tpu: Tpu, machine: str, shape: str) -> Topology:
    sides = shape.split("x")
    example = "x".join("2222"[: tpu.dimensions])
    rule = f"must have the {tpu.dimensions} sides of a slice, as in {machine}:{example}, or 1 for one device"
    if sides == ["1"]:
        sides = ["1"] * tpu.dimensions
    if len(sides) != tpu.dimensions or not all(side.isdigit() and int(side) >= 1 for side in sides):
        raise FieldError("topology", f"{rule}, got {name}")
    return Topology(f"{machine}:{shape}", tpu, tuple(int(side) for side in sides))
