"""Counted FLOPs compared with closed forms: single operations, wrappers, and both models."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from flowdit.models.attention import AttentionShape, attend
from flowdit.models.compute import Compute
from flowdit.models.config import DiTConfig, PixArtConfig
from flowdit.models.dit import build_dit
from flowdit.models.flops import matmul_flops, training_flops
from flowdit.models.pixart import TextCondition, build_pixart

MODEL = DiTConfig(depth=3, hidden_dim=48, num_heads=2, patch_size=2, mlp_ratio=3.0)
LATENT = (4, 8, 12)
TOKENS = 4 * 6
PATCH = 4 * 4
DIM = 48
TEXT_TOKENS, TEXT_DIM = 7, 20


def shape(*sizes: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def linear(rows: int, in_dim: int, out_dim: int) -> int:
    return 2 * rows * in_dim * out_dim


def time_mlp(dim: int) -> int:
    return linear(1, 256, dim) + linear(1, dim, dim)


def block(tokens: int, dim: int) -> int:
    """Self-attention and MLP."""
    attention = linear(tokens, dim, 3 * dim) + 4 * tokens * tokens * dim + linear(tokens, dim, dim)
    return attention + 2 * linear(tokens, dim, 3 * dim)


def test_products():
    assert matmul_flops(jnp.matmul, shape(3, 5), shape(5, 7)) == 2 * 3 * 5 * 7
    einsum = lambda x, y: jnp.einsum("bqhd,bkhd->bhqk", x, y)
    assert matmul_flops(einsum, shape(2, 3, 4, 5), shape(2, 6, 4, 5)) == 2 * (2 * 4 * 3 * 6) * 5
    assert matmul_flops(jax.vmap(jnp.dot), shape(9, 4), shape(9, 4)) == 9 * 2 * 4
    assert matmul_flops(lambda x: jnp.exp(x).sum(), shape(100, 100)) == 0


@pytest.mark.parametrize("groups", [1, 2])
def test_convolution(groups):
    convolve = lambda x, kernel: jax.lax.conv_general_dilated(x, kernel, (2, 2), "SAME", feature_group_count=groups)
    counted = matmul_flops(convolve, shape(2, 4, 8, 8), shape(6, 4 // groups, 3, 3))
    assert counted == 2 * (2 * 6 * 4 * 4) * (3 * 3 * 4 // groups)


def test_wrapped_products():
    square = shape(4, 4)
    product = 2 * 4**3
    twice = lambda x: x @ x @ x
    scanned = lambda x: jax.lax.scan(lambda carry, _: (carry @ x, None), x, length=5)[0]
    assert matmul_flops(jax.jit(twice), square) == 2 * product
    assert matmul_flops(scanned, square) == 5 * product
    assert matmul_flops(jax.checkpoint(scanned), square) == 5 * product
    assert matmul_flops(lambda x: jax.lax.cond(x[0, 0] > 0, scanned, twice, x), square) == 5 * product
    with_gradient = jax.custom_vjp(twice)
    with_gradient.defvjp(lambda x: (twice(x), x), lambda x, g: (g @ x @ x,))
    assert matmul_flops(with_gradient, square) == 2 * product


def test_a_loop_without_a_known_length_is_refused_where_it_multiplies():
    loop = lambda body: lambda x: jax.lax.while_loop(lambda x: x[0, 0] < 9, body, x)
    assert matmul_flops(loop(lambda x: x + 1), shape(4, 4)) == 0
    with pytest.raises(ValueError, match="matmul_flops: the length of a while loop"):
        matmul_flops(loop(lambda x: x @ x), shape(4, 4))


def test_a_pallas_kernel_counts_once_for_each_cell_of_its_grid():
    def kernel(x, y, out):
        out[...] = x[...] @ y[...]

    whole, rows = pl.BlockSpec((8, 8), lambda i: (0, 0)), pl.BlockSpec((2, 8), lambda i: (i, 0))
    call = pl.pallas_call(
        kernel, grid=(4,), in_specs=[rows, whole], out_specs=rows, out_shape=shape(8, 8), interpret=True
    )
    assert matmul_flops(call, shape(8, 8), shape(8, 8)) == 2 * 8**3


@pytest.mark.parametrize("implementation", ["xla", "cudnn"])
def test_attention_counts_the_same_with_any_kernel(implementation, monkeypatch):
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91200)
    query, key = shape(3, 10, 2, 64, dtype=jnp.bfloat16), shape(3, 6, 2, 64, dtype=jnp.bfloat16)
    kernels = frozenset({AttentionShape(64, 10, 6)} if implementation == "cudnn" else ())
    batched = Compute("bfloat16", kernels).on(None, jax.vmap(attend))
    counted = matmul_flops(batched, query, key, key, shape(3, 6, dtype=jnp.bool_))
    assert counted == 3 * 4 * 10 * 6 * (2 * 64)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_class_model(remat):
    build = lambda: build_dit(dataclasses.replace(MODEL, remat=remat), LATENT[0], 5, key=jax.random.key(0))
    model = eqx.filter_eval_shape(build)
    expected = (
        linear(TOKENS, PATCH, DIM)
        + time_mlp(DIM)
        + 3 * (block(TOKENS, DIM) + linear(1, DIM, 6 * DIM))
        + linear(1, DIM, 2 * DIM)
        + linear(TOKENS, DIM, PATCH)
    )
    arguments = (model, shape(*LATENT), shape(), shape(dtype=jnp.int32))
    call = lambda model, *inputs: model(*inputs)
    assert matmul_flops(call, *arguments) == expected
    assert training_flops(call, *arguments) == 3 * expected


@pytest.mark.parametrize("micro_conditioning", [False, True])
def test_text_model(micro_conditioning):
    shape_of_model = dataclasses.asdict(MODEL) | {"name": "pixart"}
    config = PixArtConfig(**shape_of_model, micro_conditioning=micro_conditioning)
    model = eqx.filter_eval_shape(lambda: build_pixart(config, LATENT[0], TEXT_DIM, key=jax.random.key(0)))
    cross = 2 * linear(TOKENS, DIM, DIM) + linear(TEXT_TOKENS, DIM, 2 * DIM) + 4 * TOKENS * TEXT_TOKENS * DIM
    expected = (
        linear(TOKENS, PATCH, DIM)
        + time_mlp(DIM)
        + (3 * time_mlp(DIM // 3) if micro_conditioning else 0)
        + linear(1, DIM, 6 * DIM)
        + linear(TEXT_TOKENS, TEXT_DIM, DIM)
        + linear(TEXT_TOKENS, DIM, DIM)
        + 3 * (block(TOKENS, DIM) + cross)
        + linear(TOKENS, DIM, PATCH)
    )
    text = shape(TEXT_TOKENS, TEXT_DIM), shape(TEXT_TOKENS, dtype=jnp.bool_), shape(dtype=jnp.bool_)
    condition = TextCondition(*text, shape(2) if micro_conditioning else None)
    assert matmul_flops(lambda model, *inputs: model(*inputs), model, shape(*LATENT), shape(), condition) == expected
