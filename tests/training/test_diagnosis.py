"""A skipped step explains itself: which layer, which example, which time."""

import dataclasses
import functools
import json
import socket
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from runs import LATENT_SHAPE, error_line, finish, metrics, start, train_here, train_text_here, write_tiny_data
from test_processes import settings
from test_step import CLASSES, LATENT, MODEL, OBJECTIVE, batch_of

from flowdit.data.manifest import Manifest
from flowdit.data.stream import TrainStream
from flowdit.diffusion.objective import Parameters
from flowdit.models.compute import FLOAT32, Compute
from flowdit.models.dit import DiT, build_dit
from flowdit.optim import OptimConfig, make_optimizer
from flowdit.sharding import MeshConfig, init_sharded, make_mesh, shard_batch
from flowdit.training.diagnosis import Diagnosis, make_diagnose
from flowdit.training.skipped_report import Findings, Skipped, make_report, summary
from flowdit.training.step import init_state, make_train_step

SKIPPED = Skipped(step=5, loss=float("nan"), grad_norm=float("nan"), updates_since=0)


RECORDS = [{"file": "shard", "record": 10 + i} for i in range(8)]
LAYOUTS = {
    "data": dict(),
    "split": dict(mesh=MeshConfig(data=1, fsdp=2, tensor=2), accum=4, remat="full"),
    "bfloat16": dict(mesh=MeshConfig(data=2, fsdp=2), accum=2, compute=Compute("bfloat16"), remat="dots"),
}
layouts = pytest.mark.parametrize(
    "layout", ["data", *(pytest.param(layout, marks=pytest.mark.slow) for layout in ("split", "bfloat16"))]
)


@functools.cache
def model(layout: str = "data") -> DiT:
    """With outputs that are not zero, so that the gradient reaches every layer."""
    config = dataclasses.replace(MODEL, remat=LAYOUTS[layout].get("remat", "none"))
    built = build_dit(config, LATENT[0], CLASSES, key=jax.random.key(0))
    return jax.tree.map(lambda x: x + 0.02 * jax.random.normal(jax.random.key(1), x.shape), built)


@functools.cache
def second_pass(layout: str):
    """The compiled function of a layout, and its mesh."""
    mesh = make_mesh(LAYOUTS[layout].get("mesh", MeshConfig(data=4)))
    settings = {"compute": LAYOUTS[layout].get("compute", FLOAT32), "gradient_accum": LAYOUTS[layout].get("accum", 1)}
    return make_diagnose(OBJECTIVE, seed=0, mesh=mesh, **settings), mesh


def findings(model: DiT, batch: dict[str, np.ndarray], layout: str = "data") -> Findings:
    """The results of the second pass over a batch."""
    diagnose, mesh = second_pass(layout)
    parameters = init_sharded(mesh, Parameters, model, {})
    with jax.numpy_dtype_promotion("standard"):  # the backward pass of JAX's attention mixes dtypes
        return diagnose(parameters, shard_batch(mesh, batch), jnp.asarray(4, jnp.int32))


def diagnosed(model: DiT, batch: dict[str, np.ndarray], layout: str = "data") -> dict[str, Any]:
    """The report on a batch."""
    report = make_report(SKIPPED, findings(model, batch, layout), RECORDS)
    json.dumps(report, allow_nan=False)
    return report


def with_huge_latent(example: int, value: float = 1e30) -> dict[str, np.ndarray]:
    batch = batch_of(8)
    batch["latent"][example] = value
    return batch


@layouts
def test_a_huge_record_is_named_with_its_time_and_loss(layout):
    report = diagnosed(model(layout), with_huge_latent(5), layout)
    assert report["first_not_finite"]["examples"] == [5] and report["worst_examples"] == [5]
    bad, good = report["examples"][5], report["examples"][4]
    assert bad["record"] == 15 and bad["loss"] == "inf" and bad["input"]["latent"] == pytest.approx(1e30)
    assert 0 < bad["t"] < 1 and bad["first_not_finite"] and good["first_not_finite"] is None
    assert good["loss"] < 100 and good["input"]["latent"] < 20 and good["input"]["label"] in range(CLASSES)
    assert f"shard record 15 (t {bad['t']:.4g}, loss inf)" in summary(report)


