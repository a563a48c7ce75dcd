"""The guidance head: the final layer of a shorter network with the same blocks; sampling with it takes one evaluation."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowdit.diffusion.flow import guided_velocity, internally_guided
from flowdit.diffusion.sampling import SamplerConfig, sample
from flowdit.fields import FieldError
from flowdit.models.config import DiTConfig, PixArtConfig
from flowdit.models.dit import build_dit
from flowdit.models.pixart import TextCondition, build_pixart
from flowdit.models.trunk import Output

SHAPE = dict(depth=3, hidden_dim=16, num_heads=2, mlp_ratio=2.0)
X = jax.random.normal(jax.random.key(1), (4, 4, 6))
T = jnp.asarray(0.4)


def randomised(model):
    """The model with random arrays, so that no layer is zero."""
    leaves, structure = jax.tree.flatten(model)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    return structure.unflatten([0.2 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)])


def text_model():
    model = build_pixart(PixArtConfig(**SHAPE, guidance_head=2), 4, 8, key=jax.random.key(0))
    condition = TextCondition(jax.random.normal(jax.random.key(3), (5, 8)), jnp.arange(5) < 3, jnp.asarray(False))
    return randomised(model), condition


def class_model():
    model = build_dit(DiTConfig(**SHAPE, guidance_head=2), 4, 3, key=jax.random.key(0))
    return randomised(model), jnp.asarray(1)


def shortened(model):
    """The first two blocks of `model` and its guidance head as final layer."""
    head = model.guidance_head
    blocks = jax.tree.map(lambda leaf: leaf[:2], model.blocks)
    model = eqx.tree_at(lambda m: (m.blocks, m.final_linear), model, (blocks, head.linear))
    if head.table is not None:
        return eqx.tree_at(lambda m: m.final_table, model, head.table)
    return eqx.tree_at(lambda m: m.final_ada_ln, model, head.ada_ln)


@pytest.mark.parametrize("build", [class_model, text_model])
def test_the_head_is_the_final_layer_of_a_shorter_network(build):
    model, condition = build()
    output = jax.jit(lambda model: model.run(X, T, condition, weak=True, depths=[1]))(model)
    assert sorted(output.hidden) == [1]
    np.testing.assert_allclose(output.velocity, model(X, T, condition), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(output.weak, shortened(model)(X, T, condition), rtol=1e-5, atol=1e-5)
    assert model.run(X, T, condition).weak is None
    in_bfloat16 = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model).run(X, T, condition, weak=True)
    assert in_bfloat16.weak.dtype == jnp.float32
    np.testing.assert_allclose(in_bfloat16.weak, output.weak, atol=0.1 * float(jnp.abs(output.weak).max()))
    with pytest.raises(ValueError, match="weak: the network has no guidance head"):
        eqx.tree_at(lambda m: m.guidance_head, model, None).run(X, T, condition, weak=True)


class Network:
    """Velocities that depend on x, t and the condition; counts how often they, and the head's, are traced."""

    def __init__(self):
        self.calls = self.heads = 0

    def run(self, x, t, condition, *, weak):
        self.calls, self.heads = self.calls + 1, self.heads + weak
        return Output(jnp.sin(x + condition) * t, {}, x * condition if weak else None)

    def __call__(self, x, t, condition):
        return self.run(x, t, condition, weak=False).velocity


def test_internal_guidance_beside_that_of_the_null_condition():
    network = Network()
    x, c, null = jax.random.normal(jax.random.key(0), (3, 2, 1, 2, 2))
    strong, weak = (lambda x, c: np.sin(x + c) * 0.5), (lambda x, c: x * c)
    internal = lambda x, c: weak(x, c) + 1.4 * (strong(x, c) - weak(x, c))
    field = internally_guided(network, 1.4, (0.2, 0.8))
    at = lambda t, guidance: guided_velocity(field, x, jnp.asarray(t), c, null, guidance=guidance, interval=(0.2, 0.8))
    np.testing.assert_allclose(at(0.5, 1.0), internal(x, c), rtol=1e-5)
    both = internal(x, null) + 3.0 * (internal(x, c) - internal(x, null))
    np.testing.assert_allclose(at(0.5, 3.0), both, rtol=1e-4, atol=1e-5)
    outside = jnp.asarray(0.9)
    np.testing.assert_array_equal(at(outside, 3.0), jax.vmap(network, (0, None, 0))(x, outside, c))
    assert network.calls == 4 and network.heads == 3  # both halves in one batch, and the head from the same evaluation


def test_solves_with_internal_guidance():
    network, x = Network(), jax.random.normal(jax.random.key(0), (2, 1, 1, 3))
    solve = lambda **options: sample(network, x, jnp.ones(2), None, SamplerConfig("euler", 2, **options)).latents
    solve(internal_guidance=1.0)
    assert network.calls > 0 == network.heads
    assert not np.allclose(solve(internal_guidance=1.4), solve())
    assert not np.allclose(solve(internal_guidance=1.4, guidance_low=0.7), solve(internal_guidance=1.4))


@pytest.mark.parametrize("block", [0, 3])
def test_bad_block(block):
    with pytest.raises(FieldError, match=rf"guidance_head: must be null or a block in \[1, depth=3\), got {block}"):
        DiTConfig(**SHAPE, guidance_head=block).check((4, 4, 6))
