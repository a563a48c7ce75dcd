"""Networks that predict noise: exact velocities from exact noise, and the same results as diffusers' DDIM."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowdit.diffusion.flow import guided_velocity
from flowdit.diffusion.noise_prediction import FIRST_TIME, LAST_TIME, ddpm_step, start_at_last_time, velocity_from_noise
from flowdit.diffusion.sampling import SamplerConfig, image_noise, sample
from flowdit.models.compute import Compute
from flowdit.models.config import DiTConfig
from flowdit.models.dit import build_dit

pytest.importorskip("torch", reason="needs torch")

import diffusers
import torch

# `set_alpha_to_one`: the last step goes to data, like the flow at t = 0. Without it DDIM stops at the noise of step 0.
DDIM = diffusers.DDIMScheduler(
    beta_start=1e-4,
    beta_end=2e-2,
    beta_schedule="linear",
    clip_sample=False,
    set_alpha_to_one=True,
    timestep_spacing="trailing",
)
SIGNAL = DDIM.alphas_cumprod.double().numpy()
LOG_RATIOS = (0.5 * np.log((1 - SIGNAL) / SIGNAL)).astype(np.float32)
STEP_TIMES = 1 / (1 + np.exp(-LOG_RATIOS))
LABELS = np.array([1, 2], np.int32)
NULL = np.zeros_like(LABELS)
NOISE = image_noise(0, jnp.arange(2), (2, 4, 4))


def mixture_noise(xp, x, time, center, half_distance, spread):
    """E[noise | x] when data are spread by s around m + c or m - c alike, for DDPM's latent x and its step / 1000.

    Divided by alpha, the latent has variance total = s^2 + (sigma / alpha)^2 around each mode; tanh weights them. For
    numpy and JAX.
    """
    ratio = xp.exp(xp.interp(time * 1000, np.arange(1000, dtype=np.float32), LOG_RATIOS))
    x = x * xp.sqrt(1 + ratio**2) - center
    total = spread**2 + ratio**2
    return ratio * (x - half_distance * xp.tanh(half_distance * x / total)) / total


def label_parts(label):
    """Null is spread widely around 1/2 and -1/2, a label narrowly around label / 4 + 1 and - 1."""
    is_null = (label == 0).astype(np.float32)
    return 0.25 * label.astype(np.float32), 1 - 0.5 * is_null, 0.2 + 0.5 * is_null


def network(x, time, label):
    return mixture_noise(jnp, x, time, *label_parts(label))


def gaussian_network(mean, deviation):
    return lambda x, time, label: mixture_noise(jnp, x, time, mean, 0.0, deviation)


def ddim_latents(steps, guidance):
    """diffusers' loop over its own scheduler, with the network in numpy."""
    parts = [label_parts(labels.reshape(-1, 1, 1, 1)) for labels in (LABELS, NULL)]
    x = torch.tensor(np.asarray(NOISE))
    DDIM.set_timesteps(steps)
    for step in DDIM.timesteps:
        time = np.float32(step.item() / 1000)
        cond, null = (mixture_noise(np, x.numpy(), time, *p) for p in parts)
        noise = torch.from_numpy((null + guidance * (cond - null)).astype(np.float32))
        x = DDIM.step(noise, step, x).prev_sample
    return x.numpy()


def euler_latents(steps, guidance):
    config = SamplerConfig(solver="euler", steps=steps, guidance=guidance)
    run = jax.jit(lambda noise: sample(network, noise, jnp.asarray(LABELS), jnp.asarray(NULL), config, "noise"))
    return np.asarray(run(NOISE).latents)


def relative(got, expected):
    return np.linalg.norm(got - expected) / np.linalg.norm(expected)


def test_steps_are_ddpms_and_interpolated_between_them():
    np.testing.assert_allclose(ddpm_step(jnp.asarray(STEP_TIMES)), np.arange(1000), atol=5e-3)
    between = 1 / (1 + np.exp(-(LOG_RATIOS[1:] + LOG_RATIOS[:-1]) / 2))
    np.testing.assert_allclose(ddpm_step(jnp.asarray(between)), np.arange(999) + 0.5, atol=5e-3)
    np.testing.assert_array_equal(ddpm_step(jnp.asarray([0.0, FIRST_TIME / 2])), 0)
    np.testing.assert_allclose([FIRST_TIME, LAST_TIME], STEP_TIMES[[0, -1]], rtol=2e-4)  # float32 betas there


