"""The mathematics of flow matching against closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowdit.diffusion import flow
from flowdit.diffusion.objective import time_bins


def test_path_ends_and_velocity():
    x_0, noise = jnp.array([1.0, 2.0]), jnp.array([5.0, -2.0])
    np.testing.assert_array_equal(flow.interpolate(x_0, noise, jnp.asarray(0.0)), x_0)
    np.testing.assert_array_equal(flow.interpolate(x_0, noise, jnp.asarray(1.0)), noise)
    slope = jax.jvp(lambda t: flow.interpolate(x_0, noise, t), (jnp.asarray(0.3),), (jnp.asarray(1.0),))[1]
    np.testing.assert_allclose(slope, flow.velocity_target(x_0, noise))


def test_times_follow_their_distribution():
    keys = jax.random.split(jax.random.key(0), 20_000)
    uniform = jax.vmap(lambda key: flow.sample_time(key, "uniform"))(keys)
    normal = jax.vmap(lambda key: flow.sample_time(key, "logit_normal"))(keys)
    assert jnp.abs(uniform.mean() - 0.5) < 0.01 and jnp.abs(uniform.var() - 1 / 12) < 0.002
    logits = jnp.log(normal / (1 - normal))
    assert jnp.abs(logits.mean()) < 0.03 and jnp.abs(logits.std() - 1) < 0.03


def test_shift_is_the_equation_and_keeps_the_ends():
    t = jnp.array([0.0, 0.25, 0.5, 1.0])
    np.testing.assert_allclose(flow.shift_times(t, 3.0), [0, 0.75 / 1.5, 1.5 / 2, 1], rtol=1e-6)
    np.testing.assert_array_equal(flow.shift_times(t, 1.0), t)
    assert flow.resolution_shift((16, 32, 32)) == 2


def test_drop_replaces_whole_examples_at_the_rate():
    condition = {"label": jnp.arange(10_000), "text": jnp.ones((10_000, 3))}
    null = {"label": jnp.asarray(-1), "text": jnp.zeros(3)}
    keys = jax.random.split(jax.random.key(0), 10_000)
    dropped = jax.vmap(lambda key, example: flow.drop_condition(key, example, null, 0.1))(keys, condition)
    rows = dropped["label"] == -1
    assert jnp.abs(rows.mean() - 0.1) < 0.01
    np.testing.assert_array_equal(rows, (dropped["text"] == 0).all(1))
    np.testing.assert_array_equal(dropped["label"][~rows], condition["label"][~rows])


@pytest.mark.parametrize(("rate", "kept"), [(0.0, 1.0), (1.0, 0.0)])
def test_drop_rate_ends(rate, kept):
    keys = jax.random.split(jax.random.key(0), 50)
    dropped = jax.vmap(lambda key: flow.drop_condition(key, jnp.ones(()), jnp.zeros(()), rate))(keys)
    assert dropped.mean() == kept


def test_loss_is_zero_for_the_true_velocity_and_per_example():
    x_0, noise = jax.random.normal(jax.random.key(0), (2, 5, 3, 2, 2))
    target = {"v": noise - x_0}
    t = jnp.linspace(0.1, 0.9, 5)
    errors = lambda model: jax.vmap(functools.partial(flow.predict, model))(x_0, noise, t, target).error
    losses = errors(lambda x, t, c: c["v"])
    np.testing.assert_allclose(losses, jnp.zeros(5), atol=1e-12)
    off = errors(lambda x, t, c: c["v"] + t)
    np.testing.assert_allclose(off, t**2, rtol=1e-4)


def test_time_bins_partition_the_batch():
    t = jnp.array([0.0, 0.1, 0.124, 0.125, 0.5, 0.999, 1.0])
    sums, counts = time_bins(jnp.ones(7) * 2, t)
    np.testing.assert_array_equal(counts, [3, 1, 0, 0, 1, 0, 0, 2])
    np.testing.assert_array_equal(sums, 2 * counts)


def test_normalisation_round_trip_per_channel():
    latent = jax.random.normal(jax.random.key(0), (2, 3, 4, 4))
    mean, scale = jnp.array([1.0, 2.0, 3.0]), jnp.array([0.5, 1.0, 2.0])
    normal = flow.normalise_latents(latent, mean, scale)
    np.testing.assert_allclose(normal[:, 2], (latent[:, 2] - 3) * 2, rtol=1e-6)
    np.testing.assert_array_equal(flow.normalise_latents(latent[1], mean, scale), normal[1])
    np.testing.assert_allclose(flow.denormalise_latents(normal, mean, scale), latent, rtol=1e-5, atol=1e-6)


def velocity_of_label(x, t, label):
    return jnp.full_like(x, 1.0) * label.astype(jnp.float32)


@pytest.mark.parametrize(("t", "expected"), [(0.5, 7.0 + 3 * (2.0 - 7.0)), (0.1, 2.0), (0.95, 2.0)])
def test_guidance_acts_on_all_channels_inside_its_interval(t, expected):
    x = jnp.zeros((2, 4, 2, 2))
    v = flow.guided_velocity(
        velocity_of_label,
        x,
        jnp.asarray(t),
        jnp.array([2, 2]),
        jnp.array([7, 7]),
        guidance=3.0,
        interval=(0.2, 0.9),
    )
    np.testing.assert_allclose(v, jnp.full(x.shape, expected))
