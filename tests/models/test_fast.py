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
from flowdit.models.layers import NORMS, modulate
from flowdit.models.pixart import TextCondition, build_pixart
from flowdit.models.remat import NAMES

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


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        *itertools.product([1], OPTIONS),
        (2, "default"),
        (2, "RMS norm and SwiGLU"),
        *(
            pytest.param(2, name, marks=pytest.mark.slow)
            for name in ("no Q/K norm", "rotary", "rotary, no Q/K norm", "value residual")
        ),
    ],
)
def test_values_and_gradients_are_those_of_the_plain_layers(stage, options):
    model, inputs = network(stage, OPTIONS[options])
    plain, ours = (run(Compute(is_fast=is_fast), model, inputs) for is_fast in (False, True))
    assert relative_error(ours[0], plain[0]) < 1e-5
    for got, expected in zip(jax.tree.leaves(ours[1]), jax.tree.leaves(plain[1]), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        (2, "default"),
        (1, "rotary, no Q/K norm"),
        (1, "RMS norm and SwiGLU"),
        *(
            pytest.param(1, name, marks=pytest.mark.slow)
            for name in ("default", "no Q/K norm", "rotary", "value residual")
        ),
    ],
)
def test_in_bfloat16_the_error_is_no_larger_than_that_of_the_plain_layers(stage, options):
    model, inputs = network(stage, OPTIONS[options])
    exact = run(Compute(), model, inputs)
    plain, ours = (run(Compute("bfloat16", is_fast=is_fast), model, inputs) for is_fast in (False, True))
    for i in range(2):
        assert 0 < relative_error(ours[i], exact[i]) <= relative_error(plain[i], exact[i])


# --- attention ---


def assert_attends(query, key, value, bound=None, mask=None, rtol=1e-3):
    """Values and gradients against JAX's attention, in float32; gradients may cancel from the size of the logits."""
    size = 1 + float(jnp.abs(query).max() * jnp.abs(key).max())

    def plain(*inputs):
        query, key, value = (x.transpose(2, 0, 1) for x in inputs)
        return plain_attend(query * 8**0.5, key, value, mask).transpose(1, 2, 0)

    ours = lambda *inputs: fast.attend(*inputs, mask, None if bound is None else jnp.asarray(bound))
    with jax.default_matmul_precision("highest"):
        for attend in (lambda f: f(query, key, value), gradients_of(query, key, value)):
            for got, expected in zip(jax.tree.leaves(attend(ours)), jax.tree.leaves(attend(plain)), strict=True):
                np.testing.assert_allclose(
                    got, expected, rtol=rtol, atol=rtol * float(jnp.abs(expected).max()) + 1e-6 * size
                )


def gradients_of(*inputs):
    return lambda f: jax.grad(lambda *x: jnp.sin(f(*x)).sum(), argnums=(0, 1, 2))(*inputs)


