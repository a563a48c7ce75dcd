"""Scaled dot-product attention: by cuDNN for shapes where it was checked against XLA, by XLA for all others."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from flowdit.errors import first_line

logger = logging.getLogger(__name__)


class AttentionShape(NamedTuple):
    """The shape that a kernel is chosen for: unmasked self-attention, or with `key_tokens` masked attention to as many keys."""

    head_dim: int
    tokens: int
    key_tokens: int | None = None

    def __str__(self) -> str:
        to = f" to {self.key_tokens}" if self.key_tokens else ""
        return f"head size {self.head_dim}, {self.tokens} tokens{to}"


Kernels = frozenset[AttentionShape]
"""The shapes computed by cuDNN; all others use XLA."""

NO_KERNELS: Kernels = frozenset()
LAYER_KINDS = ("auto", "plain", "fast")
"""How the layers of a block are computed, by `model.kernels`."""
# A user context is part of the keys of JAX's caches, so a function traced with other kernels is traced again.
_current_kernels = jax.make_user_context(default_value=NO_KERNELS)


def use_kernels(kernels: Kernels) -> AbstractContextManager[None]:
    """A context in which functions are traced with these kernels."""
    return _current_kernels(kernels)


_is_fast = jax.make_user_context(default_value=False)


def use_fast_layers(is_fast: bool) -> AbstractContextManager[None]:
    """A context in which blocks are traced with the layers of `models.fast`, or without."""
    return _is_fast(is_fast)


def is_fast() -> bool:
    """Whether blocks use the layers of `models.fast` here."""
    return _is_fast.value


def attend(
    query: Float[Array, "tokens heads dim"],
    key: Float[Array, "key_tokens heads dim"],
    value: Float[Array, "key_tokens heads dim"],
    mask: Bool[Array, " key_tokens"] | None = None,
) -> Float[Array, "tokens heads dim"]:
    """Scaled dot-product attention of one example to the keys where `mask` is True; to all keys if it is False everywhere.

    Uses cuDNN if the shape is in the kernels of `use_kernels` and the query has 16 bits; cuDNN supports no other dtype.
    """
    use_cudnn = query.dtype.itemsize == 2 and _shape(query, key, mask) in _current_kernels.value
    if mask is not None:
        # Kernels differ on a row without any key; some return NaN.
        mask = mask | ~mask.any()
        # cuDNN's vmap rule needs a mask of the full shape; XLA broadcasts it without a copy.
        lead = (query.shape[1], query.shape[0]) if use_cudnn else (1, 1)
        mask = jnp.broadcast_to(mask[None, None], (*lead, mask.shape[0]))
    with jax.numpy_dtype_promotion("standard"):  # JAX's own code mixes bfloat16 and float32
        implementation = "cudnn" if use_cudnn else "xla"
        return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation=implementation)


def _shape(query: Array, key: Array, mask: Array | None) -> AttentionShape | None:
    """None for unmasked attention to another number of keys, which `AttentionShape` does not describe."""
    if mask is None and len(key) != len(query):
        return None
    return AttentionShape(query.shape[2], len(query), None if mask is None else len(key))


def choose_kernels(platform: str, dtype: str, shapes: Iterable[AttentionShape]) -> Kernels:
    """Those of `shapes` that cuDNN can compute in `dtype` on `platform`. Must not be called within a trace.

    `platform` is `device.platform` of the devices that the program is compiled for: "gpu" for NVIDIA and AMD ("cuda" is
    accepted too); AMD has no cuDNN and fails the check. Only bfloat16 on GPUs is checked, everything else uses XLA.
    cuDNN rejects some head sizes, and has returned NaN gradients for some lengths, so each shape is run once, forward
    and backward, and compared with XLA on a GPU of this process.

    If this process has no GPU, nothing can be run. cuDNN is then used for the shapes that pass JAX's own checks in a
    trace (in JAX 0.10 even lengths and head sizes up to 128 divisible by 8), and wrong numbers are not detected. If JAX
    was built without cuDNN, tracing fails and XLA is used.
    """
    return frozenset(shape for shape in dict.fromkeys(shapes) if not why_not_cudnn(platform, dtype, shape))


def describe_kernels(platform: str, dtype: str, shapes: Iterable[AttentionShape]) -> str:
    """How each of `shapes` is computed, for the log; of those not by cuDNN, why. The arguments are `choose_kernels`'s."""
    reasons = {shape: why_not_cudnn(platform, dtype, shape) for shape in dict.fromkeys(shapes)}
    if len(set(reasons.values())) == 1 and (why := next(iter(reasons.values()))):
        return f"attention by XLA ({why})"
    names = {shape: f"{'cross' if shape.key_tokens else 'self'}-attention ({shape})" for shape in reasons}
    return ", ".join(f"{names[shape]} by {f'XLA: {why}' if why else 'cuDNN'}" for shape, why in reasons.items())


