"""Options of the blocks in runs of both models: resume, accumulation, layouts, starts and samples."""

import re
import shutil
from typing import Any

import jax
import numpy as np
import pytest
from runs import assert_same_checkpoint, error_line, train_here, train_text_here

import flowdit
from flowdit.conditioning.labels import Labels
from flowdit.conditioning.text import Text
from flowdit.diffusion.objective import FlowMatching
from flowdit.models.config import DiTConfig, PixArtConfig
from flowdit.models.dit import build_dit
from flowdit.models.pixart import build_pixart
from flowdit.optim import OptimConfig, make_optimizer
from flowdit.sharding import MeshConfig, init_sharded, make_mesh, shard_batch
from flowdit.training.step import init_state, make_train_step

ALL = {"norm": "rms", "mlp": "swiglu", "positions": "rope", "value_residual": True}
EACH = [{name: value} for name, value in ALL.items()]
OVERRIDES = tuple(f"model.{name}={value}" for name, value in ALL.items())
LATENT = (4, 8, 8)
CLASSES = 5
TEXT = (7, 6)
"""Tokens and width."""


@pytest.mark.parametrize(
    ("train", "request_"),
    [
        pytest.param(train_here, {"labels": ["cat"]}, id="class"),
        pytest.param(train_text_here, {"prompts": ["red apple"]}, id="text", marks=pytest.mark.slow),
    ],
)
def test_a_run_with_every_option_resumes_exactly_and_draws(tiny_data, tmp_path, train, request_):
    whole = tmp_path / "whole"
    finished = train(tiny_data, whole, *OVERRIDES)
    assert (finished.status, finished.err) == (0, "")
    resumed = shutil.copytree(whole, tmp_path / "resumed")
    shutil.rmtree(resumed / "6")
    line = error_line(train(tiny_data, resumed, *OVERRIDES[1:], "train.is_restore=true", "model.norm=layer"))
    assert line.startswith("error: model.norm: must be rms as in the checkpoint to resume, got layer")
    finished = train(tiny_data, resumed, *OVERRIDES, "train.is_restore=true")
    assert (finished.status, finished.err) == (0, "")
    assert_same_checkpoint(resumed / "6", whole / "6")
    (images,) = flowdit.load(str(whole)).draw(**request_, steps=1)
    assert images.shape == (1, 64, 64, 3)


@pytest.mark.slow
def test_a_text_model_starts_from_a_class_model_of_the_same_options_alone(tiny_data, tmp_path):
    assert train_here(tiny_data, tmp_path / "class", *OVERRIDES, "train.num_steps=5").status == 0
    start = f"train.init_from={tmp_path / 'class'}"
    line = error_line(train_text_here(tiny_data, tmp_path / "other", start, *OVERRIDES[:-1]))
    assert line == "error: model.value_residual: must be True as in train.init_from, got False"
    finished = train_text_here(tiny_data, tmp_path / "text", start, *OVERRIDES, "train.num_steps=5")
    assert finished.status == 0, finished.err
    (drift,) = re.findall(r"relative drift .*\b0\.5: ([\d.e-]+)", finished.out)
    assert float(drift) < 1e-5


def losses(stage: int, options: dict[str, Any], mesh_config: MeshConfig, accum: int) -> list[float]:
    """Of three steps of a small model."""
    shape = {"depth": 2, "hidden_dim": 32, "num_heads": 2}
    rng = np.random.default_rng(0)
    batch: dict[str, np.ndarray] = {"latent": rng.normal(size=(8, *LATENT)).astype(np.float32)}
    if stage == 1:
        build = lambda: build_dit(DiTConfig(**shape, **options), LATENT[0], CLASSES, key=jax.random.key(0))
        conditioning = Labels(tuple(map(str, range(CLASSES))))
        batch["label"] = rng.integers(0, CLASSES, 8).astype(np.int32)
    else:
        build = lambda: build_pixart(PixArtConfig(**shape, **options), LATENT[0], TEXT[1], key=jax.random.key(0))
        conditioning = Text()
        batch["text_features"] = rng.normal(size=(8, *TEXT)).astype(np.float32)
        batch["text_mask"] = np.arange(TEXT[0]) < rng.integers(0, TEXT[0] + 1, (8, 1))
    objective = FlowMatching(conditioning, 0.1, (0.1,) * 4, (0.9,) * 4)
    mesh = make_mesh(mesh_config)
    optimizer = make_optimizer(OptimConfig(learning_rate=1e-2), 100)
    state = init_sharded(mesh, lambda: init_state(build(), optimizer))
    step = make_train_step(optimizer, objective, 0, accum, 0.9, mesh=mesh)
    history = []
    for _ in range(3):
        state, metrics = step(state, shard_batch(mesh, batch))
        history.append(float(metrics["loss"]))
    return history


def assert_layouts_agree(stage: int, options: dict[str, Any]) -> None:
    expected = losses(stage, options, MeshConfig(data=4), 1)
    got = losses(stage, options, MeshConfig(data=1, fsdp=2, tensor=2), 4)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_layouts_and_accumulation_give_the_same_losses(stage):
    assert_layouts_agree(stage, ALL)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("options", EACH, ids=ALL)
@pytest.mark.parametrize("remat", ["none", "full"])
def test_layouts_and_accumulation_give_the_same_losses_with_each_option(stage, options, remat):
    assert_layouts_agree(stage, options | {"remat": remat})
