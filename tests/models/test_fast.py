"""`model.kernels=fast` against `plain`: the same network, in other layouts and with gradients written out."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.random_weights import randomised

from flowdit.models import fast
from flowdit.models.attention import attend as plain_attend
from flowdit.models.compute import Compute
from flowdit.models.config import DiTConfig, PixArtConfig
from flowdit.models.dit import build_dit
from flowdit.models.pixart import TextCondition, build_pixart
from flowdit.models.remat import NAMES, remat_policy

LATENT = (4, 8, 8)
TEXT_TOKENS, TEXT_WIDTH = 5, 12
SIZE: dict[str, Any] = {"depth": 2, "hidden_dim": 48, "num_heads": 4}
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "no Q/K norm": {"qk_norm": False},
    "rotary": {"positions": "rope"},
    "rotary, no Q/K norm": {"positions": "rope", "qk_norm": False},
    "value residual": {"value_residual": True},
    "RMS norm and SwiGLU": {"norm": "rms", "mlp": "swiglu"},
}


def network(stage: int, options: dict[str, Any]):
    """The velocity's function of one example, its parameters, and three examples; in stage 2 one has no caption."""
    rng = np.random.default_rng(0)
    latents = jnp.asarray(rng.normal(size=(3, *LATENT)), jnp.float32)
    times = jnp.asarray([0.1, 0.5, 0.9])
    if stage == 1:
        config = DiTConfig(**SIZE | options)
        model = randomised(lambda key: build_dit(config, LATENT[0], 3, key=key))
        return model, (latents, times, jnp.arange(3))
    config = PixArtConfig(**SIZE | options)
    model = randomised(lambda key: build_pixart(config, LATENT[0], TEXT_WIDTH, key=key))
    features = jnp.asarray(rng.normal(size=(3, TEXT_TOKENS, TEXT_WIDTH)), jnp.float32)
    mask = jnp.asarray([[1, 1, 1, 0, 0], [0] * 5, [1] * 5], bool)
    return model, (latents, times, TextCondition(features, mask, jnp.zeros(3, bool)))


def run(compute: Compute, model, inputs):
    """Velocities, and the gradients of their squares by parameters and latents, in float32."""

    def loss(model, latents, *others):
        velocity = jax.vmap(compute.cast(model))(latents, *others)
        return jnp.square(velocity).sum(), velocity

    function = compute.on(None, jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    # Under strict promotion JAX's own attention has no backward pass in bfloat16.
    with jax.default_matmul_precision("highest"), jax.numpy_dtype_promotion("standard"):
        (_, velocity), gradients = jax.jit(function)(model, *inputs)
    return velocity, gradients


def relative_error(got, expected) -> float:
    a, b = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (got, expected))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize(("stage", "options"), itertools.product([1, 2], OPTIONS))
