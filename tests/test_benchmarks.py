"""The benchmarks are only imported here, not run, to check their imports and names."""

import importlib

import jax
import pytest

from benchmarks.__main__ import BENCHMARKS, LONG
from benchmarks.workload import EMBEDDED, EMBEDDED_LATENT, training


@pytest.mark.parametrize("name", BENCHMARKS + LONG)
def test_every_benchmark_can_be_imported(name):
    if name in ("parts", "train_step"):
        pytest.importorskip("torch", reason="needs torch")  # they compare with diffusers' class
    assert callable(importlib.import_module(f"benchmarks.{name}").measure)


def test_the_training_step_that_they_measure_is_flowdits():
    workload = training(EMBEDDED, EMBEDDED_LATENT, batch_size=2)
    state, metrics = jax.eval_shape(workload.train_step, jax.eval_shape(workload.init), workload.batch)
    assert metrics["loss"].shape == () and state.step.shape == ()
