"""The trunk: the kinds of norm, MLP, positions and values in closed form, hidden states, and blocks on some tokens."""

import dataclasses
import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_weights import randomised

from flowdit.models.config import DiTConfig, ModelConfig, PixArtConfig
from flowdit.models.dit import DiT, build_dit
from flowdit.models.layers import mlp_hidden_dim
from flowdit.models.pixart import PixArt, TextCondition, build_pixart
from flowdit.models.positions import Positions, rotate
from flowdit.models.trunk import Block, BlockInputs, Route, run_blocks

LATENT = (4, 4, 8)
TOKENS = 8
TEXT_DIM = 10
SHAPE: dict[str, Any] = {"depth": 3, "hidden_dim": 16, "num_heads": 2}
OPTIONS = {
    "norm=rms": {"norm": "rms"},
    "mlp=swiglu": {"mlp": "swiglu"},
    "positions=rope": {"positions": "rope"},
    "value_residual": {"value_residual": True},
}
MODELS = {"ccdit": DiTConfig, "pixart": PixArtConfig}


def build(config: ModelConfig) -> DiT | PixArt:
    if isinstance(config, PixArtConfig):
        return randomised(functools.partial(build_pixart, config, LATENT[0], TEXT_DIM))
    assert isinstance(config, DiTConfig)
    return randomised(functools.partial(build_dit, config, LATENT[0], 3))


def condition(model: DiT | PixArt) -> Any:
    if isinstance(model, DiT):
        return jnp.asarray(1)
    features = jax.random.normal(jax.random.key(3), (5, TEXT_DIM))
    return TextCondition(features, jnp.arange(5) < 4, jnp.asarray(False))


def x_t(shape: tuple[int, int, int] = LATENT) -> jax.Array:
    return jax.random.normal(jax.random.key(2), shape)


def velocity(model: DiT | PixArt, shape: tuple[int, int, int] = LATENT, **options: Any) -> Any:
    run = lambda model, x, text: model.run(x, jnp.asarray(0.3), text, **options)
    return jax.jit(run)(model, x_t(shape), condition(model))


# --- the options, computed again with numpy in float64 ---


def numbers(tree: Any, depth: int | None = None) -> Any:
    return jax.tree.map(lambda leaf: np.asarray(leaf if depth is None else leaf[depth], np.float64), tree)


def affine(x: np.ndarray, linear: Any) -> np.ndarray:
    return x @ linear.weight + linear.bias


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def normed(x: np.ndarray, kind: str) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True) if kind == "layer" else x
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)


