"""Networks that predict noise on the DDPM schedule (DiT, PixArt-alpha) as velocity fields of flow time.

Both processes are mixtures of data and noise that differ only by a scale: DDPM's alpha x_0 + sigma noise, over alpha +
sigma, is x_t = (1 - t) x_0 + t noise at t = sigma / (alpha + sigma) (Kingma et al. 2021, section 4.1; Karras et al.
2022, appendix C). Euler steps of this velocity are DDIM's (Song et al. 2021, equation 12) on the same times.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from flowdit.diffusion.flow import Velocity

STEPS = 1000
BETA_RANGE = (1e-4, 2e-2)
"""Linear betas over `STEPS` steps (Ho et al. 2020, section 4), as in DiT and PixArt-alpha."""


def _log_ratios() -> np.ndarray:
    signal = np.cumprod(1.0 - np.linspace(*BETA_RANGE, STEPS))
    return 0.5 * np.log((1.0 - signal) / signal)


# Computed in float64, and numpy arrays outside the models, so that a cast to bfloat16 does not affect them.
_STEP_TIMES = (1.0 / (1.0 + np.exp(-_log_ratios()))).astype(np.float32)
_LOG_RATIOS = _log_ratios().astype(np.float32)
_STEP_INDICES = np.arange(STEPS, dtype=np.float32)

FIRST_TIME = float(_STEP_TIMES[0])
"""The flow time of DDPM's step 0, just above data at 0."""
LAST_TIME = float(_STEP_TIMES[-1])
"""The flow time of DDPM's last step, just below pure noise at 1: such a network is not trained above it."""


def ddpm_step(t: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """The (fractional) step in [0, 999] whose sigma / alpha is t / (1 - t).

    Interpolated in log(sigma / alpha), half the negative log-SNR; step 0 below `FIRST_TIME`.
    """
    t = jnp.clip(t, FIRST_TIME, LAST_TIME)
    return jnp.interp(jnp.log(t / (1 - t)), _LOG_RATIOS, _STEP_INDICES)


def scale_at(t: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """x_t over DDPM's latent at the same ratio of noise to data: sqrt((1 - t)^2 + t^2), as alpha^2 + sigma^2 = 1."""
    return jnp.sqrt(jnp.square(1 - t) + jnp.square(t))


def start_at_last_time(noise: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The input of DDPM's last step, `noise` of unit variance, as a latent of flow time `LAST_TIME`."""
    return noise * scale_at(jnp.float32(LAST_TIME))


def velocity_from_noise(model: Velocity) -> Velocity:
    """Convert `model`, which returns the noise, to a velocity field for t in [0, `LAST_TIME`].

    The model gets DDPM's latent, and step / `STEPS` as the time, as networks multiply times by 1000. With its noise n,
    x_0 = (x_t - t n) / (1 - t), so v = n - x_0 = (n - x_t) / (1 - t).
    """

    def velocity(x_t: Array, t: Array, condition: Any) -> Array:
        noise = model(x_t / scale_at(t), ddpm_step(t) / STEPS, condition)
        return (noise - x_t) / (1 - t)

    return velocity
