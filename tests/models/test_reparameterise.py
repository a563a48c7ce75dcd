"""A text model made from a class model equals it, without its class, at the chosen time."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_weights import randomised

from flowdit.models.config import DiTConfig, PixArtConfig
from flowdit.models.dit import DiT, build_dit
from flowdit.models.pixart import PixArt, TextCondition, build_pixart
from flowdit.models.reparameterise import CLASS_CONDITIONS, SHARED_MAPS, check_compatible, drift, reparameterise
from flowdit.sharding import MeshConfig, init_sharded, make_mesh

LATENT = (4, 8, 8)
TEXT_DIM = 12
CLASS = DiTConfig(depth=3, hidden_dim=48, num_heads=4)
TEXT = PixArtConfig(depth=3, hidden_dim=48, num_heads=4)


@pytest.fixture(scope="module")
def class_model() -> DiT:
    return randomised(functools.partial(build_dit, CLASS, LATENT[0], 10), 1)


@pytest.fixture(scope="module")
def text_model() -> PixArt:
    """With random cross-attention outputs and size MLPs: the recipe must make them zero at first."""
    config = dataclasses.replace(TEXT, micro_conditioning=True)
    return randomised(functools.partial(build_pixart, config, LATENT[0], TEXT_DIM), 2)


start = jax.jit(reparameterise, static_argnames=("time", "shared_map", "class_condition"))
jitted_drift = jax.jit(drift, static_argnums=4)


@jax.jit
def relative_error(class_model: DiT, text_model: PixArt, class_vector: jax.Array, t: float) -> jax.Array:
    """The largest difference over two captions and none, each with another image size."""
    class_model = dataclasses.replace(class_model, class_table=class_vector[None])
    texts = TextCondition(
        features=3 * jax.random.normal(jax.random.key(5), (3, 5, TEXT_DIM)),
        mask=jnp.asarray([[True] * 5, [True] + [False] * 4, [False] * 5]),
        dropped=jnp.asarray([False, False, True]),
        size=jnp.asarray([[256.0, 256.0], [512.0, 256.0], [64.0, 1024.0]]),
    )
    x = jax.random.normal(jax.random.key(4), LATENT)
    expected = class_model(x, jnp.asarray(t, jnp.float32), jnp.asarray(0))
    got = jax.vmap(lambda text: text_model(x, jnp.asarray(t, jnp.float32), text))(texts)
    return jnp.linalg.norm((got - expected[None]).reshape(3, -1), axis=1).max() / jnp.linalg.norm(expected.ravel())


def class_vector(class_model: DiT, class_condition: str) -> jax.Array:
    return {"dropped": jnp.zeros(CLASS.hidden_dim), "null_class": class_model.class_table[-1]}[class_condition]


@pytest.mark.parametrize("shared_map", SHARED_MAPS)
@pytest.mark.parametrize("class_condition", CLASS_CONDITIONS)
def test_equals_the_class_model_without_its_class_for_any_caption(class_model, text_model, shared_map, class_condition):
    model = start(class_model, text_model, shared_map=shared_map, class_condition=class_condition)
    without, other = (class_vector(class_model, c) for c in sorted(CLASS_CONDITIONS, key=class_condition.__ne__))
    assert relative_error(class_model, model, without, 0.5) < 2e-6
    assert relative_error(class_model, model, without, 0.25) > 1e-2
    assert relative_error(class_model, model, other, 0.5) > 1e-2


def test_the_time_of_equality_can_be_chosen(class_model, text_model):
    model = start(class_model, text_model, time=0.25)
    without = class_vector(class_model, "dropped")
    assert relative_error(class_model, model, without, 0.25) < 2e-6
    assert relative_error(class_model, model, without, 0.5) > 1e-2


def test_what_the_models_share_is_copied_bit_for_bit(class_model, text_model):
    model = start(class_model, text_model)
    copied = lambda m: (m.patch_embed, m.time_embed, m.blocks.attention, m.blocks.mlp, m.final_linear)
    kept = lambda m: (
        m.caption_proj,
        m.null_caption,
        m.blocks.cross_attention.query,
        m.blocks.cross_attention.key_value,
    )
    for part, source in ((copied, class_model), (kept, text_model)):
        for got, expected in zip(jax.tree.leaves(part(model)), jax.tree.leaves(part(source)), strict=True):
            np.testing.assert_array_equal(got, expected)
    assert not any(leaf.any() for leaf in jax.tree.leaves(model.blocks.cross_attention.out))


def test_result_is_the_text_model_in_structure_and_shape(class_model, text_model):
    """Including static fields, so that it can be trained and restored like a new one."""
    ours = dataclasses.replace(text_model, settings=text_model.settings._replace(remat="full"))
    result = jax.eval_shape(reparameterise, class_model, ours)
    assert jax.tree.structure(result) == jax.tree.structure(ours)
    assert [x.shape for x in jax.tree.leaves(result)] == [x.shape for x in jax.tree.leaves(ours)]


def test_sharded_models_give_the_same(class_model, text_model):
    mesh = make_mesh(MeshConfig(data=1, fsdp=4))
    sharded = init_sharded(mesh, lambda: reparameterise(class_model, text_model, shared_map="mean"))
    whole = start(class_model, text_model, shared_map="mean")
    for got, expected in zip(jax.tree.leaves(sharded), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("class_condition", CLASS_CONDITIONS)
def test_drift_is_zero_at_the_time_of_equality_only(class_model, text_model, class_condition):
    model = start(class_model, text_model, class_condition=class_condition)
    x_t = jax.random.normal(jax.random.key(6), (3, 2, *LATENT))
    drifts = jitted_drift(class_model, model, jnp.asarray([0.1, 0.5, 0.9]), x_t, class_condition)
    assert drifts[1] < 2e-6
    assert 1e-2 < drifts[0] < 10
    assert 1e-2 < drifts[2] < 10


def test_drift_supports_latents_of_another_size(class_model, text_model):
    model = start(class_model, text_model)
    assert jitted_drift(class_model, model, jnp.asarray([0.5]), jnp.ones((1, 1, 4, 8, 16)))[0] < 2e-6


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("depth", 2),
        ("hidden_dim", 96),
        ("num_heads", 2),
        ("patch_size", 4),
        ("mlp_ratio", 2.0),
        ("qk_norm", False),
        ("interpolation_scale", 0.5),
    ],
)
def test_another_shape_is_refused_by_name(field, value):
    with pytest.raises(ValueError) as error:
        check_compatible(CLASS, dataclasses.replace(TEXT, **{field: value}), LATENT, LATENT)
    assert str(error.value) == f"model.{field}: must be {getattr(CLASS, field)} as in train.init_from, got {value}"


def test_latents_need_equal_channels_only():
    check_compatible(CLASS, TEXT, LATENT, (4, 16, 8))
    with pytest.raises(ValueError, match=r"^train\.init_from: its latents are 16x8x8, the data's are 4x8x8"):
        check_compatible(CLASS, TEXT, (16, 8, 8), LATENT)
