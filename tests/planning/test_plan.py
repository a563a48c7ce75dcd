"""`python -m flowdit.plan`: a real plan of a tiny model, estimates for GPUs, and errors in one line."""

import dataclasses
import importlib.util
import json

import jax
import pytest
from PIL import Image
from runs import call, error_line

from benchmarks.sizes import BYTES_PER_PARAMETER
from flowdit.diffusion.auxiliary.repa import Repa
from flowdit.models import attention
from flowdit.models.attention import AttentionShape
from flowdit.plan import main
from flowdit.planning import compilation, gpu, planner
from flowdit.planning.config import PlanConfig
from flowdit.planning.cost import Collective
from flowdit.planning.data import PlannedData, planned_data
from flowdit.planning.machines import GIB, parse_topology
from flowdit.planning.planner import Plan

TINY = ("experiment=tiny", "model.depth=1", "shape.latent=[4,8,8]", "shape.classes=10")
has_libtpu = importlib.util.find_spec("libtpu") is not None
needs_libtpu = pytest.mark.skipif(not has_libtpu, reason="needs the TPU compiler")


def planned(tmp_path, *overrides):
    finished = call(main, f"out={tmp_path}", *overrides)
    assert (finished.status, finished.err) == (0, ""), finished.err
    return finished, json.loads((tmp_path / "plan.json").read_text())


@needs_libtpu
def test_a_tiny_model_on_a_tpu(tmp_path):
    finished, content = planned(tmp_path, *TINY, "topology=v5e:1", "train.num_steps=3600", "price_per_device_hour=2")
    (plan,) = content["plans"]
    assert plan["fits"] and not plan["is_estimate"] and plan["collectives"] == {}
    assert plan["cycles"] > 0 and plan["unknown_loops"] == 0
    low, high = plan["step_seconds"]
    assert low == high == pytest.approx(plan["cycles"] / 1.5e9)
    assert plan["price"] == [pytest.approx(2 * low)] * 2  # 3600 steps take `low` hours
    # Float32: the model, its average, two moments and counters.
    parameters, ema, optimizer = (plan["memory"][part] for part in ("parameters", "EMA", "optimizer"))
    assert parameters == ema and 2 * parameters <= optimizer < 2 * parameters + 100
    assert plan["memory"]["batch"] == 8 * (4 * 8 * 8 * 4 + 4)
    assert plan["image_flops"] * 8 / low / 197e12 == pytest.approx(plan["utilisation"][0])
    assert "libtpu" in content["versions"] and content["settings"]["model"]["depth"] == 1
    assert "assumptions:" in finished.out and "fits" in finished.out
    assert not (tmp_path / "plan.png").exists()


