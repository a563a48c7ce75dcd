"""Which kernel `jax.nn.dot_product_attention` may use: cuDNN where it proves itself, XLA elsewhere."""

from __future__ import annotations

import functools
import warnings

import jax
import jax.numpy as jnp


@functools.cache
def attention_implementation(head_dim: int, num_tokens: int, compute_dtype: str) -> str:
    """`"cudnn"` if the device is a GPU and its kernel agrees with XLA on random input, else `"xla"`.

    cuDNN takes 16-bit inputs only, rejects some head sizes, and has returned NaN gradients for some lengths, so the
    very shape to be trained is run once, forward and backward, before the model is built. Call it outside of jit.
    """
    if jax.default_backend() != "gpu" or compute_dtype != "bfloat16":
        return "xla"
    try:
        error = _cudnn_error(head_dim, num_tokens)
    except Exception as problem:  # the kernel, the driver or the library may refuse in many ways, all mean "no"
        reason = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
    else:
        if error < 0.05:  # bfloat16 keeps 8 bits; NaN compares false
            return "cudnn"
        reason = f"relative error {error:.3g} against XLA"
    warnings.warn(f"cuDNN attention is not used (head size {head_dim}, {num_tokens} tokens): {reason}", stacklevel=2)
    return "xla"


def _cudnn_error(head_dim: int, num_tokens: int) -> float:
    """Largest relative error of output and gradients, cuDNN against XLA, batch 2, two heads."""
    shape = (3, 2, num_tokens, 2, head_dim)
    query, key, value = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)

    def run(implementation):
        def loss(*inputs):
            out = jax.nn.dot_product_attention(*inputs, implementation=implementation)
            return jnp.square(out.astype(jnp.float32)).sum(), out

        grads, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(query, key, value)
        return [x.astype(jnp.float32) for x in (*grads, out)]

    pairs = zip(run("cudnn"), run("xla"), strict=True)
    return max(float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for a, b in pairs)
