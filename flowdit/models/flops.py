"""Counting the floating-point operations of a function's matrix products without running it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Jaxpr, JaxprEqn, jaxprs_in_params


def training_flops(loss: Callable[..., Any], *arguments: Any) -> int:
    """FLOPs of `loss` and its gradient, as model FLOPs utilisation counts them (Chowdhery et al. 2022, appendix B).

    The backward pass has two products for each product of the forward pass, for the gradients of both factors.
    Recomputation to save memory does not count, nor does anything outside `loss`, such as a frozen text encoder.
    """
    return 3 * matmul_flops(loss, *arguments)


def matmul_flops(function: Callable[..., Any], *arguments: Any) -> int:
    """Floating-point operations (two per multiply-add) of all matrix products and convolutions in `function`.

    `arguments` are pytrees of arrays or `jax.ShapeDtypeStruct`s. The count is taken from the jaxpr; nothing is compiled
    or run. Of the branches of a `cond` the largest counts. Custom calls other than cuDNN's attention are not counted.
    Raises `ValueError` for products in a loop of unknown length.
    """
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _count(jaxpr: Jaxpr) -> int:
    return sum(_count_equation(equation) for equation in jaxpr.eqns)


def _count_equation(equation: JaxprEqn) -> int:
    name, params = equation.primitive.name, equation.params
    if name in PRODUCTS:
        return PRODUCTS[name](equation)
    inner = [_count(jaxpr) for jaxpr in jaxprs_in_params(params)]
    if name == "cond":
        return max(inner)
    if name == "scan":
        return params["length"] * sum(inner)
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid) * sum(inner)
    if name == "while" and sum(inner):
        raise ValueError("matmul_flops: the length of a while loop with matrix products is unknown; use scan")
    return sum(inner)


def _dot(equation: JaxprEqn) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left, out = _shape(equation.invars[0]), _shape(equation.outvars[0])
    return 2 * math.prod(out) * math.prod(left[axis] for axis in contracted)


def _convolution(equation: JaxprEqn) -> int:
    """Every output is a sum over the kernel's window and the input channels of its group."""
    kernel, out = _shape(equation.invars[1]), _shape(equation.outvars[0])
    out_channels = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
    return 2 * math.prod(out) * math.prod(kernel) // out_channels


def _cudnn_attention(equation: JaxprEqn) -> int:
    """Logits and weighted sum: two products of tokens x key tokens x channels each."""
    query, key = _shape(equation.invars[0]), _shape(equation.invars[1])
    token_axis = 1 if equation.params["layout"] == 0 else 2  # batch, tokens, heads, channels; or heads before tokens
    return 4 * math.prod(query) * key[token_axis]


def _shape(operand: Any) -> tuple[int, ...]:
    return operand.aval.shape


PRODUCTS: dict[str, Callable[[JaxprEqn], int]] = {
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    # A primitive of JAX without an inner jaxpr.
    "dot_product_attention_fwd_wrapper": _cudnn_attention,
}
