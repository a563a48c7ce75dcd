"""Estimates of a run before anything is compiled: parameters, floating-point operations, memory and time."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flowdit.hardware import Machine
from flowdit.models.config import DiTConfig, ModelConfig, PixArtConfig
from flowdit.models.dit import build_dit
from flowdit.models.flops import training_flops
from flowdit.models.pixart import TextCondition, build_pixart

BASE_MEMORY = 0.8e9
"""Bytes of a process that has imported JAX and compiled a step."""
STATE_BYTES = 20
"""Bytes per parameter: the model, two moments, EMA and gradient, all in float32."""
SAVED_PER_TOKEN = 50
SAVED_PER_TOKEN_TEXT = 65
SAVED_PER_TEXT_TOKEN = 4
"""Numbers that the backward pass keeps per block, over the width; measured with XLA's memory analysis on CPU."""
LOGITS_KEPT = 2.2
"""The same per attention logit."""
OVERHEAD = 1.1
"""Validation, previews, saving and logging, as a factor of the time of the steps."""
SHORTEST_STEP = 0.03
"""Seconds that the host needs for a step, however fast the devices are."""


class Condition(NamedTuple):
    """What a network reads besides latents: a class out of `num_classes`, or `text_tokens` features of `text_width`."""

    num_classes: int = 0
    text_tokens: int = 0
    text_width: int = 0


class NetworkSize(NamedTuple):
    """Number of parameters, and training FLOPs of one image."""

    parameters: int
    image_flops: int


def network_size(model: ModelConfig, latent_shape: tuple[int, int, int], condition: Condition) -> NetworkSize:
    """Exact figures from shapes alone. Raises `FieldError` for a model that cannot be built on these latents."""
    model.check(latent_shape)
    key, channels = jax.random.key(0), latent_shape[0]
    given = _array(dtype=jnp.int32)
    if isinstance(model, PixArtConfig):
        tokens, width = condition.text_tokens, condition.text_width
        network = jax.eval_shape(lambda: build_pixart(model, channels, width, key=key))
        given = TextCondition(
            _array(tokens, width), _array(tokens, dtype=jnp.bool_), _array(dtype=jnp.bool_), _array(2)
        )
    else:
        assert isinstance(model, DiTConfig)
        network = jax.eval_shape(lambda: build_dit(model, channels, condition.num_classes, key=key))
    run = lambda network, x_t, t, given: network(x_t, t, given)
    flops = training_flops(run, network, _array(*latent_shape), _array(), given)
    return NetworkSize(sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(network)), flops)


def _array(*shape: int, dtype: Any = jnp.float32) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


def step_memory(
    model: ModelConfig,
    latent_shape: tuple[int, int, int],
    condition: Condition,
    *,
    parameters: int,
    images: int,
    dtype: str,
    first_moment_dtype: str = "float32",
) -> float:
    """About the bytes of a training step on `images` images of one device, without rematerialisation or sharding."""
    tokens = latent_shape[1] * latent_shape[2] // model.patch_size**2
    if condition.text_tokens:
        kept = SAVED_PER_TOKEN_TEXT * tokens + SAVED_PER_TEXT_TOKEN * condition.text_tokens
    else:
        kept = SAVED_PER_TOKEN * tokens
    logits = model.num_heads * tokens * (tokens + condition.text_tokens)
    numbers = images * model.depth * (kept * model.hidden_dim + LOGITS_KEPT * logits)
    state = (STATE_BYTES - 4 + jnp.dtype(first_moment_dtype).itemsize) * parameters
    return BASE_MEMORY + state + numbers * jnp.dtype(dtype).itemsize


def step_seconds(size: NetworkSize, batch_size: int, machine: Machine) -> float:
    """About the seconds of a step, with its share of validation, previews and saving."""
    return OVERHEAD * max(size.image_flops * batch_size / machine.flops, SHORTEST_STEP)


def duration(seconds: float) -> str:
    """A duration in words, as exact as an estimate: "20 seconds", "1.7 minutes"."""
    for limit, unit, name in ((90, 1, "seconds"), (90 * 60, 60, "minutes"), (36 * 3600, 3600, "hours")):
        if seconds < limit:
            return f"{float(f'{seconds / unit:.2g}'):g} {name}"
    return f"{float(f'{seconds / 86400:.2g}'):g} days"
