"""Autoguidance: a weaker model in place of the null condition."""

import dataclasses
import json
import logging

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import call, error_line

import flowdit
from flowdit import sample
from flowdit.checkpoint.meta import read_meta
from flowdit.conditioning.text import Text
from flowdit.diffusion import flow
from flowdit.diffusion.sampling import Guide, SamplerConfig, image_noise
from flowdit.diffusion.sampling import sample as solve
from flowdit.fields import FieldError
from flowdit.inference.sampler import Sampler
from flowdit.inference.trained import check_guide, describe_trained
from flowdit.sharding import MeshConfig, make_mesh

QUICK = ("solver=euler", "steps=3", "num_images=2")
LABELS = jnp.array([2, 2])


@pytest.fixture(scope="module")
def alone(whole_run) -> Sampler:
    return flowdit.load(str(whole_run))


@pytest.fixture(scope="module")
def guided(alone) -> Sampler:
    """The model with a guide of another depth and width."""
    trained = alone.trained
    shape = dataclasses.replace(trained.config.model, depth=1, hidden_dim=16)
    config = dataclasses.replace(trained.config, model=shape)
    narrow = eqx.filter_jit(trained.conditioning.model_builder(config, trained.manifest))()
    narrow = jax.tree.map(lambda x: x + 0.02, narrow)  # the last layer starts at zero
    return Sampler(trained, guide=trained._replace(model=narrow, config=config, step=5))


def latents(sampler: Sampler, **solver) -> np.ndarray:
    config = sampler.sampler_config({"solver": "euler", "steps": 3, **solver})
    drawn = sampler.batches(sampler.requests(2, {"labels": ["sun", "cat"]}), config)
    return np.concatenate([batch.latents for batch in drawn])


@pytest.mark.parametrize(("t", "expected"), [(0.5, 5.0 + 3 * (2.0 - 5.0)), (0.1, 2.0), (0.95, 2.0)])
def test_the_guide_takes_the_place_of_the_null_condition_in_the_same_interval(t, expected):
    of_label = lambda x, t, label: jnp.ones_like(x) * label.astype(jnp.float32)
    weak = lambda x, t, label: jnp.ones_like(x) * (label.astype(jnp.float32) + 3)
    options = {"guidance": 3.0, "interval": (0.2, 0.9), "guide": weak}
    x = jnp.zeros((2, 4, 2, 2))
    v = flow.guided_velocity(of_label, x, jnp.asarray(t), LABELS, jnp.array([7, 7]), **options)
    np.testing.assert_allclose(v, jnp.full(x.shape, expected))
    np.testing.assert_array_equal(flow.guided_velocity(of_label, x, jnp.asarray(t), LABELS, None, **options), v)


def test_a_guide_that_predicts_noise_is_one_velocity_field_more():
    """The noise that the velocity `label` implies, so that the guide agrees with the model."""

    def noise_of(x, step, label):
        return label.astype(jnp.float32) * jnp.ones_like(x)  # x_t = noise at all times: v = (noise - x) / (1 - t)

    noise = image_noise(0, jnp.arange(2), (1, 2, 2))
    config = SamplerConfig(solver="euler", steps=4, guidance=5.0)
    alone = solve(noise_of, noise, LABELS, None, config, "noise").latents
    both = solve(noise_of, noise, LABELS, None, config, "noise", guide=Guide(noise_of, "noise")).latents
    np.testing.assert_allclose(both, alone, rtol=1e-5, atol=1e-5)
    mixed = solve(lambda x, t, label: x, noise, LABELS, None, config, guide=Guide(noise_of, "noise")).latents
    assert np.isfinite(mixed).all()  # from t = 1 the guide's division by 1 - t would not be


def test_the_model_as_its_own_guide_gives_the_unguided_images(alone):
    itself = Sampler(alone.trained, guide=alone.trained)
    np.testing.assert_allclose(latents(itself, guidance=7.0), latents(alone, guidance=1.0), atol=1e-5)