def why_not_cudnn(platform: str, dtype: str, shape: AttentionShape) -> str:
    """Why cuDNN does not compute `shape`; empty if it does. The arguments are those of `choose_kernels`."""
    if platform not in ("gpu", "cuda"):
        return f"cuDNN needs an NVIDIA GPU, not {platform}"
    if dtype != "bfloat16":
        return f"cuDNN needs bfloat16, not {dtype}"
    return failed_check(shape)


@functools.cache
def failed_check(shape: AttentionShape) -> str:
    """Why cuDNN cannot be used for `shape`, also a warning: unsupported or, on a GPU of this process, not equal to XLA.

    Empty if it can.
    """
    device, kernels = _local_gpu(), frozenset({shape})
    try:
        if device is None:
            jax.eval_shape(lambda: output_and_gradients(kernels, _random_inputs(shape)))
            return ""
        with jax.default_device(device):
            error = relative_error(kernels, shape)
    except Exception as problem:  # kernel, driver or library may fail in many ways
        reason = first_line(problem)
    else:
        if error < 0.05:  # bfloat16 has 8 significant bits; NaN compares false
            return ""
        reason = f"relative error {error:.3g} against XLA"
    logger.warning("cuDNN attention is not used (%s): %s", shape, reason)
    return reason


def _local_gpu() -> jax.Device | None:
    try:
        return jax.local_devices(backend="gpu")[0]
    except RuntimeError:  # raised by JAX if there is none
        return None


def relative_error(kernels: Kernels, shape: AttentionShape) -> float:
    """Largest relative error of output and gradients with `kernels` compared with XLA."""
    inputs = _random_inputs(shape)
    pairs = zip(output_and_gradients(kernels, inputs), output_and_gradients(NO_KERNELS, inputs), strict=True)
    errors = [jnp.linalg.norm(a - b) / jnp.linalg.norm(b) for a, b in pairs]
    return float(jnp.stack(errors).max())  # NaN if any is; Python's `max` would ignore it


def _random_inputs(shape: AttentionShape) -> list[Array]:
    """Query, key, value and, with `key_tokens`, a mask in bfloat16: two examples of two heads."""
    keys, key_tokens = jax.random.split(jax.random.key(0), 3), shape.key_tokens or shape.tokens
    lengths = (shape.tokens, key_tokens, key_tokens)
    inputs = [jax.random.normal(k, (2, n, 2, shape.head_dim), jnp.bfloat16) for k, n in zip(keys, lengths, strict=True)]
    if shape.key_tokens:
        valid = jnp.asarray([[max(1, key_tokens // 3)], [key_tokens]])
        inputs.append(jnp.arange(key_tokens)[None] < valid)
    return inputs


def output_and_gradients(kernels: Kernels, inputs: list[Array]) -> list[Array]:
    """Gradients and output in float32, vmapped over the examples like the models."""

    def loss(*inputs):
        with use_kernels(kernels):
            out = jax.vmap(attend)(*inputs)
        return jnp.square(out.astype(jnp.float32)).sum(), out

    grads, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*inputs)
    return [x.astype(jnp.float32) for x in (*grads, out)]
