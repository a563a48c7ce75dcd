"""The benchmarks are only imported here, not run, to check their imports and names."""

import importlib

import jax
import pytest
from hydra import compose, initialize_config_module

from benchmarks import data, data_formats, tpu
from benchmarks.__main__ import BENCHMARKS, LONG, main
from benchmarks.workload import EMBEDDED, EMBEDDED_LATENT, training
from flowdit.config import register_schemas, resolve
from flowdit.planning.config import PlanConfig


@pytest.mark.parametrize("name", BENCHMARKS + LONG)
def test_every_benchmark_can_be_imported(name):
    if name in ("parts", "train_step"):
        pytest.importorskip("torch", reason="needs torch")  # they compare with diffusers' class
    assert callable(importlib.import_module(f"benchmarks.{name}").measure)


@pytest.mark.parametrize("is_shuffled", [False, True], ids=data.ORDERS)
def test_every_format_of_data_holds_the_same_records(formats, is_shuffled):
    readers = [name for name in data_formats.READERS if "DataLoader" not in name]
    found = [data_formats.read_epoch(name, formats, 256, is_shuffled) for name in readers]
    assert len(readers) == 4
    assert {(epoch["records"], epoch["checksum"]) for epoch in found} == {
        (256, sum(i + 1000 * (i % 10) for i in range(256)))
    }


@pytest.fixture(scope="module")
def formats(tmp_path_factory):
    pytest.importorskip("torch", reason="needs torch")
    folder = tmp_path_factory.mktemp("formats")
    data_formats.write_all(folder, 256)
    return folder


def test_the_memory_of_a_reader_is_that_of_its_processes(formats):
    with data.Reader(".npy files, 4 threads", formats, 256) as reader:
        epoch = reader.read("shuffled")
    assert epoch.seconds > 0 and 30 < epoch.before <= epoch.peak < 2000


def test_the_training_step_that_they_measure_is_flowdits():
    workload = training(EMBEDDED, EMBEDDED_LATENT, batch_size=2)
    state, metrics = jax.eval_shape(workload.train_step, jax.eval_shape(workload.init), workload.batch)
    assert metrics["loss"].shape == () and state.step.shape == ()


PLAN = {
    "topology": "v5e:4x4",
    "mesh": {"data": 1, "fsdp": 16, "tensor": 1},
    "devices": 16,
    "batch_size": 512,
    "images_per_device": 32,
    "memory": {"parameters": 10**9, "activations and temporaries": 65 * 10**8},
    "image_flops": 7 * 10**11,
    "cycles": 32 * 11 * 10**6,
    "kernel_flops": 197 * 10**9 * 32,
    "kernels": {"tpu_custom_call": 1},
    "collectives": {"all-gather": {"count": 56, "bytes": 2 * 10**9, "seconds": 0.03}},
    "compute_seconds": 0.25,
    "communication_seconds": 0.05,
    "step_seconds": [0.25, 0.3],
    "utilisation": [0.4, 0.5],
    "compile_seconds": 61.2,
}


def test_the_row_of_a_plan():
    row = tpu.cells("v5e-fsdp16/1", PLAN, "dots")
    # Work of 32 x 0.7 TFLOP in 0.25 s at 197 TFLOP/s; the kernels' 0.197 TFLOP an image take 1 ms of 1500 M cycles/s.
    assert row[:7] == ["v5e-fsdp16/1", "v5e 4x4 fsdp=16", "dots", "11.00", "+ 1.50 at peak", "45.5%", "7.5"]
    assert row[7:] == ["all-gather 2.00", "50.0", "250 to 300", "40.0% to 50.0%", "61"]
    assert len(tpu.cells("v5e-one/1", PLAN | {"compute_seconds": None}, "dots")) == len(tpu.HEADER)
    failed = tpu.failed("v5e-one/1", tpu.ROWS["v5e-one"], "warning: x\nerror: topology: no\nmore\n")
    assert failed[3] == "failed: error: topology: no" and len(failed) == len(tpu.HEADER)


def test_the_plan_of_every_row_composes():
    register_schemas(PlanConfig)
    with initialize_config_module("flowdit.configs", version_base="1.3"):
        for name, stage in tpu.chosen_rows(()):
            arguments = tpu.command(tpu.ROWS[name], stage, ["model.remat=full"], "out")[3:]
            config = resolve(
                compose({1: "config", 2: "config_stage2"}[stage], [*arguments, "data.path=data"]), PlanConfig
            )
            assert (config.model.remat, config.train.gradient_accum) == ("full", 1)
            (topology,) = config.topologies()
            assert config.train.batch_size == tpu.IMAGES * topology.num_devices


@pytest.mark.parametrize("given", ["compile", "v5e-one/3", "v5e-one/"])
def test_an_unknown_row_is_an_error(given, monkeypatch, capsys):
    assert tpu.chosen_rows(["v5e-one/2", "model.remat=full"]) == [("v5e-one", 2)]
    monkeypatch.setattr("sys.argv", ["benchmarks", "tpu", given])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2 and f"got {given!r}" in capsys.readouterr().err