@pytest.mark.parametrize("deviation", [0.0, 0.5])
def test_exact_noise_of_a_gaussian_is_its_exact_velocity(deviation):
    """A point mass has (x - m) / t; N(m, s^2) the velocity of tests/diffusion/test_sampling.py."""
    mean, x = 0.7, image_noise(1, jnp.arange(1), (2, 4, 4))[0]
    velocity = jax.jit(velocity_from_noise(gaussian_network(mean, deviation)))
    for t in [FIRST_TIME, 0.1, 0.37, 0.5, 0.9, 0.99, LAST_TIME]:
        total = (1 - t) ** 2 * deviation**2 + t**2
        expected = (t - (1 - t) * deviation**2) / total * (x - (1 - t) * mean) - mean
        assert relative(velocity(x, jnp.float32(t), jnp.asarray(0)), expected) < 2e-4, t


def test_solve_ends_where_the_exact_flow_of_a_gaussian_does():
    mean, deviation = 0.7, 0.5
    labels, config = jnp.asarray(LABELS), SamplerConfig(steps=64, guidance=1.0)
    got = sample(gaussian_network(mean, deviation), NOISE, labels, labels, config, "noise").latents
    t = LAST_TIME
    standard = (start_at_last_time(NOISE) - (1 - t) * mean) / np.sqrt((1 - t) ** 2 * deviation**2 + t**2)
    assert relative(got, mean + deviation * standard) < 5e-3


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_euler_on_ddims_times_is_ddim(guidance):
    """Both move along the line through the predicted data and noise, so they are equal up to rounding."""
    DDIM.set_timesteps(20)
    times = np.append(STEP_TIMES[DDIM.timesteps.numpy()], 0).astype(np.float32)
    velocity = velocity_from_noise(network)

    def step(x, pair):
        v = guided_velocity(velocity, x, pair[0], jnp.asarray(LABELS), jnp.asarray(NULL), guidance)
        return x + (pair[1] - pair[0]) * v, None

    got, _ = jax.lax.scan(step, start_at_last_time(NOISE), jnp.stack([times[:-1], times[1:]], axis=1))
    assert relative(got, ddim_latents(20, guidance)) < 1e-4


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_solve_and_ddim_meet_as_their_steps_grow(guidance):
    """They differ in their times, and below DDPM's first step, where only the flow evaluates the network."""
    apart = [relative(euler_latents(n, guidance), ddim_latents(n, guidance)) for n in (50, 200, 1000)]
    assert apart[0] > 2 * apart[1] > 4 * apart[2] and apart[2] < 2e-3


def test_velocity_is_the_default_and_starts_from_the_noise_itself():
    """A field that depends only on the time: one Euler step from t = 1 shows time, start and end."""
    labels, config = jnp.asarray(LABELS), SamplerConfig(solver="euler", steps=1, guidance=1.0)
    field = lambda x, t, label: t * jnp.ones_like(x)
    plain = sample(field, NOISE, labels, labels, config).latents
    np.testing.assert_array_equal(plain, NOISE - 1)
    np.testing.assert_array_equal(plain, sample(field, NOISE, labels, labels, config, "velocity").latents)


@pytest.mark.parametrize("settings", [dict(solver="euler"), dict(time_shift=2.0), dict(solver="tsit5", rtol=1e-2)])
def test_network_is_only_evaluated_at_times_of_the_schedule(settings):
    seen = []

    def recording(x, time, label):
        jax.debug.callback(lambda time: seen.append(float(time)), time)
        return network(x, time, label)

    labels = jnp.asarray(LABELS)
    config = SamplerConfig(steps=1000 if "rtol" in settings else 8, guidance=1.0, **settings)
    result = sample(recording, NOISE, labels, labels, config, "noise")
    jax.effects_barrier()
    assert np.isfinite(result.latents).all()
    assert min(seen) >= 0 and max(seen) == pytest.approx(0.999, abs=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_is_finite_from_the_last_time_to_data(dtype):
    model = build_dit(DiTConfig(depth=1, hidden_dim=16, num_heads=2), 2, 2, key=jax.random.key(0))
    model = Compute(dtype).cast(jax.tree.map(lambda leaf: leaf + 0.1, model))

    @jax.jit
    def run(model, x):
        times = jnp.asarray([0.0, LAST_TIME])
        labels = jnp.asarray(LABELS)
        velocity = jax.vmap(velocity_from_noise(model))(x, times, labels)
        return velocity, sample(model, x, labels, labels, SamplerConfig(solver="euler", steps=4), "noise").latents

    for values in run(model, NOISE):
        assert values.dtype == jnp.float32 and jnp.isfinite(values).all()


def test_other_predictions_are_refused():
    labels = jnp.asarray(LABELS)
    with pytest.raises(ValueError, match="^prediction: must be one of velocity, noise, got 'x_0'$"):
        sample(network, NOISE, labels, labels, SamplerConfig(), "x_0")
