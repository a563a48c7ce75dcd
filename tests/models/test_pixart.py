"""The text-conditional model compared with diffusers' PixArt, its conditions and its options."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_weights import randomised

from flowdit.models.config import PixArtConfig
from flowdit.models.layers import MLP, CrossAttention, Linear, SelfAttention, TimeEmbedding
from flowdit.models.pixart import PixArt, SizeEmbedding, TextCondition, build_pixart
from flowdit.models.trunk import Block, TrunkSettings
from flowdit.sharding import MeshConfig, dotted_name, make_mesh, parameter_shardings

LATENT = (4, 8, 8)
TEXT_DIM = 20
SMALL = PixArtConfig(depth=2, hidden_dim=48, num_heads=4, patch_size=2)

# --- parity ---


def reference(config: PixArtConfig) -> Any:
    """diffusers' class with every parameter random, also those that start at zero."""
    torch = pytest.importorskip("torch", reason="needs torch")
    import diffusers

    torch.manual_seed(0)
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.hidden_dim // config.num_heads,
        num_layers=config.depth,
        patch_size=config.patch_size,
        in_channels=4,
        out_channels=4,
        sample_size=8,
        cross_attention_dim=config.hidden_dim,
        caption_channels=TEXT_DIM,
        interpolation_scale=config.interpolation_scale,
        use_additional_conditions=config.micro_conditioning,
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn_like(parameter))
    return model


def from_diffusers(state: Mapping[str, np.ndarray], config: PixArtConfig, null_caption: jax.Array) -> PixArt:
    """Our model from the tensors of diffusers' `PixArtTransformer2DModel`, by name; they include no null caption."""

    def linear(*names: str) -> Linear:
        weights, biases = zip(*((state[f"{n}.weight"].T, state[f"{n}.bias"]) for n in names), strict=True)
        return Linear(jnp.asarray(np.concatenate(weights, axis=1)), jnp.asarray(np.concatenate(biases)))

    def embedding(name: str, scale: float) -> TimeEmbedding:
        return TimeEmbedding(linear(f"{name}.linear_1"), linear(f"{name}.linear_2"), scale=scale)

    def block(name: str) -> Block:
        own, cross = f"{name}.attn1", f"{name}.attn2"
        qkv = linear(f"{own}.to_q", f"{own}.to_k", f"{own}.to_v")
        attention = SelfAttention(qkv, linear(f"{own}.to_out.0"), None, None, None, config.num_heads)
        key_value = linear(f"{cross}.to_k", f"{cross}.to_v")
        query, out = linear(f"{cross}.to_q"), linear(f"{cross}.to_out.0")
        cross_attention = CrossAttention(query, key_value, out, None, None, config.num_heads)
        mlp = MLP(linear(f"{name}.ff.net.0.proj"), linear(f"{name}.ff.net.2"))
        return Block(attention, cross_attention, mlp, None, jnp.asarray(state[f"{name}.scale_shift_table"]))

    def size_embedding() -> SizeEmbedding:
        names = ("adaln_single.emb.resolution_embedder", "adaln_single.emb.aspect_ratio_embedder")
        return SizeEmbedding(*(embedding(name, scale=1.0) for name in names))

    conv = state["pos_embed.proj.weight"]  # (out, in, row, column)
    blocks = [block(f"transformer_blocks.{i}") for i in range(config.depth)]
    return PixArt(
        patch_embed=Linear(
            jnp.asarray(conv.transpose(2, 3, 1, 0).reshape(-1, len(conv))), jnp.asarray(state["pos_embed.proj.bias"])
        ),
        time_embed=embedding("adaln_single.emb.timestep_embedder", scale=1000.0),
        size_embed=size_embedding() if config.micro_conditioning else None,
        caption_proj=MLP(linear("caption_projection.linear_1"), linear("caption_projection.linear_2")),
        null_caption=null_caption,
        time_block=linear("adaln_single.linear"),
        blocks=jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks),
        final_table=jnp.asarray(state["scale_shift_table"]),
        final_linear=linear("proj_out"),
        settings=TrunkSettings.of(config),
    )


