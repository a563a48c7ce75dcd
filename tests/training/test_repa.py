"""Alignment with cached features: its numbers, in training, after a resume, and on several devices."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from feature_caches import SHAPE, named, write_maps
from runs import assert_same_checkpoint, error_line, metrics, stored_arrays, stored_json, train_here, write_tiny_data

from flowdit.config import Config
from flowdit.data.loader import DataConfig
from flowdit.diffusion.auxiliary import DataShapes, View
from flowdit.diffusion.auxiliary.repa import Repa, normalised, resized
from flowdit.diffusion.auxiliary.tokens import token_grid
from flowdit.models.config import DiTConfig
from flowdit.training.run_data import feature_caches

MODEL = DiTConfig(depth=2, hidden_dim=8, num_heads=2)
LATENT_SHAPE = (4, 4, 6)
"""Of six tokens: two rows of three."""
SHAPES = DataShapes(LATENT_SHAPE, (2, 3, 5))


def view_of(hidden, feature_map) -> View:
    latent = jnp.zeros(LATENT_SHAPE)
    return View({"feature_map": feature_map}, latent, latent, jnp.zeros(()), latent, latent, hidden={1: hidden})


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape[0]).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("projector", ["mlp", "convolution"])
@pytest.mark.parametrize("spatial_norm", [None, 0.6])
def test_the_loss_is_one_minus_the_cosine(projector, spatial_norm):
    loss = Repa(depth=1, projector=projector, width=16, spatial_norm=spatial_norm)
    parameters = loss.init(MODEL, SHAPES, key=jax.random.key(0))
    hidden, features = noise(6, 8), noise(2, 3, 5).astype(np.float16)
    student = np.asarray(parameters(jnp.asarray(hidden), (2, 3)))
    teacher = features.reshape(6, 5).astype(np.float32)
    if spatial_norm is not None:
        teacher = (teacher - spatial_norm * teacher.mean(0)) / teacher.std(0)
    norms = np.linalg.norm(student, axis=1) * np.linalg.norm(teacher, axis=1)
    expected = 1 - ((student * teacher).sum(1) / norms).mean()
    found = loss(parameters, view_of(jnp.asarray(hidden), jnp.asarray(features)))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert found.dtype == jnp.float32


def test_a_convolution_sees_the_neighbours_of_a_token():
    loss = Repa(depth=1, projector="convolution")
    project = loss.init(MODEL, SHAPES, key=jax.random.key(0))
    tokens = jnp.asarray(noise(12, 8))
    changed = project(tokens.at[0].add(1.0), (3, 4)) - project(tokens, (3, 4))
    seen = np.abs(np.asarray(changed)).max(-1).reshape(3, 4) > 1e-5
    assert seen.tolist() == [[True, True, False, False], [True, True, False, False], [False] * 4]


def test_equal_features_give_zero_and_never_less():
    """Whatever the rounding of their norms."""
    loss = Repa(depth=1)
    for seed in range(50):
        features = np.random.default_rng(seed).standard_normal((2, 3, 8)).astype(np.float16)
        view = view_of(jnp.asarray(features.reshape(6, 8), jnp.float32), jnp.asarray(features))
        assert 0 <= loss(lambda tokens, grid: 3 * tokens, view) < 1e-6


def test_features_are_interpolated_to_the_places_of_the_tokens():
    assert token_grid(64, (8, 16, 16)) == (8, 8)
    assert token_grid(6, LATENT_SHAPE) == (2, 3)
    ramp = jnp.broadcast_to(jnp.arange(4.0)[None, :, None], (4, 4, 1))
    np.testing.assert_allclose(resized(ramp, (2, 8))[:8, 0], [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3], atol=1e-6)
    np.testing.assert_array_equal(resized(ramp, (4, 4)), ramp.reshape(16, 1))
    normed = normalised(jnp.asarray(noise(20, 3)) + 5, 1.0)
    np.testing.assert_allclose([normed.mean(0), normed.std(0)], [[0] * 3, [1] * 3], atol=1e-4)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tiny_data(tmp_path_factory.mktemp("data") / "named", named)


@pytest.fixture(scope="module")
def cache(data, tmp_path_factory):
    return write_maps(tmp_path_factory.mktemp("caches") / "maps", data)


def settings(cache, **options) -> tuple[str, ...]:
    values = {"weight": 0.5, "depth": 1, "width": 16} | options
    return (f"data.feature_cache={cache}", *(f"auxiliary.repa.{name}={value}" for name, value in values.items()))


@pytest.fixture(scope="module")
def run(data, cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    finished = train_here(data, folder, *settings(cache, last_step=5))
    assert (finished.status, finished.err) == (0, "")
    return folder


def test_a_run_logs_the_loss_by_its_name_until_its_last_step(run):
    total, velocity, repa = (metrics(run, f"train/{name}") for name in ("loss", "velocity", "repa"))
    assert all(0 < repa[step] < 2 for step in (1, 2, 3, 4, 5)) and repa[6] == 0
    for step, value in total.items():
        assert value == pytest.approx(velocity[step] + 0.5 * repa[step], rel=1e-5)
    stored = stored_arrays(run / "6")
    shapes = [stored[f"state.auxiliary.repa.layers.{i}.weight"].shape for i in range(3)]
    assert shapes == [(32, 16), (16, 16), (16, SHAPE[2])]
    assert stored["state.auxiliary.repa.layers.0.weight"].dtype == np.float32
    assert stored_json(run / "6", "meta")["features"] == "noise"


def test_a_resume_is_exact(data, cache, run, tmp_path):
    resumed = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(resumed / "6")
    finished = train_here(data, resumed, *settings(cache, last_step=5), "train.is_restore=true")
    assert (finished.status, finished.err) == (0, "")
    assert_same_checkpoint(resumed / "6", run / "6")


def test_a_resume_with_features_of_another_network_is_refused(data, run, tmp_path):
    other = write_maps(tmp_path / "other", data, identity="other")
    line = error_line(train_here(data, run, *settings(other, last_step=5), "train.is_restore=true"))
    rule = "data.feature_cache: must hold features of the network in the checkpoint to resume, noise, got 'other'"
    assert line.startswith(f"error: {rule}")


def test_caches_that_do_not_fit_are_refused(data, cache, tmp_path):
    without = (option for option in settings(cache) if "cache" not in option)
    rule = "must be given: auxiliary.repa reads what `python -m flowdit.prepare features=...` writes, got None"
    assert error_line(train_here(data, tmp_path / "run", *without)) == f"error: data.feature_cache: {rule}"
    other = write_tiny_data(tmp_path / "data", named, seed=1)
    line = error_line(train_here(other, tmp_path / "run", *settings(cache)))
    assert line.startswith("error: data.feature_cache: ") and "id of the data set: must be" in line
    own = write_maps(tmp_path / "maps", other, identity="other")
    mixed = f"data.mix=[{{path: {other}, feature_cache: {own}}}]"
    line = error_line(train_here(data, tmp_path / "run", *settings(cache), mixed))
    rule = "must hold features of the same network as data.feature_cache, noise, got 'other'"
    assert line == f"error: data.mix[0].feature_cache: {rule}"
    line = error_line(train_here(data, tmp_path / "run", *settings(cache), f"data.mix=[{{path: {other}}}]"))
    assert (
        line == "error: data.mix[0].feature_cache: must be given for all data sets of a mixture or for none, got None"
    )


def test_without_the_loss_the_cache_is_not_opened(data, tmp_path):
    config = Config(data=DataConfig(path=str(data), feature_cache=str(tmp_path / "none")))
    assert feature_caches(config, []) == (None, "")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"projector": "linear"}, "projector: must be one of mlp, convolution, got 'linear'"),
        ({"spatial_norm": 2}, "spatial_norm: must be null or in [0, 1], got 2.0"),
        ({"depth": 3}, "depths: must be blocks in [1, model.depth=2], got (3,)"),
        ({"width": 0}, "width: must be at least 1, got 0"),
    ],
)
def test_bad_settings(data, cache, tmp_path, option, message):
    line = error_line(train_here(data, tmp_path / "run", *settings(cache, **option)))
    assert line == f"error: auxiliary.repa.{message}"


@pytest.mark.slow
@pytest.mark.parametrize("option", [{}, {"projector": "convolution", "spatial_norm": 1}])
def test_layouts_have_the_same_losses(data, cache, tmp_path, option):
    """The projector is split over the devices of `fsdp`, and gathered for each micro-batch."""
    options = (*settings(cache, last_step=3, **option), "train.num_steps=4", "optim.warmup_steps=2")
    layouts = {
        "one": ("mesh.data=4",),
        "fsdp": ("mesh.fsdp=4", "train.gradient_accum=2"),
        "tensor": ("mesh.tensor=2", "mesh.fsdp=2"),
    }
    for name, layout in layouts.items():
        finished = train_here(data, tmp_path / name, *options, *layout)
        assert (finished.status, finished.err) == (0, "")
    for name in ("loss", "repa"):
        expected = list(metrics(tmp_path / "one", f"train/{name}").values())
        for layout in ("fsdp", "tensor"):
            found = list(metrics(tmp_path / layout, f"train/{name}").values())
            np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.slow
def test_buckets_and_mixtures_read_their_own_maps(tmp_path):
    sides = ((8, 8), (6, 10), (10, 6))
    folders = [write_tiny_data(tmp_path / f"data{i}", named, sides=sides, seed=i) for i in range(2)]
    first, second = (write_maps(tmp_path / f"maps{i}", folder, seed=i) for i, folder in enumerate(folders))
    mix = f"data.mix=[{{path: {folders[1]}, feature_cache: {second}}}]"
    finished = train_here(folders[0], tmp_path / "run", *settings(first), mix, "train.num_steps=5")
    assert (finished.status, finished.err) == (0, "")
    assert all(0 < value < 2 for value in metrics(tmp_path / "run", "train/repa").values())
