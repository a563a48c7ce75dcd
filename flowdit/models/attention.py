"""The attention of all transformers, and which shapes of it cuDNN computes: those where it proves itself; else XLA."""

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
    """What a kernel is chosen by. Without `key_tokens` unmasked self-attention, else masked attention to so many keys."""

    head_dim: int
    tokens: int
    key_tokens: int | None = None


Kernels = frozenset[AttentionShape]
"""The shapes that cuDNN computes; everything else is XLA's."""

NO_KERNELS: Kernels = frozenset()
# Part of the keys of JAX's caches, so that nothing that was traced with other kernels is taken again.
_current_kernels = jax.make_user_context(default_value=NO_KERNELS)


def use_kernels(kernels: Kernels) -> AbstractContextManager[None]:
    """Within it, all that is traced has these kernels."""
    return _current_kernels(kernels)


def attend(
    query: Float[Array, "tokens heads dim"],
    key: Float[Array, "key_tokens heads dim"],
    value: Float[Array, "key_tokens heads dim"],
    mask: Bool[Array, " key_tokens"] | None = None,
) -> Float[Array, "tokens heads dim"]:
    """Scaled dot-product attention of one example to the keys where `mask` is True; to all keys where it is nowhere.

    By cuDNN if its shape is among the kernels of `use_kernels` and the query has 16 bits, which is all cuDNN takes.
    """
    use_cudnn = query.dtype.itemsize == 2 and _shape(query, key, mask) in _current_kernels.value
    if mask is not None:
        # Kernels disagree on a row without any key, and NaN is among their answers.
        mask = mask | ~mask.any()
        # cuDNN's rule for vmap takes a mask of the full shape only; XLA is spared the copies.
        lead = (query.shape[1], query.shape[0]) if use_cudnn else (1, 1)
        mask = jnp.broadcast_to(mask[None, None], (*lead, mask.shape[0]))
    with jax.numpy_dtype_promotion("standard"):  # JAX's own code mixes bfloat16 with float32 in there
        implementation = "cudnn" if use_cudnn else "xla"
        return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation=implementation)


def _shape(query: Array, key: Array, mask: Array | None) -> AttentionShape | None:
    """None for what no `AttentionShape` describes: unmasked attention to another number of keys."""
    if mask is None and len(key) != len(query):
        return None
    return AttentionShape(query.shape[2], len(query), None if mask is None else len(key))


def choose_kernels(platform: str, dtype: str, shapes: Iterable[AttentionShape]) -> Kernels:
    """Those of `shapes` that cuDNN can compute in `dtype` on `platform`. Call it outside of any trace.

    `platform` is that of the devices that the program is compiled for, as `device.platform` has it: "gpu" for NVIDIA's
    and AMD's ("cuda" is taken as well); the latter have no cuDNN and are refused by the probe. Only bfloat16 on GPUs is
    probed, all else is XLA's. cuDNN rejects some head sizes, and has returned NaN gradients for some lengths, so each
    shape is run once, forward and backward, against XLA on a GPU of this process.

    GPUs that this process does not have cannot be asked. For them cuDNN takes the shapes that JAX's own checks let
    through in a trace (in JAX 0.10 head sizes up to 128 that 8 divides, and even lengths); wrong numbers stay unseen.
    Where JAX comes without cuDNN the trace of the program would fail, and everything is XLA's.
    """
    if platform not in ("gpu", "cuda") or dtype != "bfloat16":
        return NO_KERNELS
    return frozenset(shape for shape in dict.fromkeys(shapes) if _cudnn_computes(shape))


@functools.cache
def _cudnn_computes(shape: AttentionShape) -> bool:
    """Whether cuDNN takes `shape` and, where there is a GPU to run it on, agrees with XLA; a warning says why not."""
    device, kernels = _local_gpu(), frozenset({shape})
    try:
        if device is None:
            jax.eval_shape(lambda: _output_and_gradients(kernels, _random_inputs(shape)))
            return True
        with jax.default_device(device):
            error = _relative_error(kernels, shape)
    except Exception as problem:  # the kernel, the driver or the library may refuse in many ways, all mean "no"
        reason = first_line(problem)
    else:
        if error < 0.05:  # bfloat16 keeps 8 bits; NaN compares false
            return True
        reason = f"relative error {error:.3g} against XLA"
    to = f" to {shape.key_tokens}" if shape.key_tokens else ""
    logger.warning(
        "cuDNN attention is not used (head size %d, %d tokens%s): %s", shape.head_dim, shape.tokens, to, reason
    )
    return False


def _local_gpu() -> jax.Device | None:
    try:
        return jax.local_devices(backend="gpu")[0]
    except RuntimeError:  # JAX's answer where there is none
        return None


def _relative_error(kernels: Kernels, shape: AttentionShape) -> float:
    """Largest relative error of output and gradients with `kernels` against XLA's."""
    inputs = _random_inputs(shape)
    pairs = zip(_output_and_gradients(kernels, inputs), _output_and_gradients(NO_KERNELS, inputs), strict=True)
    errors = [jnp.linalg.norm(a - b) / jnp.linalg.norm(b) for a, b in pairs]
    return float(jnp.stack(errors).max())  # NaN if any of them is; Python's `max` would pass over it


def _random_inputs(shape: AttentionShape) -> list[Array]:
    """Query, key, value and perhaps a mask in bfloat16: two examples of two heads."""
    keys, key_tokens = jax.random.split(jax.random.key(0), 3), shape.key_tokens or shape.tokens
    lengths = (shape.tokens, key_tokens, key_tokens)
    inputs = [jax.random.normal(k, (2, n, 2, shape.head_dim), jnp.bfloat16) for k, n in zip(keys, lengths, strict=True)]
    if shape.key_tokens:
        valid = jnp.asarray([[max(1, key_tokens // 3)], [key_tokens]])
        inputs.append(jnp.arange(key_tokens)[None] < valid)
    return inputs


def _output_and_gradients(kernels: Kernels, inputs: list[Array]) -> list[Array]:
    """In float32, vmapped over the examples as the models are."""

    def loss(*inputs):
        with use_kernels(kernels):
            out = jax.vmap(attend)(*inputs)
        return jnp.square(out.astype(jnp.float32)).sum(), out

    grads, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*inputs)
    return [x.astype(jnp.float32) for x in (*grads, out)]
