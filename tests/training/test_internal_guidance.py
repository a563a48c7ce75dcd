"""The auxiliary losses of the package together: training, exact resume, layouts; internal guidance by the trained head."""

import json
import shutil

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import (
    assert_same_checkpoint,
    call,
    error_line,
    metrics,
    stored_arrays,
    train_here,
    train_text_here,
)

import flowdit
from flowdit.conditioning.labels import Labels
from flowdit.convert import main as convert
from flowdit.diffusion.objective import FlowMatching
from flowdit.diffusion.sampling import image_noise
from flowdit.sample import main as sample

LOSSES = ("layer_sync", "clean_latent", "internal_guidance")
WEIGHTS = {"layer_sync": 0.2, "clean_latent": 1.0, "internal_guidance": 0.5}
HEAD = ("model.guidance_head=1", "auxiliary.internal_guidance.weight=0.5")
ALL = (*HEAD, "auxiliary.layer_sync.weight=0.2", "auxiliary.clean_latent.weight=1", "train.time_uniform_after=3")


@pytest.fixture(scope="module")
def run(tiny_data, tmp_path_factory):
    """A finished run with all losses, and uniform times after step 3."""
    folder = tmp_path_factory.mktemp("runs") / "all"
    finished = train_here(tiny_data, folder, *ALL, "auxiliary.layer_sync.last_step=5")
    assert (finished.status, finished.err) == (0, "")
    return folder


def check_parts(run, steps=range(1, 7)):
    """The losses are logged by their names, never negative, and add up to the total."""
    parts = {name: metrics(run, f"train/{name}") for name in LOSSES}
    velocity = metrics(run, "train/velocity")
    for step, total in metrics(run, "train/loss").items():
        assert all(part[step] >= 0 for part in parts.values())
        expected = velocity[step] + sum(WEIGHTS[name] * part[step] for name, part in parts.items())
        assert total == pytest.approx(expected, rel=1e-5)
    assert list(velocity) == list(steps)
    return parts


def test_parts_are_logged_and_never_negative(run, whole_run):
    parts = check_parts(run)
    assert parts["layer_sync"][6] == 0 < parts["layer_sync"][5]  # after its last step
    # At first both final layers are 0, and times are those of the run without losses.
    first = metrics(whole_run, "train/loss")[1]
    assert parts["internal_guidance"][1] == pytest.approx(first, rel=1e-5)
    assert metrics(run, "train/velocity")[1] == pytest.approx(first, rel=1e-5)


def test_the_head_is_trained_averaged_and_stored_with_the_model(run):
    early, late = stored_arrays(run / "2"), stored_arrays(run / "6")
    names = [name for name in late if "guidance_head" in name]
    assert "state.model.guidance_head.linear.weight" in names and "model_ema.guidance_head.linear.weight" in names
    assert not np.array_equal(
        early["model_ema.guidance_head.linear.weight"], late["model_ema.guidance_head.linear.weight"]
    )
    assert not [name for name in late if "auxiliary.internal_guidance" in name]


def test_resume_is_exact(tiny_data, run, tmp_path):
    resumed = shutil.copytree(run, tmp_path / "run")
    for step in ("4", "6"):
        shutil.rmtree(resumed / step)
    settings = (*ALL, "auxiliary.layer_sync.last_step=5", "train.is_restore=true")
    finished = train_here(tiny_data, resumed, *settings)
    assert (finished.status, finished.err) == (0, "")
    assert_same_checkpoint(resumed / "6", run / "6")


def test_samples_with_internal_guidance(run, whole_run, tmp_path):
    # After so few steps head and final layer hardly differ: both began at zero, after blocks that change nothing.
    trained = flowdit.load(str(run)).trained
    weight = 0.1 * jax.random.normal(jax.random.key(5), trained.model.guidance_head.linear.weight.shape)
    model = eqx.tree_at(lambda m: m.guidance_head.linear.weight, trained.model, weight)
    sampler = flowdit.Sampler(trained._replace(model=model))
    options = {"labels": ["cat", "sun"], "steps": 1, "solver": "euler", "guidance": 1.0}
    latents = {}
    for weight in (1.0, 1.4):
        config = sampler.sampler_config({name: options[name] for name in ("steps", "solver", "guidance")})
        config.internal_guidance = weight
        (drawn,) = sampler.batches(sampler.requests(1, {"labels": options["labels"]}), config)
        latents[weight] = drawn.latents
        assert drawn.evaluations.tolist() == [1, 1]
    output = one_velocity(sampler, latents[1.0].shape)
    noise = latents[1.0] + output.velocity
    moved = output.weak + 1.4 * (output.velocity - output.weak)
    np.testing.assert_allclose(latents[1.4], noise - moved, atol=1e-4)
    assert not np.allclose(latents[1.4], latents[1.0], atol=1e-4)
    finished = call(
        sample, f"checkpoint={run}", "labels=cat", "steps=1", "internal_guidance=1.4", f"out={tmp_path / 'a'}"
    )
    assert finished.status == 0
    assert "internal guidance 1.4" in finished.out
    without = call(sample, f"checkpoint={whole_run}", "labels=cat", "internal_guidance=1.4", f"out={tmp_path / 'b'}")
    rule = "must be 1, as the model has no guidance head (model.guidance_head), got 1.4"
    assert error_line(without) == f"error: internal_guidance: {rule}"