@pytest.mark.parametrize(
    ("where", "value", "layer", "name"),
    [
        (lambda m: m.blocks.mlp.up.weight, np.nan, "block 2", "mlp"),
        (lambda m: m.blocks.attention.out.weight, 1e38, "block 2", "self_attention"),
        (lambda m: m.blocks.attention.query_norm.scale, np.inf, "block 2", "self_attention_logit"),
    ],
)
@layouts
def test_a_bad_weight_is_named_by_its_block(where, value, layer, name, layout):
    broken = eqx.tree_at(where, model(layout), where(model()).at[1].set(value))
    report = diagnosed(broken, batch_of(8), layout)
    first = report["first_not_finite"]
    assert (first["pass"], first["layer"], first["value"], len(first["examples"])) == ("forward", layer, name, 8)
    layers = {entry.pop("layer"): entry for entry in report["layers"]}
    assert isinstance(layers["block 1"]["tokens"]["largest"], float)
    assert layers["block 2"][name]["largest"] in ("nan", "inf")


def test_a_bad_weight_beside_the_blocks_is_named():
    broken = eqx.tree_at(lambda m: m.time_embed.up.bias, model(), model().time_embed.up.bias.at[0].set(np.inf))
    first = diagnosed(broken, batch_of(8))["first_not_finite"]
    assert (first["layer"], first["value"]) == ("condition", "output")


def test_a_gradient_that_overflows_is_named():
    """In the order of the backward pass; without any such layer, it is the sum of the squares that overflows."""
    finite = findings(model(), batch_of(8))
    infinite = finite._replace(grad_norm=np.float32(np.inf))
    blocks = infinite.gradients.model.blocks.mlp.up.weight
    broken = eqx.tree_at(lambda f: f.gradients.model.blocks.mlp.up.weight.norm, infinite, blocks.norm * np.inf)
    largest = eqx.tree_at(lambda f: f.gradients.model.class_table.norm, infinite, np.float32(1e30))
    for found, layer in ((broken, "block 2"), (largest, "class_table")):
        report = make_report(SKIPPED, found, RECORDS)
        assert report["first_not_finite"] == {"pass": "backward", "layer": layer, "value": "gradient", "examples": []}
        assert f"not finite: first {layer} gradient in the backward pass" in summary(report)


@layouts
def test_the_second_pass_computes_what_the_step_computed(layout):
    """Losses and gradient of the step with the same number, and norms that add up."""
    mesh, settings = second_pass(layout)[1], LAYOUTS[layout]
    compute, accum = settings.get("compute", FLOAT32), settings.get("accum", 1)
    optimizer = make_optimizer(OptimConfig(), 10)
    state = init_sharded(mesh, lambda model: init_state(model, optimizer), model(layout))
    state = dataclasses.replace(state, step=state.step + 4)
    step = make_train_step(optimizer, OBJECTIVE, 0, accum, compute=compute, mesh=mesh)
    with jax.numpy_dtype_promotion("standard"):
        _, of_step = jax.device_get(step(state, shard_batch(mesh, batch_of(8))))
    report = diagnosed(model(layout), batch_of(8), layout)
    assert report["first_not_finite"] is None and "was finite" in summary(report)
    rtol = 1e-5 if compute == FLOAT32 else 2e-2
    np.testing.assert_allclose(np.mean([e["loss"] for e in report["examples"]]), of_step["loss"], rtol=rtol)
    gradients = [entry.get("gradient_norm", 0.0) for entry in report["layers"]]
    np.testing.assert_allclose(np.linalg.norm(gradients), of_step["grad_norm"], rtol=rtol)
    weights = [entry.get("weight_norm", 0.0) for entry in report["layers"]]
    np.testing.assert_allclose(np.linalg.norm(weights), optax.tree.norm(model()), rtol=1e-4)
    (block,) = (entry for entry in report["layers"] if entry["layer"] == "block 1")
    assert {"self_attention", "self_attention_logit", "mlp", "tokens"} <= block.keys()


class FakeStream(TrainStream):
    def __init__(self):
        pass


def test_which_step_of_a_window_is_explained():
    good, bad = ({"loss": value, "grad_norm": 1.0} for value in (1.0, np.nan))
    mesh = make_mesh(MeshConfig())
    diagnosis = Diagnosis(epath.Path("run"), mesh, FakeStream(), dict, make_diagnose(OBJECTIVE, 0))
    chosen = [
        diagnosis.step_to_explain(step, window)
        for step, window in [
            (3, [good, bad, bad]),  # a row begins at step 2
            (5, [bad, bad]),  # it goes on
            (8, [bad, good, good]),
            (13, [bad, good, bad, good, good]),  # the last of two
            (14, [good]),
        ]
    ]
    assert [found and (found.step, found.updates_since) for found in chosen] == [(2, 0), None, None, (11, 2), None]


