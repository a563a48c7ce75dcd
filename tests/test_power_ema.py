"""Power-function averages: their profile, and the reconstruction of any width, against direct computation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowdit.fields import FieldError
from flowdit.power_ema import MAX_WIDTH, Average, check_width, exponent, newest_share, reconstruct

UPDATES = 4000
WIDTHS = (0.05, 0.1)


@pytest.fixture(scope="module")
def trajectory() -> np.ndarray:
    """Weights after each update: a smooth path with noise, as in training, and one weight that never changes."""
    time = np.linspace(0, 1, UPDATES)[:, None]
    noise = np.random.default_rng(0).standard_normal((UPDATES, 2)) * 0.1
    return np.concatenate([np.exp(-3 * time), np.sin(5 * time), np.full_like(time, 7.0), noise], axis=1)


def directly(trajectory: np.ndarray, width: float) -> np.ndarray:
    """The average at the end: each update counts with the integral of the profile over its unit of time."""
    edges = (np.arange(len(trajectory) + 1) / len(trajectory)) ** (exponent(width) + 1)
    return np.diff(edges) @ trajectory


def averaged(trajectory: np.ndarray, width: float, until: int) -> np.ndarray:
    """The average that the training step keeps."""

    def update(average, pair):
        number, weights = pair
        return average + newest_share(number, width) * (weights - average), None

    numbers, weights = jnp.arange(1, until + 1), jnp.asarray(trajectory[:until], jnp.float32)
    return np.asarray(jax.jit(lambda *pairs: jax.lax.scan(update, weights[0] * 0 + 99, pairs)[0])(numbers, weights))


@pytest.mark.parametrize("width", [0.01, 0.05, 0.1, 0.2, 0.28])
def test_the_exponent_has_this_width(width):
    """The standard deviation of the profile (gamma + 1) tau^gamma over [0, 1], numerically."""
    gamma = exponent(width)
    edges = np.linspace(0, 1, 200_001)
    mass, middle = np.diff(edges ** (gamma + 1)), (edges[1:] + edges[:-1]) / 2
    assert np.sqrt(mass @ middle**2 - (mass @ middle) ** 2) == pytest.approx(width, rel=1e-4)


def test_known_exponents():
    """Of the paper: 16.97 for a width of 0.05, 6.94 for 0.10."""
    assert [round(exponent(width), 2) for width in WIDTHS] == [16.97, 6.94]


@pytest.mark.parametrize("width", WIDTHS)
def test_an_average_kept_step_by_step_is_the_profile(trajectory, width):
    np.testing.assert_allclose(averaged(trajectory, width, UPDATES), directly(trajectory, width), atol=2e-5)


def test_the_first_weights_do_not_count_and_late_shares_are_not_rounded_away():
    assert float(newest_share(jnp.asarray(1), 0.05)) == 1.0
    late = 400_000
    exact = 1 - (1 - 1 / late) ** (exponent(0.1) + 1)
    assert float(newest_share(jnp.asarray(late), 0.1)) == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize(("width", "limit"), [(0.03, 0.02), (0.05, 1e-6), (0.08, 0.002), (0.1, 1e-6), (0.2, 0.02)])
def test_any_width_is_reconstructed_from_snapshots(trajectory, width, limit):
    times = range(UPDATES // 20, UPDATES + 1, UPDATES // 20)
    stored = [Average(w, t) for t in times for w in WIDTHS]
    factors, error = reconstruct(stored, Average(width, UPDATES))
    assert error < 2 * limit and factors.sum() == pytest.approx(1, abs=1e-9)
    snapshots = np.stack([directly(trajectory[: average.updates], average.width) for average in stored])
    made, wanted = factors @ snapshots, directly(trajectory, width)
    assert made[2] == pytest.approx(7.0, abs=1e-6)
    np.testing.assert_allclose(made, wanted, atol=limit)


@pytest.mark.parametrize(
    ("count", "low", "high"), [(1, 0.04, 0.12), (4, 0.04, 0.14), (8, 0.04, 0.21), (16, 0.03, 0.25), (64, 0.01, 0.28)]
)
def test_the_range_of_widths_is_the_documented_one(count, low, high):
    """The table in docs/runs.md."""
    stored = [Average(width, 100_000 * (i + 1) // count) for i in range(count) for width in WIDTHS]
    widths = [round(0.01 * i, 2) for i in range(1, 29)]
    possible = [width for width in widths if reconstruct(stored, Average(width, 100_000)).error <= 0.1]
    assert possible == [width for width in widths if low <= width <= high]


def test_the_error_of_the_profile_is_its_distance():
    """Against a numerical integral, from averages that cannot make the width."""
    stored, wanted = [Average(0.05, 80), Average(0.1, 100)], Average(0.25, 100)
    factors, error = reconstruct(stored, wanted)
    time = (np.arange(200_000) + 0.5) / 2000

    def profile(average):
        gamma = exponent(average.width)
        inside = (gamma + 1) * time**gamma / average.updates ** (gamma + 1)
        return np.where(time <= average.updates, inside, 0)

    apart = profile(wanted) - factors @ np.stack([profile(average) for average in stored])
    assert error == pytest.approx(np.linalg.norm(apart) / np.linalg.norm(profile(wanted)), rel=1e-3)
    assert error > 0.5


@pytest.mark.parametrize("width", [0.0, -0.1, MAX_WIDTH, 0.5])
def test_an_impossible_width_is_refused(width):
    with pytest.raises(FieldError, match=r"^ema_width: must be above 0 and below 0.289, the mean of all weights, got "):
        check_width("ema_width", width)
