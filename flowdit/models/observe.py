"""Norms of values inside a network, for the diagnosis of a step. Nothing is computed outside of `observing`.

A value inside `scan`, `vmap` or `checkpoint` leaves it only as a result. So every such function of the networks has a
`collect` around its body and returns what was collected.
"""

from __future__ import annotations

import collections
import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# A user context is part of the keys of JAX's caches, so a function traced without it is traced again.
_is_on = jax.make_user_context(default_value=False)
_collected: contextvars.ContextVar[Observed | None] = contextvars.ContextVar("collected", default=None)

Observed = collections.OrderedDict[str, Any]
"""Statistics by name, in the order of the computation, which JAX does not keep for a dict."""


class Statistics(NamedTuple):
    """Of an array, in float32: the Euclidean norm, and the largest absolute value, NaN if any value is."""

    norm: Float[Array, "*lead"]
    largest: Float[Array, "*lead"]


def observing() -> contextlib.AbstractContextManager[None]:
    """A context in which functions are traced with their observations."""
    return _is_on(True)


@contextlib.contextmanager
def collect() -> Iterator[Observed]:
    """What is observed within; empty outside of `observing`."""
    collected: Observed = collections.OrderedDict()
    token = _collected.set(collected)
    try:
        yield collected
    finally:
        _collected.reset(token)


def observe(name: str, value: Float[Array, "..."]) -> None:
    """Note the statistics of a value under `name`."""
    if _is_on.value:
        note(name, statistics(value))


def observe_logits(
    name: str,
    query: Float[Array, "tokens heads dim"],
    key: Float[Array, "key_tokens heads dim"],
    mask: Bool[Array, " key_tokens"] | None = None,
) -> None:
    """Note the largest absolute attention logit under `name`, over the keys where `mask` is True."""
    if not _is_on.value:
        return

    def largest_of_head(head: tuple[Array, Array]) -> Array:
        query, key = (jax.lax.stop_gradient(x).astype(jnp.float32) for x in head)
        logits = jnp.abs(query @ key.T) / query.shape[-1] ** 0.5
        return (logits if mask is None else jnp.where(mask[None], logits, 0)).max()

    # Head by head, as all logits together may not fit into memory.
    by_head = jax.lax.map(largest_of_head, (query.swapaxes(0, 1), key.swapaxes(0, 1)))
    note(name, by_head.max())


def note(name: str, result: Any) -> None:
    """Note the results of a `collect` further inside, or of another function, under `name`."""
    collected = _collected.get()
    if _is_on.value and collected is not None:
        collected[name] = result


def statistics(value: Float[Array, "..."], lead: int = 0) -> Statistics:
    """Statistics over all axes but the first `lead`. The norm of finite values overflows only if it is too large itself."""
    size = jnp.abs(jax.lax.stop_gradient(value).astype(jnp.float32)).reshape(*value.shape[:lead], -1)
    largest = size.max(-1)
    scale = jnp.where(largest > 0, largest, 1)
    return Statistics(scale * jnp.sqrt(jnp.square(size / scale[..., None]).sum(-1)), largest)
