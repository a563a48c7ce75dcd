"""Watching a draw: progress and the path to the image, which is bit for bit the image of a draw without."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flowdit
from flowdit.diffusion.watch import UNWATCHED, Watch
from flowdit.inference import sampler as sampling
from flowdit.inference.sampler import Sampler


@pytest.fixture(scope="module")
def sampler(whole_run) -> Sampler:
    return flowdit.load(str(whole_run / "6"))


def drawn(sampler: Sampler, watch: Watch = UNWATCHED, count: int = 3, **solver) -> sampling.Drawn:
    requests = sampler.requests(count, {"labels": ["heart"]})
    (batch,) = sampler.batches(requests, sampler.sampler_config(solver), seed=5, watch=watch)
    jax.effects_barrier()
    return batch


@pytest.mark.parametrize(
    "solver",
    [
        {"solver": "heun", "steps": 3, "guidance": 3.3, "guidance_low": 0.2},
        {"solver": "tsit5", "steps": 40, "rtol": 0.05, "guidance": 1.0},
    ],
    ids=["fixed", "adaptive"],
)
def test_the_path_leads_from_the_noise_to_the_same_image(sampler, solver):
    told = []
    plain, watched = drawn(sampler, **solver), drawn(sampler, Watch(5, told.append), **solver)
    np.testing.assert_array_equal(watched.images, plain.images)
    np.testing.assert_array_equal(watched.latents, plain.latents)
    assert watched.path.shape == (3, 5, 16, 8, 8) and plain.path is None
    noise = sampling.image_noise(5, jnp.arange(3), (16, 8, 8))
    np.testing.assert_allclose(watched.path[:, 0], noise, atol=1e-5)
    np.testing.assert_allclose(watched.path[:, -1], watched.latents, atol=1e-5)
    assert len(told) >= 3 and max(told) == pytest.approx(1) and all(0 < fraction <= 1.0001 for fraction in told)


def test_other_weights_of_guidance_compile_nothing(sampler, caplog):
    solver = {"solver": "euler", "steps": 2}
    one = drawn(sampler, guidance=2.0, **solver)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        other = drawn(sampler, guidance=6.0, guidance_high=0.7, **solver)
    assert [record.message for record in caplog.records if "ompil" in record.message] == []
    assert not np.array_equal(one.latents, other.latents)
    weak = drawn(sampler, guidance=1.0, **solver)
    np.testing.assert_allclose(drawn(sampler, guidance=1.000001, **solver).latents, weak.latents, atol=1e-3)


def test_a_sampler_keeps_a_bounded_number_of_compiled_functions(sampler, monkeypatch):
    monkeypatch.setattr(sampling, "MOST_COMPILED", 2)
    for steps in (1, 2, 3):
        sampler.drawing(sampler.sampler_config({"steps": steps}), 0)
    assert len(sampler._compiled) == 2