def test_several_gpus_are_estimated_and_drawn(tmp_path):
    overrides = ("experiment=tiny_text", "topology=[h100:4,a100-80gb:8]", "mesh.fsdp=4", "shape.latent=[4,8,8]")
    _, content = planned(tmp_path, *overrides)
    four, eight = content["plans"]
    assert four["is_estimate"] and four["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1}
    assert four["collectives"].keys() == {"all-gather", "reduce-scatter"}
    assert eight["collectives"].keys() == {"all-gather", "reduce-scatter", "all-reduce"}
    assert four["step_seconds"][0] < four["step_seconds"][1]
    assert four["memory"]["parameters"] == eight["memory"]["parameters"]
    assert any("32 text tokens of 256" in line for line in content["assumptions"])
    with Image.open(tmp_path / "plan.png") as chart:
        assert chart.size[0] > 1000


def estimated(topology: str = "h100:1", depth: int = 2, **changes) -> tuple[PlanConfig, PlannedData, compilation.Step]:
    """A model of width 64 and four heads on 64 tokens in bfloat16, without a data set, on absent GPUs."""
    config = PlanConfig()
    config.data.path, config.shape.latent = "", [4, 16, 16]
    sizes = {"depth": depth, "hidden_dim": 64, "num_heads": 4, "patch_size": 2}
    config.model = dataclasses.replace(config.model, **sizes | changes.pop("model", {}))
    config.train = dataclasses.replace(
        config.train, compute_dtype="bfloat16", batch_size=16, **changes.pop("train", {})
    )
    config.optim = dataclasses.replace(config.optim, **changes.pop("optim", {}))
    config.auxiliary = config.auxiliary | changes.pop("auxiliary", {})
    config.mesh = dataclasses.replace(config.mesh, **changes)
    data = planned_data(config)
    devices = gpu.absent_gpus(parse_topology(topology))
    return config, data, compilation.build_step(config, data, devices, gpu.traced_compute(config))


def memory(**changes) -> dict[str, int]:
    return gpu.estimated_memory(*estimated(**changes))


def test_estimated_memory_of_a_gpu():
    kept = [
        memory(model={"remat": remat})["activations and temporaries"] for remat in ("none", "names", "lean", "full")
    ]
    assert kept == sorted(set(kept), reverse=True)
    # Each further block keeps what it starts from, 64 tokens of width 64 in bfloat16 of 16 images, and its weights cast.
    few, many = (memory(depth=depth, model={"remat": "full"}) for depth in (2, 6))
    weights = (many["parameters"] - few["parameters"]) // 2
    more = many["activations and temporaries"] - few["activations and temporaries"]
    assert more == pytest.approx(4 * 16 * 64 * 64 * 2 + weights, rel=0.01)
    # Bytes of a parameter: four states in float32, gradients in both dtypes, the cast; the check of a GPU spares 2.
    assert many["gradients"] == many["parameters"] * 6 // 4
    assert BYTES_PER_PARAMETER - 2 == 4 * 4 + 6 + 2


def test_feature_maps_and_their_projector_are_counted():
    repa = {"repa": Repa(weight=0.5, width=32)}
    (config, data, step), (*_, plain) = estimated(auxiliary=repa), estimated()
    assert data.assumptions[-1] == "feature maps: 16x16x768, assumed"
    parameters = [sum(leaf.size for leaf in jax.tree.leaves(s.state.parameters)) for s in (step, plain)]
    assert parameters[0] - parameters[1] == (64 + 1) * 32 + (32 + 1) * 32 + (32 + 1) * 768
    assert (step.batch["feature_map"].shape, step.batch["feature_map"].dtype) == ((16, 16, 16, 768), jax.numpy.float16)
    assert gpu.compute_seconds(config, step, parse_topology("h100:1")) > gpu.compute_seconds(
        config, plain, parse_topology("h100:1")
    )


def test_muon_keeps_one_moment_of_the_matrices_of_the_blocks():
    adamw, muon = memory(), memory(optim={"name": "muon"})
    matrices = 4 * 2 * (4 + 8 + 6) * 64 * 64  # float32, two blocks: attention, MLP and modulation
    assert adamw["optimizer"] - muon["optimizer"] == pytest.approx(matrices, abs=100)  # but for the counters


@pytest.mark.parametrize(
    ("mesh", "exchanges"),
    [
        ({"data": 2, "fsdp": 4}, [("all-to-all", 8, "{{0,1,2,3}}", 2), ("all-gather", 4, "{{0,4}}", 1)]),
        (
            {"data": 2, "fsdp": 2, "tensor": 2},
            [
                ("all-gather", 2, "{{0,1}}", 1),  # momenta
                ("all-to-all", 8, "{{0,2}}", 2),
                ("all-gather", 2, "{{0,1,4,5}}", 1),  # results
            ],
        ),
    ],
    ids=str,
)
def test_muons_iterations_and_exchanges_are_in_the_estimates(mesh, exchanges):
    muon = estimated("h100:8", **mesh, optim={"name": "muon"})
    adamw, topology = estimated("h100:8", **mesh), parse_topology("h100:8")
    seconds = [gpu.compute_seconds(each[0], each[2], topology) for each in (muon, adamw)]
    flops = 2 * 5 * (10 * 6 + 2 * 18) * 64**3  # two blocks: ten square matrices, and two four times as wide
    rate = muon[0].utilisation * topology.peak("bfloat16")
    assert seconds[0] - seconds[1] == pytest.approx(flops / 8 / rate, rel=1e-3)
    added = gpu.estimated_collectives(muon[0], muon[2]) - gpu.estimated_collectives(adamw[0], adamw[2])
    matrices = 2 * 2 * (4 + 8 + 6) * 64 * 64  # in bfloat16
    assert added == {Collective(kind, matrices // parts, group): count for kind, parts, group, count in exchanges}


def test_cudnn_is_assumed_by_rules_alone(monkeypatch, caplog):
    caplog.set_level("INFO", "flowdit")
    monkeypatch.setattr(attention, "failed_check", lambda shape: pytest.fail("the local library was asked"))
    assert gpu.cudnn_shapes(*estimated()[:2]) == [AttentionShape(16, 64)]
    assert gpu.cudnn_shapes(*estimated(model={"num_heads": 16})[:2]) == []  # head size 4
    with_cudnn, plain = (
        memory(model={"kernels": kernels})["activations and temporaries"] for kernels in ("auto", "plain")
    )
    # XLA keeps exponentials in float32 and weights in bfloat16, in two blocks of four heads.
    assert plain - with_cudnn == 16 * 2 * 4 * 64 * 64 * (4 + 2)
    assert not caplog.records


def test_what_is_sent_between_gpus():
    found = {}
    for accum in (1, 2):
        config, _, step = estimated("h100:4", data=2, fsdp=2, train={"gradient_accum": accum})
        collectives = gpu.estimated_collectives(config, step)
        found[accum] = {collective.kind: count for collective, count in collectives.items()}
    assert found[1] == {"all-gather": 2, "reduce-scatter": 1, "all-reduce": 1}
    assert found[2] == {"all-gather": 4, "reduce-scatter": 2, "all-reduce": 1}  # over `data` once a step


def test_the_tensor_axis_splits_only_what_it_can():
    whole, half = (memory(topology=f"h100:{size}", tensor=size) for size in (1, 2))
    kept = [found["activations and temporaries"] - gpu.OVERHEAD for found in (whole, half)]
    assert kept[0] / 2 < kept[1] < kept[0]


def test_the_data_set_gives_the_shapes(tmp_path, tiny_data):
    common = ("experiment=tiny", "topology=h100:1", f"data.path={tiny_data}")
    _, content = planned(tmp_path, *common)
    assert content["plans"][0]["memory"]["batch"] == 8 * (16 * 8 * 8 * 4 + 4)
    assert any(line == f"data: latents 16x8x8, 4 classes, of {tiny_data}" for line in content["assumptions"])
    _, content = planned(tmp_path, *common, "shape.classes=1000")
    assert any("latents 16x8x8, 1000 classes, assumed: shape.*" in line for line in content["assumptions"])
    _, content = planned(tmp_path, "experiment=tiny", "topology=h100:1", f"data.path={tmp_path}/none")
    assert any(f"assumed: there is no data set at {tmp_path}/none" in line for line in content["assumptions"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["topology=v9:2x2"], "topology: must be one of v5e:<sides>, "),
        (["topology=v5e:4x4x4"], "topology: must have the 2 sides of a slice, as in v5e:2x2, or 1 for one device"),
        (["topology=h100"], "topology: must have a number of GPUs, as in h100:8, got h100"),
        ([], "topology: must be given"),
        (["topology=h100:3"], "train.batch_size: batch_size / gradient_accum must be divisible by the mesh's data"),
        (["topology=h100:8", "mesh.fsdp=3"], "mesh: data x fsdp x tensor must equal the 8 devices there are"),
        (["topology=h100:1", "model.patch_size=3"], "model.patch_size: must divide the latents' height and width"),
        (["topology=h100:1", "stage=2"], "stage: 2 trains pixart, but these settings have ccdit"),
        (["topology=h100:1", "stage=3"], "stage: must be null, 1 or 2, got 3"),
        (["topology=h100:1", "utilisation=2"], "utilisation: must be in (0, 1], got 2"),
        (["topology=h100:1", "shape.latent=[4,8]"], "shape.latent: must be null or three sides"),
        (["topology=h100:1", "experiment=small"], "experiment: small chooses sizes from the data and the devices"),
    ],
)
def test_mistakes_are_one_line(overrides, message):
    assert error_line(call(main, "experiment=tiny", *overrides)).startswith(f"error: {message}")


def test_a_missing_compiler_is_one_line(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *args: None if name == "libtpu" else find(name, *args)
    )
    line = error_line(call(main, *TINY, "topology=v5e:1"))
    assert line == "error: topology: v5e:1 needs the TPU compiler: pip install 'flowdit[tpu]'"


class Refused:
    """The parts of a step that the compiler refuses with `message`."""

    template = None

    def __init__(self, message):
        self.message = message
        self.train_step = self

    def lower(self, *_):
        raise jax.errors.JaxRuntimeError(self.message)


@pytest.mark.parametrize(
    "message",
    [
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.00G of 15.75G hbm. Exceeded hbm capacity",
        "RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (20.00G) exceeds available HBM (15.75G).",
    ],
)
def test_a_step_that_does_not_fit(message):
    step = compilation.Step(None, None, None)._replace(parts=Refused(message))
    found = compilation.compile_step(step, 16 * GIB)
    assert (found.text, found.memory, found.limit) == ("", 20 * 2**30, 15.75 * 2**30)


@pytest.mark.parametrize(("batch", "most"), [(16, 100), (64, 40), (8, 7), (8, 8)])
def test_the_largest_batch(monkeypatch, batch, most):
    """A batch of up to `most` images fits eight devices."""
    tried = []

    def of_size(config, data, step):
        tried.append(size := config.train.batch_size)
        memory = {"parameters": size}
        return Plan(
            topology="h100:8",
            devices=8,
            mesh={},
            is_estimate=True,
            batch_size=size,
            images_per_device=size // 8,
            fits=size <= most,
            memory=memory,
            memory_limit=float(most),
            host_memory=0,
            image_flops=1,
            compile_seconds=0.0,
        )

    monkeypatch.setattr(planner, "_plan", of_size)
    monkeypatch.setattr(planner, "planned_step", lambda config, data, topology: None)
    config = PlanConfig(largest_batch=True)
    config.data.path = ""
    config.train = dataclasses.replace(config.train, batch_size=batch)
    step = planner.PlannedStep(parse_topology("h100:8"), compilation.Step(None, None, None), is_absent=True)
    assert planner.plan(config, planned_data(config), step).largest_batch == most // 8 * 8
    assert len(tried) == len(set(tried))