def attended(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
    logits = np.einsum("qhd,khd->hqk", query, key) / np.sqrt(query.shape[-1])
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("hqk,khd->qhd", weights / weights.sum(-1, keepdims=True), value)


def turned(x: np.ndarray, height: int, width: int) -> np.ndarray:
    """RoPE as complex numbers: channel i and i + d / 2 are real and imaginary part; the width has the first half."""
    half = x.shape[-1] // 2
    frequencies = 10_000.0 ** (-np.arange(half // 2) / (half // 2))
    rows, columns = np.divmod(np.arange(height * width), width)
    angles = np.concatenate([np.outer(columns, frequencies), np.outer(rows, frequencies)], axis=1)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)[:, None]
    return np.concatenate([turned.real, turned.imag], axis=-1)


def block_by_hand(block: Block, config: DiTConfig, x: np.ndarray, c: np.ndarray, first: Any) -> tuple[Any, Any]:
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = np.split(affine(silu(c), block.ada_ln), 6)
    own = block.attention
    y = normed(x, config.norm) * (1 + scale_a) + shift_a
    query, key, value = np.split(affine(y, own.qkv).reshape(TOKENS, 3 * config.num_heads, -1), 3, axis=1)
    query, key = (normed(part, "rms") * norm.scale for part, norm in ((query, own.query_norm), (key, own.key_norm)))
    if config.positions == "rope":
        query, key = (turned(part, 2, 4) for part in (query, key))
    first = value if first is None else first
    mixed = value if not config.value_residual else own.value_mix[0] * first + own.value_mix[1] * value
    x = x + gate_a * affine(attended(query, key, mixed).reshape(TOKENS, -1), own.out)
    y = affine(normed(x, config.norm) * (1 + scale_m) + shift_m, block.mlp.up)
    hidden = silu(y[:, : y.shape[1] // 2]) * y[:, y.shape[1] // 2 :] if config.mlp == "swiglu" else gelu(y)
    return x + gate_m * affine(hidden, block.mlp.down), value


@pytest.mark.parametrize("options", [{}, *OPTIONS.values()], ids=["default", *OPTIONS])
def test_blocks_compute_what_the_configuration_says(options):
    config = DiTConfig(**SHAPE, **options)
    blocks = build(config).blocks
    x, c = np.random.default_rng(5).standard_normal((TOKENS, 16)), np.random.default_rng(6).standard_normal(16)
    angles = config.grid_positions.angles(config.head_dim, 2, 4) if config.positions == "rope" else None
    inputs = BlockInputs(jnp.asarray(c, jnp.float32), None if angles is None else jnp.asarray(angles))
    with jax.default_matmul_precision("highest"):
        got = run_blocks(blocks, jnp.asarray(x, jnp.float32), inputs).x
    first_value = None
    for depth in range(config.depth):
        x, value = block_by_hand(numbers(blocks, depth), config, x, c, first_value)
        first_value = value if first_value is None else first_value
    assert np.linalg.norm(got - x) / np.linalg.norm(x) < 1e-5


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option_changes_both_models(name, options):
    plain, changed = (build(MODELS[name](**SHAPE, **some)) for some in ({}, options))
    assert jnp.abs(velocity(plain).velocity - velocity(changed).velocity).max() > 1e-3


@pytest.mark.parametrize(("dim", "ratio", "hidden"), [(1152, 4.0, 3072), (128, 4.0, 336), (48, 3.0, 96), (16, 4.0, 40)])
def test_swiglu_has_two_thirds_of_the_width_in_multiples_of_8(dim, ratio, hidden):
    assert mlp_hidden_dim(dim, ratio, "swiglu") == hidden == int(2 / 3 * ratio * dim / 8 + 1e-9) * 8


def test_rotary_attention_sees_relative_positions_alone():
    """Queries and keys of one token each, moved together over the grid, have the same products."""
    angles = jnp.asarray(Positions("rope").angles(8, 4, 4)).reshape(4, 4, 1, -1)
    query, key = jax.random.normal(jax.random.key(0), (2, 1, 2, 8))

    def product(of_query: tuple[int, int], of_key: tuple[int, int]) -> jax.Array:
        return (rotate(query, angles[of_query]) * rotate(key, angles[of_key])).sum(-1)

    np.testing.assert_allclose(product((0, 1), (2, 3)), product((1, 0), (3, 2)), rtol=1e-4, atol=1e-5)
    assert jnp.abs(product((0, 1), (2, 3)) - product((0, 1), (3, 2))).max() > 1e-2


def test_a_value_residual_of_the_own_value_alone_is_none():
    plain = build(DiTConfig(**SHAPE))
    mixing = build(DiTConfig(**SHAPE, value_residual=True))
    own = jnp.tile(jnp.asarray([0.0, 1.0])[None], (3, 1))
    same = eqx.tree_at(lambda m: m.blocks.attention.value_mix, plain, own, is_leaf=lambda leaf: leaf is None)
    assert jax.tree.structure(same) == jax.tree.structure(mixing)
    np.testing.assert_allclose(velocity(same).velocity, velocity(plain).velocity, rtol=1e-5, atol=1e-5)


# --- one model, several sizes ---


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("positions", ["sincos", "rope"])
def test_one_model_serves_several_latent_sizes(name, positions):
    model = build(MODELS[name](**SHAPE, positions=positions))
    for shape in ((4, 4, 8), (4, 8, 8), (4, 16, 4)):
        assert velocity(model, shape).velocity.shape == shape


def test_a_position_base_stretches_every_grid_to_its_range():
    based = Positions(interpolation_scale=2.0, base=4)
    np.testing.assert_allclose(based.table(8, 8, 8)[::2][:4], Positions(interpolation_scale=2.0).table(8, 4, 4)[:4])
    np.testing.assert_array_equal(based.table(8, 4, 4), Positions(interpolation_scale=2.0).table(8, 4, 4))
    np.testing.assert_allclose(
        Positions("rope", base=4).angles(8, 2, 8)[0:8:2], Positions("rope").angles(8, 2, 8)[:4], atol=1e-6
    )


# --- hidden states ---


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("value_residual", [False, True])
def test_hidden_states_are_those_of_a_shallower_trunk(name, value_residual):
    model = build(MODELS[name](**SHAPE, value_residual=value_residual))
    output = velocity(model, depths=(1, 3))
    np.testing.assert_allclose(output.velocity, velocity(model).velocity, rtol=1e-5, atol=1e-5)
    assert output.hidden.keys() == {1, 3}
    shallow = dataclasses.replace(model, blocks=jax.tree.map(lambda leaf: leaf[:1], model.blocks))
    np.testing.assert_allclose(velocity(shallow, depths=(1,)).hidden[1], output.hidden[1], rtol=1e-5, atol=1e-5)


def test_hidden_states_are_not_kept_and_code_does_not_grow_with_depth():
    """The scans carry the tokens and hand out nothing else; twice the depth has as many equations."""

    def jaxpr(depth: int) -> Any:
        model = build(DiTConfig(**SHAPE | {"depth": depth}))
        return jax.make_jaxpr(lambda m: m.run(x_t(), jnp.asarray(0.5), jnp.asarray(0), depths=(2,)))(model)

    shallow, deep = jaxpr(6), jaxpr(12)
    scans = [equation for equation in deep.eqns if equation.primitive.name == "scan"]
    assert [scan.params["length"] for scan in scans] == [2, 10]
    assert all(len(scan.outvars) == scan.params["num_carry"] == 1 for scan in scans)
    assert len(str(shallow)) == pytest.approx(len(str(deep)), rel=0.02)


@pytest.mark.parametrize("depth", [0, 4])
def test_depths_outside_of_the_trunk_are_refused(depth):
    with pytest.raises(ValueError, match=rf"^depths: must be in \[1, 3\], the number of blocks, got {depth}"):
        velocity(build(DiTConfig(**SHAPE)), depths=(depth,))


# --- blocks on a part of the tokens ---


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "options", [{}, {"positions": "rope", "value_residual": True}], ids=["default", "rope, values"]
)
def test_routed_blocks_see_and_change_their_tokens_alone(name, options):
    model = build(MODELS[name](**SHAPE, **options))
    route, key = Route(start=1, stop=2, keep=3), jax.random.key(9)
    output = velocity(model, depths=(1, 2), route=route, key=key)
    changed = np.flatnonzero((output.hidden[1] != output.hidden[2]).any(-1))
    assert len(changed) == 3
    assert sorted(jax.random.permutation(key, TOKENS)[:3].tolist()) == changed.tolist()
    whole = velocity(model, depths=(1, 2), route=Route(start=1, stop=2, keep=TOKENS), key=key)
    np.testing.assert_allclose(whole.velocity, velocity(model).velocity, rtol=1e-4, atol=1e-4)
    assert np.abs(whole.hidden[2][changed] - output.hidden[2][changed]).max() > 1e-4  # there are fewer to attend to


@pytest.mark.parametrize(
    ("options", "route", "key"),
    [
        ({}, Route(1, 2, 3), None),
        ({}, Route(2, 4, 3), 0),
        ({}, Route(1, 2, 9), 0),
        ({"value_residual": True}, Route(0, 2, 3), 0),
    ],
    ids=str,
)
def test_routes_that_cannot_be_run_are_refused(options, route, key):
    with pytest.raises(ValueError, match="^route: must"):
        velocity(build(DiTConfig(**SHAPE, **options)), route=route, key=key if key is None else jax.random.key(key))