def normals(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def opposite(largest: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries and keys whose logits are all between -largest and 1 above: the worst for a shift from a bound."""
    query = jnp.ones((2, 8, 6)) * (largest / 8) ** 0.5
    key = -query[:, :, :5] * (1 - 0.5 / largest * jnp.abs(jnp.sin(normals(2, 8, 5))))
    return query, key, normals(2, 8, 5, seed=1)


@pytest.mark.parametrize("scale", [0.1, 1.0, 7.0, 200.0])
def test_a_bound_changes_nothing(scale):
    query, key, value = (normals(2, 8, 6, seed=seed) for seed in range(3))
    unit = lambda x: x / jnp.linalg.norm(x, axis=1, keepdims=True)
    assert_attends(scale * unit(query), 8 * unit(key), value, bound=8 * scale)
    assert_attends(scale * unit(query), 8 * unit(key), value)


@pytest.mark.parametrize("largest", [49.9, 51.0, 1600.0])
def test_rows_far_below_the_bound_are_not_lost(largest):
    """With a fixed shift, exponentials of rows above the last bound would all be 0, and the output 0 / 0."""
    assert_attends(*opposite(largest), bound=largest)
    half = [x.astype(jnp.bfloat16) for x in opposite(largest)]
    assert bool(jnp.isfinite(fast.attend(*half, bound=jnp.asarray(largest))).all())
    assert all(
        bool(jnp.isfinite(x).all())
        for x in gradients_of(*half)(lambda *x: fast.attend(*x, bound=largest * jnp.ones(())))
    )


@pytest.mark.parametrize("bound", [None, 5.0, 5000.0])
def test_what_is_masked_does_not_count(bound):
    """A padding key with a logit far above all others, which the bound of 5 is not of."""
    query, key = normals(2, 8, 6) / 8, normals(2, 8, 5, seed=1) / 8
    value = normals(2, 8, 5, seed=2)
    key = key if bound == 5 else key.at[:, :, 4].set(3000 * query[:, :, 0])
    for mask in ([True] * 4 + [False], [False] * 5):
        if any(mask) or bound == 5:
            assert_attends(query, key, value, bound, jnp.asarray(mask))


@pytest.mark.parametrize("is_centred", [True, False])
def test_tokens_far_from_zero_are_normalised(is_centred):
    x = 100 + normals(6, 32)
    shift, scale = normals(32, seed=1), normals(32, seed=2)
    norm = NORMS["layer" if is_centred else "rms"]
    plain = lambda x: jnp.sin(modulate(norm(x, 1e-6), shift, scale)).sum()
    ours = lambda x: jnp.sin(fast.modulated_norm(x, shift, scale, 1e-6, is_centred)).sum()
    both = [jax.value_and_grad(function)(x) for function in (plain, ours)]
    np.testing.assert_allclose(both[1][0], both[0][0], rtol=1e-5)
    np.testing.assert_allclose(both[1][1], both[0][1], rtol=1e-3, atol=1e-4)


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


@pytest.mark.parametrize(
    ("stage", "is_fast"),
    [(2, True), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, False), (1, True), (2, False)))],
)
def test_named_policies_change_memory_not_gradients(stage, is_fast):
    everything, expected = kept(stage, "none", is_fast)
    sizes = {}
    for remat in ("names", "lean", "full"):
        sizes[remat], got = kept(stage, remat, is_fast)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.abs(b).max()))
    assert everything > sizes["names"] > sizes["lean"] > sizes["full"]


@pytest.mark.parametrize(
    ("stage", "remat"),
    [
        (2, "names"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, "none"), (1, "names"), (2, "none"))),
    ],
)
def test_blocks_that_are_not_scanned_give_the_same(stage, remat):
    options = {"remat": remat, "value_residual": True}
    (model, inputs), (other, _) = (network(stage, options | {"scan_blocks": scan}) for scan in (True, False))
    for is_fast in (False, True):
        scanned, unrolled = (run(Compute(is_fast=is_fast), each, inputs) for each in (model, other))
        assert relative_error(unrolled, scanned) < 1e-5


@pytest.mark.parametrize("stage", [1, 2])
def test_a_policy_may_name_each_name_of_the_blocks(stage):
    config = (DiTConfig, PixArtConfig)[stage - 1]
    own = [name for name in NAMES if name not in config.not_named]
    config(remat="+".join(own)).check((4, 32, 32))
    model, inputs = network(stage, {})
    text = str(jax.make_jaxpr(Compute(is_fast=True).on(None, jax.vmap(model)))(*inputs))
    assert {name for name in NAMES if f"name={name}" in text} == set(own)
    for name in config.not_named:
        with pytest.raises(ValueError, match=f"^remat: .* got '{name}'$"):
            config(remat=name).check((4, 32, 32))


def test_what_is_kept_may_be_moved_to_the_host():
    model, inputs = network(1, {"remat": "qkv+up@host"})
    text = str(jax.make_jaxpr(jax.grad(lambda model: jnp.square(jax.vmap(model)(*inputs)).sum()))(model))
    assert "f32<host>" in text
    gradient = lambda model: jax.jit(jax.grad(lambda model: jnp.square(jax.vmap(model)(*inputs)).sum()))(model)
    assert relative_error(gradient(model), gradient(network(1, {})[0])) < 1e-5


@pytest.mark.parametrize("remat", ["some", "qkv+", "qkv,up", "qkv@device", "", "qkv+qkv@host"])
def test_an_unknown_name_is_refused(remat):
    with pytest.raises(ValueError, match="remat: must be none, names, lean, dots, full, or names out of qkv"):
        dataclasses.replace(DiTConfig(), remat=remat).check((4, 32, 32))