@pytest.fixture(scope="module")
def poisoned_data(tmp_path_factory):
    """Float32 latents; the sixth record of the second shard is huge, but finite."""
    folder = tmp_path_factory.mktemp("poisoned")
    clean = write_tiny_data(folder / "clean")
    noise, seen = np.random.default_rng(1), []

    def latent(index):
        seen.append(index)
        value = noise.standard_normal(LATENT_SHAPE) / Manifest.read(clean).vae.scale
        return {"latent": np.full(LATENT_SHAPE, 1e30, np.float32) if len(seen) == 30 else value.astype(np.float32)}

    data, whole = write_tiny_data(folder / "data", latent), Manifest.read(clean)
    manifest = Manifest.read(data)
    kept = {name: getattr(whole, name) for name in ("channel_mean", "channel_std")}
    dataclasses.replace(manifest, latent_dtype="float32", **kept).write(data)
    return data


def explained(data: Path, run: Path, out: str) -> dict[str, Any]:
    """The only explanation of a run on `poisoned_data`, which must be right and in its output."""
    assert (run / "skipped").is_dir(), out
    (file,) = (run / "skipped").iterdir()
    report = json.loads(file.read_text())
    step = int(file.stem)
    assert report["step"] == step and metrics(run, "train/skipped_steps")[6] == 1
    (worst,) = report["worst_examples"]
    example = report["examples"][worst]
    assert (example["file"], example["record"]) == (str(data / "train-1.array_record"), 5)
    assert example["loss"] == "inf" and len(report["examples"]) == 8
    (line,) = (line for line in out.splitlines() if "was skipped" in line)
    assert f"step {step} was skipped (loss inf, " in line and line.endswith(f"; details: {file}")
    assert f"{example['file']} record 5 (t " in line
    return report


def test_a_run_writes_the_explanation_and_goes_on(poisoned_data, tmp_path):
    finished = train_here(poisoned_data, tmp_path / "run", "train.log_every=3", "train.save_every=0")
    assert (finished.status, finished.err) == (0, "")
    report = explained(poisoned_data, tmp_path / "run", finished.out)
    assert report["updates_of_the_weights_since"] == (-report["step"] % 3 if report["step"] > 1 else 0)


@pytest.mark.slow
def test_text_runs_explain_too(poisoned_data, tmp_path):
    layout = [
        "train.batch_size=8",
        "mesh.fsdp=2",
        "mesh.data=2",
        "train.gradient_accum=2",
        "train.compute_dtype=bfloat16",
        "model.remat=full",
    ]
    with jax.numpy_dtype_promotion("standard"):  # the backward pass of JAX's attention mixes dtypes
        finished = train_text_here(poisoned_data, tmp_path / "run", *layout)
    assert (finished.status, finished.err) == (0, "")
    report = explained(poisoned_data, tmp_path / "run", finished.out)
    layers = {entry["layer"]: entry for entry in report["layers"]}
    assert {"cross_attention", "cross_attention_logit"} <= layers["block 2"].keys()
    assert {"weight_norm", "gradient_norm", "output"} <= layers["caption_proj"].keys()


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_two_processes_explain_together(poisoned_data, tmp_path, stage):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    run = tmp_path / "run"
    command, *arguments = settings(stage, poisoned_data, run, "mesh.fsdp=4", "train.log_every=3", "train.batch_size=8")
    cluster = [f"mesh.coordinator={address}", "mesh.num_processes=2"]
    script = f"from flowdit.train import {command}; {command}()"
    processes = [start("-c", script, *arguments, *cluster, f"mesh.process_id={i}", devices=2) for i in (0, 1)]
    try:
        first, second = [finish(process) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert (first.status, second.status) == (0, 0), first.err + second.err
    explained(poisoned_data, run, first.out)
    assert "was skipped" not in second.out


def test_a_run_that_diverges_names_the_explanation(poisoned_data, tmp_path):
    """The first update makes the weights too large."""
    run = tmp_path / "run"
    overflowing = ["optim.learning_rate=1e30", "optim.warmup_steps=0", "train.max_skipped_in_row=2"]
    line = error_line(train_here(poisoned_data, run, *overflowing, "train.compute_dtype=float32"))
    (file,) = (run / "skipped").iterdir()
    assert line.endswith(f"; see {file}"), line
