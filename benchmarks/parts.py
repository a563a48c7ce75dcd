"""The expensive parts of a DiT-S/2 step, forward and backward, in JAX and in torch."""

import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import torch

from benchmarks.timing import interleave, table
from flowdit.models.layers import mlp, xavier_linear

BATCH_SIZE = 8
NUM_TOKENS = 256
DIM = 384
NUM_HEADS = 6
ROWS = BATCH_SIZE * NUM_TOKENS


class Part(NamedTuple):
    """The same function in both libraries, and its FLOPs forward and backward (two per multiply-add)."""

    ours: Callable[[], object]
    theirs: Callable[[], object]
    flops: float


def ours(function: Callable[..., Any], *args: Any) -> Callable[[], object]:
    """Gradient of the mean square of `function(*args)` with respect to all arguments."""
    gradient = jax.jit(jax.grad(lambda args: jnp.square(function(*args)).mean()))
    return lambda: jax.block_until_ready(gradient(args))


def theirs(function: Callable[..., torch.Tensor], *args: torch.Tensor) -> Callable[[], object]:
    """The same in torch, also with respect to the parameters of a module."""
    inputs = [arg.requires_grad_() for arg in args]
    if isinstance(function, torch.nn.Module):
        inputs += function.parameters()
    return lambda: torch.autograd.grad(function(*args).square().mean(), inputs)


def linear() -> Part:
    weights, x = xavier_linear(DIM, 3 * DIM, key=jax.random.key(0)), jnp.ones((BATCH_SIZE, NUM_TOKENS, DIM))
    reference = torch.nn.Linear(DIM, 3 * DIM)
    run = ours(lambda layer, x: jax.vmap(layer)(x), weights, x)
    return Part(run, theirs(reference, torch.ones(BATCH_SIZE, NUM_TOKENS, DIM)), 3 * 2 * ROWS * DIM * 3 * DIM)


def feed_forward() -> Part:
    weights, x = mlp(DIM, 4 * DIM, key=jax.random.key(0)), jnp.ones((BATCH_SIZE, NUM_TOKENS, DIM))
    up, down = torch.nn.Linear(DIM, 4 * DIM), torch.nn.Linear(4 * DIM, DIM)
    reference = torch.nn.Sequential(up, torch.nn.GELU(approximate="tanh"), down)
    run = ours(lambda layer, x: jax.vmap(layer)(x), weights, x)
    return Part(run, theirs(reference, torch.ones(BATCH_SIZE, NUM_TOKENS, DIM)), 3 * 2 * ROWS * DIM * 8 * DIM)


def attention() -> Part:
    head_dim = DIM // NUM_HEADS
    inputs = jax.random.normal(jax.random.key(0), (3, BATCH_SIZE, NUM_TOKENS, NUM_HEADS, head_dim))
    one_example = functools.partial(jax.nn.dot_product_attention, implementation="xla")
    references = torch.randn(3, BATCH_SIZE, NUM_HEADS, NUM_TOKENS, head_dim).unbind()
    reference = theirs(torch.nn.functional.scaled_dot_product_attention, *references)
    return Part(ours(jax.vmap(one_example), *inputs), reference, 3 * 4 * ROWS * NUM_TOKENS * DIM)


def matrix_product() -> Part:
    """A large square product, forward only: the machine's best rate."""
    size = 2048
    product, x = jax.jit(jnp.matmul), jnp.ones((size, size))
    y = torch.ones(size, size)
    return Part(lambda: product(x, x).block_until_ready(), lambda: torch.matmul(y, y), 2 * size**3)


def measure() -> str:
    torch.set_num_threads(len(os.sched_getaffinity(0)))  # as many as XLA uses
    parts = {
        "matrix product 2048 (forward)": matrix_product(),
        f"linear {DIM} to {3 * DIM}": linear(),
        f"MLP {DIM} to {4 * DIM} with GELU": feed_forward(),
        f"attention, {NUM_HEADS} heads, {NUM_TOKENS} tokens": attention(),
    }
    rows = []
    for name, part in parts.items():
        timings = interleave({"ours": part.ours, "theirs": part.theirs}, rounds=15, warmup=3)
        a, b = timings["ours"], timings["theirs"]
        rates = [f"{part.flops / 1e9 / t.median:.0f}" for t in (a, b)]
        rows.append([name, a.shown(), b.shown(), *rates, a.ratio(b)])
    return table(["part", "JAX", "torch", "JAX GFLOP/s", "torch GFLOP/s", "JAX / torch"], rows)