def one_velocity(sampler, shape):
    """The output of the network for the noise of images 0 and 1, at the start of the solve."""
    noise = image_noise(0, jnp.arange(shape[0]), shape[1:])
    model = sampler.trained.model
    of = jax.vmap(lambda x, label: model.run(x, jnp.ones(()), label, weak=True))
    return of(noise, jnp.asarray([0, 3]))


def test_exports_keep_the_head_or_say_that_it_is_left_out(run, tmp_path):
    single = tmp_path / "model.safetensors"
    assert call(convert, f"source={run / '6'}", f"target={single}").status == 0
    (images,) = flowdit.load(str(single)).draw(labels=["cat"], steps=1, internal_guidance=1.4)
    assert images.shape == (1, 64, 64, 3)
    settings = (f"target={tmp_path / 'folder'}", "to=diffusers", "own_class=true", "image=none")
    finished = call(convert, f"source={single}", *settings)
    assert (finished.status, finished.err) == (0, "")
    assert "the guidance head is left out: the pipeline has no internal guidance" in finished.out
    back = flowdit.load(str(tmp_path / "folder"))
    assert back.trained.model.guidance_head is None
    stored = json.loads((tmp_path / "folder" / "model_index.json").read_text())["flowdit"]
    assert stored["config"]["model"]["guidance_head"] is None
    weights = {name: stored["config"]["auxiliary"][name]["weight"] for name in LOSSES}
    assert weights == WEIGHTS | {"internal_guidance": 0.0}


@pytest.mark.slow
def test_layouts_have_the_same_losses(tiny_data, run, tmp_path):
    settings = (*ALL, "auxiliary.layer_sync.last_step=5", "mesh.fsdp=4", "train.gradient_accum=2", "train.num_steps=5")
    finished = train_here(tiny_data, tmp_path / "run", *settings)
    assert (finished.status, finished.err) == (0, "")
    for name in ("loss", *LOSSES):
        expected = list(metrics(run, f"train/{name}").values())[:5]
        np.testing.assert_allclose(list(metrics(tmp_path / "run", f"train/{name}").values()), expected, rtol=1e-5)


@pytest.mark.slow
def test_text_models(tiny_data, tmp_path):
    for folder, settings in (("one", ()), ("many", ("mesh.fsdp=4", "train.compute_dtype=float32"))):
        finished = train_text_here(tiny_data, tmp_path / folder, *ALL, *settings)
        assert (finished.status, finished.err) == (0, "")
    parts = check_parts(tmp_path / "one")
    for name, values in parts.items():
        found = list(metrics(tmp_path / "many", f"train/{name}").values())
        np.testing.assert_allclose(found, list(values.values()), rtol=1e-5)
    (images,) = flowdit.load(str(tmp_path / "one")).draw(prompts=["a red apple"], steps=1, internal_guidance=1.4)
    assert images.shape == (1, 64, 64, 3)


@pytest.mark.slow
def test_starts_from_models_with_and_without_a_head(tiny_data, run, whole_run, tmp_path):
    start = (f"train.init_from={whole_run}", "train.num_steps=2", "optim.warmup_steps=0")
    finished = train_here(tiny_data, tmp_path / "with", *HEAD, *start)
    assert (finished.status, finished.err) == (0, "")
    assert "guidance_head is freshly initialised: the other model has none" in finished.out
    finished = train_here(tiny_data, tmp_path / "without", start[0].replace(str(whole_run), str(run)), *start[1:])
    assert (finished.status, finished.err) == (0, "")
    assert not [name for name in stored_arrays(tmp_path / "without" / "2") if "guidance_head" in name]


@pytest.mark.slow
def test_training_in_bfloat16(tiny_data, tmp_path):
    with jax.numpy_dtype_promotion("standard"):  # the backward pass of JAX's attention mixes dtypes
        finished = train_here(tiny_data, tmp_path / "run", *ALL, "train.compute_dtype=bfloat16")
    assert (finished.status, finished.err) == (0, "")
    check_parts(tmp_path / "run")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            HEAD[1:],
            "model.guidance_head: must be a block, after which the head of auxiliary.internal_guidance is, got None",
        ),
        (HEAD[:1], "model.guidance_head: must be null without auxiliary.internal_guidance.weight, got 1"),
        (
            ("train.sampler.internal_guidance=1.4",),
            "train.sampler.internal_guidance: must be 1 without model.guidance_head, got 1.4",
        ),
        (("train.time_uniform_after=-1",), "train.time_uniform_after: must be null or 0 or more, got -1"),
        (("train.time_std=0",), "train.time_std: must be positive and finite, got 0.0"),
    ],
)
def test_bad_setting(tiny_data, tmp_path, settings, message):
    assert error_line(train_here(tiny_data, tmp_path / "run", *settings)) == f"error: {message}"


def test_times_are_uniform_after_the_step():
    objective = FlowMatching(Labels(("a",)), 0.1, (0.0,), (1.0,), time_shift=2.0, uniform_after=3)
    keys = jax.random.split(jax.random.key(0), 2000)
    at = jax.jit(lambda step: jax.vmap(lambda key: objective.time(key, step))(keys))
    before, last, after = (np.asarray(at(step)) for step in (0, 2, 3))
    np.testing.assert_array_equal(before, last)
    unshifted = after / (2 - after)
    assert np.histogram(unshifted, 4, (0, 1))[0].min() > 440  # 500 each
    assert np.histogram(before / (2 - before), 4, (0, 1))[0].min() < 320