def inputs_of(latent_shape: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """Three examples with ragged texts. Eighths of the flow time are exact in float32, and so is 1000 t."""
    rng = np.random.default_rng(1)
    return {
        "x_t": rng.standard_normal((3, *latent_shape), np.float32),
        "t": np.asarray([0.0, 0.5, 0.875], np.float32),
        "features": rng.standard_normal((3, 7, TEXT_DIM), np.float32),
        "mask": np.arange(7)[None] < np.asarray([7, 1, 4])[:, None],
        "size": np.asarray([[1024, 1024], [512, 2048], [704, 1408]], np.float32),
    }


def relative_error_to_diffusers(model: Any, config, latent_shape) -> float:
    torch = pytest.importorskip("torch", reason="needs torch")
    inputs = inputs_of(latent_shape)
    tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
    size = tensors["size"]
    added = {"resolution": size, "aspect_ratio": size[:, :1] / size[:, 1:]} if config.micro_conditioning else None
    with torch.no_grad():
        expected = model(
            tensors["x_t"],
            tensors["features"],
            timestep=torch.from_numpy(1000 * inputs["t"]),
            added_cond_kwargs=added,
            encoder_attention_mask=tensors["mask"],
        ).sample.numpy()
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    ours = from_diffusers(state, config, jnp.zeros(TEXT_DIM))
    condition = TextCondition(inputs["features"], inputs["mask"], np.zeros(3, bool), inputs["size"])
    with jax.default_matmul_precision("highest"):
        got = jax.jit(jax.vmap(ours))(*jax.tree.map(jnp.asarray, (inputs["x_t"], inputs["t"], condition)))
    return np.linalg.norm(got - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("depth", "dim", "heads", "patch_size", "scale", "micro"),
    [
        (3, 48, 4, 2, 1.0, False),
        (2, 144, 2, 4, 0.5, False),
        (1, 96, 3, 8, 2.0, False),
        (4, 48, 2, 2, 2.0, True),
        (2, 72, 1, 4, 1.0, True),
    ],
)
def test_equals_diffusers_pixart(depth, dim, heads, patch_size, scale, micro):
    config = PixArtConfig(
        depth=depth,
        hidden_dim=dim,
        num_heads=heads,
        patch_size=patch_size,
        qk_norm=False,
        micro_conditioning=micro,
        interpolation_scale=scale,
    )
    assert relative_error_to_diffusers(reference(config), config, LATENT) < 1e-5


@pytest.mark.parametrize("latent_shape", [(4, 4, 8), (4, 16, 16), (4, 12, 4)], ids=str)
def test_one_model_serves_other_latent_sizes_as_diffusers_does(latent_shape):
    """diffusers scales every grid to the range of `sample_size`, here 4 patches: `position_base`."""
    config = dataclasses.replace(SMALL, qk_norm=False, position_base=4, interpolation_scale=2.0)
    assert relative_error_to_diffusers(reference(config), config, latent_shape) < 1e-5


# --- conditions ---


def build(config: PixArtConfig) -> Callable[..., PixArt]:
    return functools.partial(build_pixart, config, LATENT[0], TEXT_DIM)


@pytest.fixture(scope="module")
def model() -> PixArt:
    return randomised(build(SMALL))


def condition(key: int = 0, valid: int = 3, dropped: bool = False, tokens: int = 6) -> TextCondition:
    features = jax.random.normal(jax.random.key(key), (tokens, TEXT_DIM))
    return TextCondition(features, jnp.arange(tokens) < valid, jnp.asarray(dropped))


@eqx.filter_jit
def velocity(model: PixArt, text: TextCondition, t: float = 0.5) -> jax.Array:
    return model(jax.random.normal(jax.random.key(1), LATENT), jnp.asarray(t, jnp.float32), text)


@jax.jit
def gradient(model: PixArt, *texts: TextCondition) -> PixArt:
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *texts)
    return jax.grad(lambda m: jnp.square(jax.vmap(lambda text: velocity(m, text))(batch)).sum())(model)


def test_dropped_caption_is_the_same_for_every_text(model):
    null = velocity(model, condition(key=0, valid=3, dropped=True))
    for other in (condition(key=5, valid=6, dropped=True), condition(key=6, valid=1, dropped=True)):
        np.testing.assert_allclose(velocity(model, other), null, rtol=1e-5, atol=1e-5)
    assert jnp.abs(velocity(model, condition(key=0)) - null).max() > 1e-2


def test_features_count_only_where_the_mask_is_true(model):
    text = condition(valid=3)
    poisoned = text._replace(features=text.features.at[3:].set(1e3))
    np.testing.assert_array_equal(velocity(model, poisoned), velocity(model, text))
    changed = text._replace(features=text.features.at[2].set(1.0))
    assert jnp.abs(velocity(model, changed) - velocity(model, text)).max() > 1e-3


def test_text_without_a_token_is_no_caption(model):
    empty, null = condition(valid=0), condition(key=4, dropped=True)
    np.testing.assert_allclose(velocity(model, empty), velocity(model, null), rtol=1e-5, atol=1e-5)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient(model, empty, null)))


def test_null_caption_learns_from_dropped_captions_only(model):
    shown, dropped = condition(key=0), condition(key=1, dropped=True)
    assert not gradient(model, shown, condition(key=1)).null_caption.any()
    assert gradient(model, shown, dropped).null_caption.any()


