"""Published peak FLOP/s by device name."""

import ctypes
import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest

from flowdit import hardware
from flowdit.hardware import PEAKS, keep_freed_memory, peak_flops


@pytest.mark.parametrize(
    ("kind", "dtype", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4e12),
        ("NVIDIA A100-SXM4-40GB", "float32", 156e12),
        ("TPU v5 lite", "bfloat16", 197e12),
        ("TPU v5", "bfloat16", 459e12),
        ("Tesla V100-SXM2-16GB", "bfloat16", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bfloat16", None),  # a seventh of the GPU
        ("NVIDIA H100 80GB HBM3", "float16", None),
    ],
)
def test_peak(kind, dtype, expected):
    assert peak_flops(SimpleNamespace(device_kind=kind), dtype) == expected


def test_a_cpu_has_no_published_peak():
    assert peak_flops(jax.devices()[0], "float32") is None


def test_float32_is_never_faster_than_bfloat16():
    assert all(float32 and float32 <= (bfloat16 or float32) for bfloat16, float32 in PEAKS.values())


FAULTS = """
import resource
import numpy as np
from flowdit import hardware
hardware.ACCELERATOR_FILES, hardware.ENOUGH_TO_KEEP = (), 0
{call}
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.full(2**27, 1, np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
first, second = faults(), faults()
print(second / first)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="an option of glibc")
def test_freed_memory_is_used_again_without_page_faults():
    def again(call: str) -> float:
        command = [sys.executable, "-c", FAULTS.format(call=call)]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
        finished = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        return float(finished.stdout)

    assert again("hardware.keep_freed_memory()") < 0.1
    assert again("") > 0.5


@pytest.fixture
def mallopt(monkeypatch, tmp_path):
    """The calls of a C library that only records them, on a Linux machine with 16 GiB and without an accelerator."""
    calls = {}
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=calls.__setitem__))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 2**12, "SC_PHYS_PAGES": 2**22}.__getitem__)
    monkeypatch.setattr(hardware, "ACCELERATOR_FILES", (f"{tmp_path}/nvidia[0-9]*",))
    monkeypatch.setattr(hardware, "MEMORY_LIMITS", (f"{tmp_path}/memory.max", f"{tmp_path}/limit_in_bytes"))
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    return calls


@pytest.mark.parametrize("files", [{}, {"nvidiactl": ""}, {"memory.max": "max\n"}, {"limit_in_bytes": f"{2**63 - 1}"}])
def test_freed_memory_is_kept_where_there_is_enough(mallopt, tmp_path, files):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    keep_freed_memory()
    assert mallopt == hardware.MALLOC_SETTINGS


@pytest.mark.parametrize(
    "files", [{"nvidia0": ""}, {"memory.max": f"{8 * 2**30}\n"}, {"limit_in_bytes": f"{8 * 2**30}\n"}]
)
def test_freed_memory_is_not_kept_beside_an_accelerator_or_in_a_small_container(mallopt, tmp_path, files):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    keep_freed_memory()
    assert not mallopt


def test_freed_memory_is_not_kept_on_a_small_machine(mallopt, monkeypatch):
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 2**12, "SC_PHYS_PAGES": 2**21}.__getitem__)
    keep_freed_memory()
    assert not mallopt


def test_the_users_own_settings_of_the_c_library_stand(mallopt, monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    keep_freed_memory()
    assert not mallopt