def test_values_and_gradients_are_those_of_the_plain_layers(stage, options):
    model, inputs = network(stage, OPTIONS[options])
    plain, ours = (run(Compute(is_fast=is_fast), model, inputs) for is_fast in (False, True))
    assert relative_error(ours[0], plain[0]) < 1e-5
    for got, expected in zip(jax.tree.leaves(ours[1]), jax.tree.leaves(plain[1]), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("stage", [1, 2])
def test_in_bfloat16_the_error_is_no_larger_than_that_of_the_plain_layers(stage):
    model, inputs = network(stage, {})
    exact = run(Compute(), model, inputs)
    plain, ours = (run(Compute("bfloat16", is_fast=is_fast), model, inputs) for is_fast in (False, True))
    for i in range(2):
        assert 0 < relative_error(ours[i], exact[i]) < 1.05 * relative_error(plain[i], exact[i])


def heads(*shape: int, seed: int = 0, scale: float = 1.0) -> jax.Array:
    return scale * jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("scale", [1.0, 7.0, 200.0])
def test_a_bound_of_any_size_changes_nothing(scale):
    """Logits up to +-1600; with the largest, the row's maximum must be subtracted, as all exponentials would underflow."""
    query, key, value = (heads(2, 8, 6, seed=seed) for seed in range(3))
    query = query / jnp.linalg.norm(query, axis=1, keepdims=True) * scale
    key = key / jnp.linalg.norm(key, axis=1, keepdims=True) * 8
    bound = jnp.asarray(8 * scale)
    if scale == 200:
        key = -jnp.abs(key) * jnp.sign(query)  # every logit of a row is far below the bound
    plain = lambda q, k, v: plain_attend(*(x.transpose(2, 0, 1) for x in (q * 8**0.5, k, v))).transpose(1, 2, 0)

    def gradients(attend):
        return jax.grad(lambda *inputs: jnp.sin(attend(*inputs)).sum(), argnums=(0, 1, 2))(query, key, value)

    with jax.default_matmul_precision("highest"):
        bounded = lambda q, k, v: fast.attend(q, k, v, bound=bound)
        np.testing.assert_allclose(bounded(query, key, value), plain(query, key, value), rtol=1e-4, atol=1e-5)
        for got, expected in zip(gradients(bounded), gradients(plain), strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-5 * scale)


def test_rows_that_would_underflow_are_not_lost():
    """With all logits at minus the bound, exponentials of a fixed shift would all be 0, and the output 0 / 0."""
    query, key = jnp.full((1, 4, 3), 10.0), jnp.full((1, 4, 5), -10.0)
    value = heads(1, 4, 5)
    out = fast.attend(query, key, value, bound=jnp.asarray(400.0))
    np.testing.assert_allclose(out, jnp.broadcast_to(value.mean(2, keepdims=True), out.shape), rtol=1e-5)


# --- what the backward pass keeps ---


def kept(stage: int, remat: str, is_fast: bool) -> tuple[int, Any]:
    """Bytes of temporaries, and gradients, of a loss of a deeper network."""
    model, inputs = network(stage, {"remat": remat, "depth": 12})
    compute = Compute(is_fast=is_fast)

    def loss(model, latents, *others):
        return jnp.square(jax.vmap(model)(latents, *others)).sum()

    compiled = jax.jit(compute.on(None, jax.grad(loss))).lower(model, *inputs).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes, compiled(model, *inputs)


@pytest.mark.parametrize(("stage", "is_fast"), itertools.product([1, 2], [False, True]))
def test_named_policies_change_memory_not_gradients(stage, is_fast):
    everything, expected = kept(stage, "none", is_fast)
    sizes = {}
    for remat in ("names", "lean", "full"):
        sizes[remat], got = kept(stage, remat, is_fast)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.abs(b).max()))
    assert everything > sizes["names"] > sizes["lean"] > sizes["full"]


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("remat", ["none", "names"])
def test_blocks_that_are_not_scanned_give_the_same(stage, remat):
    options = {"remat": remat, "value_residual": True}
    (model, inputs), (other, _) = (network(stage, options | {"scan_blocks": scan}) for scan in (True, False))
    for is_fast in (False, True):
        scanned, unrolled = (run(Compute(is_fast=is_fast), each, inputs) for each in (model, other))
        assert relative_error(unrolled, scanned) < 1e-5


def test_a_policy_may_name_each_name_and_move_it_to_the_host():
    for name in NAMES:
        assert remat_policy(name) is not None
    model, inputs = network(1, {"remat": "qkv+up@host"})
    text = str(jax.make_jaxpr(jax.grad(lambda model: jnp.square(jax.vmap(model)(*inputs)).sum()))(model))
    assert "f32<host>" in text


@pytest.mark.parametrize("remat", ["some", "qkv+", "qkv,up", "qkv@device", ""])
def test_an_unknown_name_is_refused(remat):
    with pytest.raises(ValueError, match="remat: must be none, names, lean, dots, full, or names out of qkv"):
        dataclasses.replace(DiTConfig(), remat=remat).check((4, 32, 32))