def test_size_is_required_and_used_with_micro_conditioning():
    model = randomised(build(dataclasses.replace(SMALL, micro_conditioning=True)))
    with pytest.raises(ValueError, match=r"^TextCondition\.size: must be given"):
        velocity(model, condition())
    portrait, landscape = (condition()._replace(size=jnp.asarray(s)) for s in ([512.0, 256.0], [256.0, 512.0]))
    assert jnp.abs(velocity(model, portrait) - velocity(model, landscape)).max() > 1e-3


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_features_of_any_float_dtype_are_accepted(model, dtype):
    text = condition()
    low = text._replace(features=text.features.astype(dtype))
    expected = text._replace(features=low.features.astype(jnp.float32))
    np.testing.assert_array_equal(velocity(model, low), velocity(model, expected))


# --- options ---


@pytest.fixture(scope="module")
def fresh() -> PixArt:
    return build(SMALL)(key=jax.random.key(0))


def test_starts_with_zero_velocity_and_no_effect_of_the_text(fresh):
    assert not velocity(fresh, condition()).any()
    alive = eqx.tree_at(lambda m: m.final_linear.weight, fresh, replace_fn=jnp.ones_like)
    np.testing.assert_array_equal(velocity(alive, condition(key=0)), velocity(alive, condition(key=1, dropped=True)))
    assert velocity(alive, condition()).any()


def test_initial_scales_are_those_of_pixart(fresh):
    for scale, leaf in [
        (48**-0.5, fresh.blocks.table),
        (48**-0.5, fresh.final_table),
        (20**-0.5, fresh.null_caption),
        (0.02, fresh.time_block.weight),
        (0.02, fresh.caption_proj.up.weight),
        ((2 / 96) ** 0.5, fresh.blocks.cross_attention.key_value.weight),
    ]:
        assert float(leaf.std()) == pytest.approx(scale, rel=3 / (2 * leaf.size) ** 0.5)


def test_qk_norm_bounds_cross_attention_logits():
    """With Q/K norm, scaling up the query projection does not change the output; without, it does."""

    def change(qk_norm: bool) -> float:
        blocks = randomised(build(dataclasses.replace(SMALL, depth=1, qk_norm=qk_norm))).blocks
        attention = jax.tree.map(lambda leaf: leaf[0], blocks.cross_attention)
        scaled = eqx.tree_at(lambda a: a.query, attention, jax.tree.map(lambda leaf: 20 * leaf, attention.query))
        x, text = jax.random.normal(jax.random.key(5), (2, 8, 48))
        return float(jnp.abs(attention(x, text, jnp.ones(8, bool)) - scaled(x, text, jnp.ones(8, bool))).max())

    assert change(qk_norm=True) < 1e-4 < 1e-2 < change(qk_norm=False)


def with_settings(model: PixArt, **settings: Any) -> PixArt:
    return dataclasses.replace(model, settings=model.settings._replace(**settings))


def test_remat_changes_memory_not_gradients(model):
    texts = condition(key=0), condition(key=1, dropped=True)
    plain, with_remat = gradient(model, *texts), gradient(with_settings(model, remat="full"), *texts)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(with_remat), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_bfloat16_parameters_give_float32_velocity_close_to_float32(model):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model)
    full, low = velocity(model, condition()), velocity(half, condition())
    assert low.dtype == jnp.float32
    assert jnp.linalg.norm(low - full) / jnp.linalg.norm(full) < 0.05


def test_every_matrix_that_grows_with_the_model_is_sharded():
    mesh = make_mesh(MeshConfig(data=1, fsdp=4))
    shapes = jax.eval_shape(lambda: build_pixart(SMALL, LATENT[0], TEXT_DIM, key=jax.random.key(0)))
    specs = {dotted_name(path): s.spec for path, s in jax.tree.leaves_with_path(parameter_shardings(mesh, shapes))}
    large = {n for n in specs if n.endswith(".weight") and n.startswith(("blocks.", "time_block."))}
    assert {n for n, spec in specs.items() if "fsdp" in spec} == large
    assert "blocks.cross_attention.key_value.weight" in large


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        (dict(null_tokens=0), "null_tokens"),
        (dict(position_base=0), "position_base"),
        (dict(norm="batch"), "norm"),
        (dict(mlp="relu"), "mlp"),
        (dict(positions="learned"), "positions"),
        (dict(hidden_dim=24, num_heads=4, positions="rope"), "hidden_dim"),
        (dict(hidden_dim=64, num_heads=4, micro_conditioning=True), "hidden_dim"),
        (dict(interpolation_scale=0.0), "interpolation_scale"),
        (dict(interpolation_scale=-1.0), "interpolation_scale"),
    ],
)
def test_impossible_settings_are_refused_by_name(settings, field):
    with pytest.raises(ValueError, match=f"^{field}: must"):
        PixArtConfig(**settings).check(LATENT)


def test_xl_2_has_the_parameters_of_the_paper():
    """PixArt-alpha XL/2: 611 M with T5-XXL's 4096 channels and learned sigma on 4 channels; here without sigma."""
    config = PixArtConfig(qk_norm=False)
    shapes = jax.eval_shape(lambda: build_pixart(config, 4, 4096, key=jax.random.key(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == pytest.approx(611e6, rel=0.002)
