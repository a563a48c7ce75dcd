"""Published peak FLOP/s by device name."""

from types import SimpleNamespace

import jax
import pytest

from flowdit.hardware import PEAKS, peak_flops


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