def test_a_guide_of_another_size_changes_the_images_and_is_compiled_once(guided, alone):
    first = latents(guided, guidance=2.0)
    assert np.abs(first - latents(alone, guidance=1.0)).max() > 1e-2
    with jax.log_compiles(), pytest.MonkeyPatch.context() as patch:
        compiled = []
        patch.setattr(logging.getLogger("jax._src.interpreters.pxla"), "log", lambda *args: compiled.append(args))
        np.testing.assert_array_equal(latents(guided, guidance=2.0), first)
    assert compiled == []


@pytest.mark.slow
def test_it_depends_neither_on_the_mesh_nor_on_other_images(guided):
    spread = Sampler(guided.trained, make_mesh(MeshConfig(data=2, fsdp=2)), guide=guided.guide)
    np.testing.assert_allclose(latents(spread, guidance=2.0), latents(guided, guidance=2.0), atol=1e-4)
    assert np.isfinite(latents(guided, solver="tsit5", steps=200, rtol=1e-2, guidance=1.5)).all()


def test_the_command_records_the_guide(whole_run, tmp_path):
    settings = (*QUICK, "labels=[sun]", "guidance=2", f"checkpoint={whole_run}", f"guide={whole_run / '2'}")
    done = call(sample.main, *settings, f"out={tmp_path / 'out'}")
    assert done.status == 0, done.err
    assert f"guidance 2 by {whole_run / '2'} (step 2)" in done.out
    record = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert record["guide"] == {"checkpoint": str(whole_run / "2"), "step": 2}


@pytest.mark.slow
def test_a_text_model_is_guided_and_takes_no_negative_prompt_beside(whole_text_run):
    run = str(whole_text_run)
    sampler = flowdit.load(run, guide=f"{run}/2")
    images = sampler.sample(prompts=["red apple"], solver="euler", steps=2)
    assert len(images) == 1
    with pytest.raises(
        FieldError, match="^negative_prompt: must not be given with a guide, which replaces it, got 'x'"
    ):
        sampler.sample(prompts=["red apple"], negative_prompt="x")


def test_a_guide_that_does_not_fit_is_refused(alone, whole_run, whole_text_run, tmp_path):
    ours = alone.trained
    text = describe_trained(read_meta(whole_text_run / "6"))
    small = dataclasses.replace(ours.manifest, latent_shape=(16, 4, 4), image_size=32)
    renamed = dataclasses.replace(ours.conditioning, class_names=("cat", "cow", "heart", "sun"))  # type: ignore[type-var]
    fewer = dataclasses.replace(ours.conditioning, class_names=("cat",))  # type: ignore[type-var]
    reads = text.conditioning
    assert isinstance(reads, Text) and reads.info is not None
    encoder = dataclasses.replace(reads.info, fingerprint="other")
    for model, guide, message in (
        (ours, text, r"must have the conditioning of the model, labels, it has text"),
        (
            ours,
            ours._replace(manifest=small),
            r"must take latents of shape \[16, 8, 8\], as the model, it takes \[16, 4",
        ),
        (ours, ours._replace(mean=(0.5,) * 16), r"must take latents of mean \[.*\], as the model, it takes \[0.5, "),
        (ours, ours._replace(scale=(2.0,) * 16), r"must take latents of scale \["),
        (ours, ours._replace(conditioning=fewer), "must have the 4 classes of the model, it has 1"),
        (ours, ours._replace(conditioning=renamed), "in their order, class 1 is 'dog', its own is 'cow'"),
        (
            text,
            text._replace(conditioning=dataclasses.replace(reads, info=encoder)),
            "must read the features of the model's text encoder, of fingerprint .*, it reads those of other",
        ),
    ):
        with pytest.raises(FieldError, match=f"^guide: .*{message}"):
            check_guide(model, guide)
    check_guide(text, text)
    line = error_line(call(sample.main, f"checkpoint={whole_run}", f"guide={tmp_path / 'nowhere'}", *QUICK))
    assert line == f"error: guide: there is no file or folder {tmp_path / 'nowhere'}"
    line = error_line(call(sample.main, f"checkpoint={whole_run}", f"guide={whole_text_run}", *QUICK))
    assert line == "error: guide: must have the conditioning of the model, labels, it has text"
