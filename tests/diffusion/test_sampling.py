"""The ODE solve: exact cases, the order of each solver, and counts of evaluations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowdit.diffusion.sampling import (
    ADAPTIVE_SOLVERS,
    SOLVERS,
    UNSOLVED,
    SamplerConfig,
    check_count,
    check_solved,
    image_noise,
    sample,
)

LABELS = jnp.array([1, 2])
NULL = jnp.zeros_like(LABELS)
ORDER = {"euler": 1, "heun": 2, "midpoint": 2, "dopri5": 5, "tsit5": 5}


def gaussian_velocity(x, t, label):
    """Exact velocity when the data are N(mean, 0.5^2) with mean = label: E[noise - x_0 | x_t]."""
    mean, variance = label.astype(jnp.float32), 0.25
    total = (1 - t) ** 2 * variance + t**2
    residual = x - (1 - t) * mean
    return (t - (1 - t) * variance) / total * residual - mean


def exact_end(noise, label):
    return label.astype(jnp.float32).reshape(-1, 1, 1, 1) + 0.5 * noise


def solve(solver, steps, **settings):
    noise = image_noise(0, jnp.arange(2), (1, 4, 4))
    config = SamplerConfig(solver=solver, steps=steps, guidance=1.0, **settings)
    result = jax.jit(lambda noise: sample(gaussian_velocity, noise, LABELS, NULL, config))(noise)
    return float(jnp.abs(result.latents - exact_end(noise, LABELS)).max()), int(result.evaluations.max())


@pytest.mark.parametrize("solver", SOLVERS)
def test_converges_to_the_exact_flow_at_the_solvers_order(solver):
    coarse, fine = solve(solver, 8)[0], solve(solver, 16)[0]
    assert fine < 5e-6 or np.log2(coarse / fine) > ORDER[solver] - 0.4
    assert fine < {1: 0.3, 2: 0.03, 5: 1e-3}[ORDER[solver]]


@pytest.mark.parametrize("solver", SOLVERS)
def test_evaluations_are_counted_correctly(solver):
    calls = []

    def counting_velocity(x, t, label):
        jax.debug.callback(lambda: calls.append(1))
        return gaussian_velocity(x, t, label)

    noise = image_noise(0, jnp.arange(1), (1, 2, 2))
    result = sample(counting_velocity, noise, LABELS[:1], NULL[:1], SamplerConfig(solver=solver, steps=5, guidance=1.0))
    jax.effects_barrier()
    assert int(result.evaluations.max()) == len(calls)


@pytest.mark.parametrize("solver", ADAPTIVE_SOLVERS)
def test_adaptive_steps_meet_their_tolerance_with_fewer_evaluations_when_it_is_loose(solver):
    tight, many = solve(solver, 4096, rtol=1e-4)
    loose, few = solve(solver, 4096, rtol=1e-2)
    assert tight < 2e-3 and tight < loose < 0.2 and few < many


def test_adaptive_solve_that_runs_out_of_steps_is_marked_and_refused():
    config = SamplerConfig(solver="heun", steps=3, rtol=1e-6)
    noise = image_noise(0, jnp.arange(2), (1, 4, 4))
    evaluations = np.asarray(sample(gaussian_velocity, noise, LABELS, NULL, config).evaluations)
    assert (evaluations == UNSOLVED).all()
    with pytest.raises(ValueError, match=r"^steps: must be more for rtol=1e-06, got 3$"):
        check_solved(evaluations, config)


def test_time_shift_moves_the_grid_and_not_the_end():
    assert solve("heun", 24, time_shift=2.0)[0] < 0.03
    assert solve("heun", 24, time_shift=2.0)[0] != solve("heun", 24)[0]


def test_guidance_through_the_solver():
    """With v = label everywhere, x(0) = noise - v_guided."""
    noise = image_noise(0, jnp.arange(2), (1, 2, 2))
    field = lambda x, t, label: jnp.ones_like(x) * label.astype(jnp.float32)
    latents = sample(field, noise, LABELS, NULL, SamplerConfig(solver="euler", steps=4, guidance=3.0)).latents
    np.testing.assert_allclose(
        latents, noise - 3.0 * LABELS.reshape(2, 1, 1, 1).astype(jnp.float32), rtol=1e-5, atol=1e-5
    )


def test_an_image_does_not_depend_on_how_many_are_drawn():
    np.testing.assert_array_equal(
        image_noise(3, jnp.arange(2), (1, 2, 2)), image_noise(3, jnp.arange(5), (1, 2, 2))[:2]
    )


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        (dict(solver="rk9"), "solver"),
        (dict(steps=0), "steps"),
        (dict(guidance_low=0.8, guidance_high=0.2), "guidance_low/guidance_high"),
        (dict(solver="euler", rtol=1e-3), "rtol"),
        (dict(time_shift=0.0), "time_shift"),
    ],
)
def test_impossible_samplers_are_refused_by_name(settings, field):
    with pytest.raises(ValueError, match=f"^{field}: "):
        SamplerConfig(**settings).check()


@pytest.mark.parametrize(
    ("value", "message"), [(0, "at least 1, got 0"), (2.5, "a whole number, got 2.5"), (True, "a whole")]
)
def test_counts_are_whole_numbers(value, message):
    check_count("steps", np.int64(3))
    with pytest.raises(ValueError, match=f"^steps: must be {message}"):
        check_count("steps", value)
