"""The attention of all transformers, and which kernel it may use: cuDNN where it proves itself, XLA elsewhere."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def attend(
    query: Float[Array, "tokens heads dim"],
    key: Float[Array, "key_tokens heads dim"],
    value: Float[Array, "key_tokens heads dim"],
    mask: Bool[Array, " key_tokens"] | None = None,
    implementation: str = "xla",
) -> Float[Array, "tokens heads dim"]:
    """Scaled dot-product attention of one example to the keys where `mask` is True; to all keys where it is nowhere."""
    if mask is not None:
        # Kernels disagree on a row without any key, and NaN is among their answers.
        mask = mask | ~mask.any()
        # cuDNN's rule for vmap takes a mask of the full shape only; XLA is spared the copies.
        lead = (query.shape[1], query.shape[0]) if implementation == "cudnn" else (1, 1)
        mask = jnp.broadcast_to(mask[None, None], (*lead, mask.shape[0]))
    with jax.numpy_dtype_promotion("standard"):  # JAX's own code mixes bfloat16 with float32 in there
        return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation=implementation)  # type: ignore[arg-type]


@functools.cache
def attention_implementation(head_dim: int, num_tokens: int, compute_dtype: str, key_tokens: int | None = None) -> str:
    """`"cudnn"` if the device is a GPU and its kernel agrees with XLA on random input, else `"xla"`.

    cuDNN takes 16-bit inputs only, rejects some head sizes, and has returned NaN gradients for some lengths, so the
    very shape to be trained is run once, forward and backward, before the model is built: self-attention over
    `num_tokens`, or, given `key_tokens`, masked cross-attention to them. Call it outside of jit.
    """
    if jax.default_backend() != "gpu" or compute_dtype != "bfloat16":
        return "xla"
    try:
        error = _relative_error("cudnn", head_dim, num_tokens, key_tokens)
    except Exception as problem:  # the kernel, the driver or the library may refuse in many ways, all mean "no"
        reason = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
    else:
        if error < 0.05:  # bfloat16 keeps 8 bits; NaN compares false
            return "cudnn"
        reason = f"relative error {error:.3g} against XLA"
    to = f" to {key_tokens}" if key_tokens else ""
    warnings.warn(
        f"cuDNN attention is not used (head size {head_dim}, {num_tokens} tokens{to}): {reason}", stacklevel=2
    )
    return "xla"


def _relative_error(implementation: str, head_dim: int, num_tokens: int, key_tokens: int | None) -> float:
    """Largest relative error of output and gradients against XLA, two heads, vmapped over 2 as the models are."""
    keys = jax.random.split(jax.random.key(0), 3)
    lengths = (num_tokens, key_tokens or num_tokens, key_tokens or num_tokens)
    inputs = [jax.random.normal(k, (2, n, 2, head_dim), jnp.bfloat16) for k, n in zip(keys, lengths, strict=True)]
    if key_tokens:
        valid = jnp.asarray([[max(1, key_tokens // 3)], [key_tokens]])
        inputs.append(jnp.arange(key_tokens)[None] < valid)
    pairs = zip(_output_and_gradients(implementation, inputs), _output_and_gradients("xla", inputs), strict=True)
    return max(float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for a, b in pairs)


def _output_and_gradients(implementation: str, inputs: list[Array]) -> list[Array]:
    call: Callable = functools.partial(attend, implementation=implementation)

    def loss(*inputs):
        out = jax.vmap(call)(*inputs)
        return jnp.square(out.astype(jnp.float32)).sum(), out

    grads, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*inputs)
    return [x.astype(jnp.float32) for x in (*grads, out)]
