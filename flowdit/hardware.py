"""Peak FLOP/s of accelerators, by JAX's device names, and what estimates need to know of the devices."""

from __future__ import annotations

import contextlib
import ctypes
import glob
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax

GIGA, TERA = 1e9, 1e12

# Published peaks in TFLOP/s of one JAX device: dense matrix products (not NVIDIA's doubled figures "with sparsity") of
# bfloat16, and of float32 at JAX's default precision: TF32 on NVIDIA from Ampere on, bfloat16 on TPUs. None if the
# device has no such units.
PEAKS: dict[str, tuple[float | None, float | None]] = {
    # NVIDIA A100 Tensor Core GPU data sheet.
    "NVIDIA A100-SXM4-40GB": (312, 156),
    "NVIDIA A100-SXM4-80GB": (312, 156),
    "NVIDIA A100-PCIE-40GB": (312, 156),
    "NVIDIA A100 80GB PCIe": (312, 156),
    # NVIDIA H100 Tensor Core GPU Architecture, white paper, table 2; H100 and H200 data sheets (NVL: half of those
    # with sparsity).
    "NVIDIA H100 80GB HBM3": (989.4, 494.7),
    "NVIDIA H100 PCIe": (756, 378),
    "NVIDIA H100 NVL": (835.5, 417.5),
    "NVIDIA H200": (989.4, 494.7),
    "NVIDIA H200 NVL": (835.5, 417.5),
    "NVIDIA GH200 480GB": (989.4, 494.7),
    # NVIDIA Blackwell data sheet, "Individual Blackwell GPU specifications", half of those with sparsity.
    "NVIDIA B200": (2250, 1100),
    "NVIDIA GB200": (2500, 1250),
    # Data sheets of each card.
    "NVIDIA A10": (125, 62.5),
    "NVIDIA A10G": (70, 35),
    "NVIDIA A40": (149.7, 74.8),
    "NVIDIA L4": (121, 60),
    "NVIDIA L40": (181, 90.5),
    "NVIDIA L40S": (362, 183),
    # White papers of the GA102, Ada and RTX Blackwell architectures, bfloat16 with float32 accumulation.
    "NVIDIA GeForce RTX 3090": (71, 35.6),
    "NVIDIA GeForce RTX 4090": (165.2, 82.6),
    "NVIDIA GeForce RTX 5090": (209.5, 104.8),
    # NVIDIA V100 data sheet. Its tensor cores only support float16.
    "Tesla V100-SXM2-16GB": (None, 15.7),
    "Tesla V100-SXM2-32GB": (None, 15.7),
    "Tesla V100-PCIE-16GB": (None, 14),
    "Tesla V100-PCIE-32GB": (None, 14),
    # Google Cloud TPU documentation, "System architecture" of each version.
    "TPU v4": (275, 275),
    "TPU v5 lite": (197, 197),
    "TPU v5e": (197, 197),
    "TPU v5": (459, 459),
    "TPU v5p": (459, 459),
    "TPU v6 lite": (918, 918),
    "TPU v6e": (918, 918),
    "TPU7x": (2307 / 2, 2307 / 2),  # JAX sees each chip as two devices
}


def peak_flops(device: Any, dtype: str) -> float | None:
    """Published peak FLOP/s of a `jax.Device` for matrix products of `dtype`; None if unknown."""
    bfloat16, float32 = PEAKS.get(device.device_kind, (None, None))
    peak = {"bfloat16": bfloat16, "float32": float32}.get(dtype)
    return None if peak is None else peak * TERA


UTILISATION = 0.2
"""Share of an accelerator's peak that training of small models is assumed to reach."""
UNKNOWN_PEAK = 50 * TERA
UNKNOWN_MEMORY = 16e9
"""Assumed for an accelerator that does not say, in FLOP/s and bytes."""
CPU_CORE_FLOPS = 20e9
"""FLOP/s of a core in training of small models; measured on two cores of a Xeon with AVX-512."""
MOST_CORES = 8
"""Small models gain little from more cores."""


class Machine(NamedTuple):
    """The devices of this run. `memory` is in bytes, of one device; `flops` is what all devices reach in training."""

    kind: str
    is_accelerator: bool
    num_devices: int
    memory: float
    flops: float


def this_machine() -> Machine:
    """What JAX runs on."""
    device, count = jax.devices()[0], jax.device_count()
    if device.platform == "cpu":
        memory = _host_memory()
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return Machine(f"{cores} CPU cores", False, count, memory / count, CPU_CORE_FLOPS * min(cores, MOST_CORES))
    memory = (device.memory_stats() or {}).get("bytes_limit", UNKNOWN_MEMORY)
    peak = peak_flops(device, "bfloat16") or UNKNOWN_PEAK
    return Machine(f"{count} x {device.device_kind}", True, count, memory, UTILISATION * peak * count)


MEMORY_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where a container finds its limit, in bytes or as "max": of the second and of the first version of control groups."""


def _host_memory() -> int:
    """Bytes that the container, or else the machine, has."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in MEMORY_LIMITS:
        with contextlib.suppress(OSError, ValueError):
            memory = min(memory, int(Path(file).read_text()))
    return memory


MALLOC_SETTINGS = {-1: -1, -4: 0, -8: 1}
"""Parameters of glibc's `mallopt`: no trimming (M_TRIM_THRESHOLD), no mappings (M_MMAP_MAX), one arena (M_ARENA_MAX)."""
ACCELERATOR_FILES = ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/accel*", "/dev/vfio/[0-9]*")
"""Device files of NVIDIA's and AMD's GPUs and of TPUs."""
ENOUGH_TO_KEEP = 12 * 2**30


def keep_freed_memory() -> None:
    """Let the C library of Linux keep freed memory for the next allocation, on machines without an accelerator.

    XLA for CPUs allocates its buffers anew in each step. Large ones would come from the system and go back to it, which
    takes a fifth of a small model's step in page faults. The price is memory, up to twice as much, so machines with
    little of it are left alone, and so are settings of the user's own (`MALLOC_*` of the environment). Must be called
    before JAX starts its threads, so JAX cannot be asked for its devices: their files in /dev are looked for.
    """
    if sys.platform != "linux" or any(glob.glob(pattern) for pattern in ACCELERATOR_FILES):
        return
    if _host_memory() < ENOUGH_TO_KEEP or any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # not glibc
        return
    for parameter, value in MALLOC_SETTINGS.items():
        mallopt(parameter, value)
