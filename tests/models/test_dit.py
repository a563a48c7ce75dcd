"""The class-conditional model compared with diffusers' DiT, and its options."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowdit.models.config import DiTConfig
from flowdit.models.dit import DiT, build_dit
from flowdit.models.layers import (
    MLP,
    Linear,
    SelfAttention,
    TimeEmbedding,
    patchify,
    sinusoidal_features,
    unpatchify,
)
from flowdit.models.positions import Positions
from flowdit.models.trunk import Block, TrunkSettings

LATENT = (4, 8, 8)
SMALL = DiTConfig(depth=3, hidden_dim=48, num_heads=4, patch_size=2)


def reference(num_heads: int, head_dim: int, depth: int, patch_size: int) -> Any:
    """diffusers' class with every parameter random, and the time and class embedders equal in all blocks."""
    torch = pytest.importorskip("torch", reason="needs torch")
    import diffusers

    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=num_heads,
        attention_head_dim=head_dim,
        num_layers=depth,
        patch_size=patch_size,
        in_channels=4,
        out_channels=4,
        sample_size=8,
        num_embeds_ada_norm=10,
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn_like(parameter))
        first = model.transformer_blocks[0].norm1.emb.state_dict()
        for block in model.transformer_blocks:
            block.norm1.emb.load_state_dict(first)
    return model


def test_time_features_are_diffusers():
    """Up to one unit in the last place of the frequencies, which 1000 rad amplify to 1e-4."""
    torch = pytest.importorskip("torch", reason="needs torch")
    from diffusers.models.embeddings import get_timestep_embedding

    t = torch.tensor([0.0, 1.0, 125.0, 999.0])
    expected = get_timestep_embedding(t, 256, flip_sin_to_cos=True, downscale_freq_shift=1).numpy()
    got = np.stack([np.asarray(sinusoidal_features(jnp.float32(x), 256, 1.0)) for x in t])
    last_place = 2.0**-24
    assert (np.abs(got - expected) < 2 * last_place * t.numpy()[:, None] + 2e-7).all()


def array(tensor: Any) -> jax.Array:
    return jnp.asarray(tensor.detach().numpy())


def linear(*modules: Any) -> Linear:
    """One `Linear` from one or more concatenated torch layers."""
    weights = [array(m.weight).T for m in modules]
    return Linear(jnp.concatenate(weights, axis=1), jnp.concatenate([array(m.bias) for m in modules]))


def from_diffusers(model: Any) -> DiT:
    def block(b):
        a = b.attn1
        attention = SelfAttention(linear(a.to_q, a.to_k, a.to_v), linear(a.to_out[0]), None, None, None, a.heads)
        mlp = MLP(linear(b.ff.net[0].proj), linear(b.ff.net[2]))
        return Block(attention, None, mlp, linear(b.norm1.linear), None, mlp_norm_eps=1e-5)

    conv = model.pos_embed.proj
    embedder = model.transformer_blocks[0].norm1.emb
    blocks = [block(b) for b in model.transformer_blocks]
    return DiT(
        patch_embed=Linear(array(conv.weight).transpose(2, 3, 1, 0).reshape(-1, conv.out_channels), array(conv.bias)),
        time_embed=TimeEmbedding(
            linear(embedder.timestep_embedder.linear_1), linear(embedder.timestep_embedder.linear_2), freq_shift=1.0
        ),
        class_table=array(embedder.class_embedder.embedding_table.weight),
        blocks=jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks),
        final_ada_ln=linear(model.proj_out_1),
        final_linear=linear(model.proj_out_2),
        settings=TrunkSettings(model.config.patch_size),
    )


@pytest.mark.parametrize(("heads", "head_dim", "patch_size"), [(4, 16, 2), (2, 72, 4), (3, 32, 8)])
def test_equals_diffusers_dit(heads, head_dim, patch_size):
    torch = pytest.importorskip("torch", reason="needs torch")
    torch_model = reference(heads, head_dim, depth=3, patch_size=patch_size)
    # Eighths of the flow time are exact in float32, and so is 1000 t (JAX's own division by 1000 is not).
    x = torch.randn(4, *LATENT)
    t = torch.tensor([0.0, 125.0, 500.0, 875.0])
    labels = torch.tensor([0, 4, 9, 10])
    with torch.no_grad():
        expected = torch_model(x, t, labels).sample.numpy()
    ours = from_diffusers(torch_model)
    with jax.default_matmul_precision("highest"):
        got = jax.vmap(ours)(array(x), jnp.asarray(t.numpy() / 1000), array(labels))
    assert np.linalg.norm(got - expected) / np.linalg.norm(expected) < 1e-5


def test_starts_as_no_velocity_and_learns_from_there():
    model = build_dit(SMALL, LATENT[0], 10, key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), LATENT)
    assert not model(x, jnp.asarray(0.3), jnp.asarray(2)).any()
    grads = jax.grad(lambda m: jnp.square(m(x, jnp.asarray(0.3), jnp.asarray(2)) - 1).mean())(model)
    assert jnp.abs(grads.final_linear.weight).max() > 0 or jnp.abs(grads.final_linear.bias).max() > 0


def randomised(config: DiTConfig) -> DiT:
    """A model with random weights also in zero-initialised layers, so that every part matters."""
    model = build_dit(config, LATENT[0], 10, key=jax.random.key(0))
    leaves, structure = jax.tree.flatten(model)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    return jax.tree.unflatten(
        structure, [x + 0.05 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    )


def loss(model: DiT) -> jax.Array:
    x = jax.random.normal(jax.random.key(3), (2, *LATENT))
    velocity = jax.vmap(model)(x, jnp.asarray([0.2, 0.9]), jnp.asarray([1, 10]))
    return jnp.square(velocity - x).mean()


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_changes_memory_not_gradients(remat):
    plain = jax.jit(jax.grad(loss))(randomised(SMALL))
    with_remat = jax.jit(jax.grad(loss))(randomised(DiTConfig(depth=3, hidden_dim=48, num_heads=4, remat=remat)))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(with_remat), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_qk_norm_bounds_attention_logits():
    """With Q/K norm, scaling up the projections does not change the output; without, it does."""

    def change(qk_norm: bool) -> float:
        model = randomised(DiTConfig(depth=1, hidden_dim=48, num_heads=4, qk_norm=qk_norm))
        attention = jax.tree.map(lambda leaf: leaf[0], model.blocks.attention)
        dim = attention.qkv.weight.shape[0]
        scale = jnp.concatenate([jnp.full(2 * dim, 10.0), jnp.ones(dim)])
        scaled = eqx.tree_at(
            lambda a: (a.qkv.weight, a.qkv.bias),
            attention,
            (attention.qkv.weight * scale[None], attention.qkv.bias * scale),
        )
        x = jax.random.normal(jax.random.key(5), (16, dim))
        return float(jnp.abs(attention(x)[0] - scaled(x)[0]).max())

    assert change(qk_norm=True) < 1e-4 < 1e-2 < change(qk_norm=False)


def test_bfloat16_parameters_give_float32_velocity_close_to_float32():
    model = randomised(SMALL)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model)
    x = jax.random.normal(jax.random.key(1), LATENT)
    full = model(x, jnp.asarray(0.5), jnp.asarray(1))
    low = half(x, jnp.asarray(0.5), jnp.asarray(1))
    assert low.dtype == jnp.float32
    assert jnp.linalg.norm(low - full) / jnp.linalg.norm(full) < 0.05


def test_patchify_round_trip_and_row_major_order():
    x = jnp.arange(4 * 6 * 8, dtype=jnp.float32).reshape(4, 6, 8)
    tokens = patchify(x, 2)
    assert tokens.shape == (12, 16)
    np.testing.assert_array_equal(tokens[1], x[:, 0:2, 2:4].transpose(1, 2, 0).reshape(-1))
    np.testing.assert_array_equal(unpatchify(tokens, 2, (4, 6, 8)), x)


def test_positions_put_the_width_first():
    table = Positions().table(8, 2, 3)
    np.testing.assert_allclose(table[1], [np.sin(1), np.sin(0.01), np.cos(1), np.cos(0.01), 0, 0, 1, 1], atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        (dict(hidden_dim=50, num_heads=4), "hidden_dim"),
        (dict(hidden_dim=42, num_heads=6), "hidden_dim"),
        (dict(patch_size=3), "patch_size"),
        (dict(depth=0), "depth"),
        (dict(remat="some"), "remat"),
    ],
)
def test_impossible_shapes_are_refused_by_name(settings, field):
    with pytest.raises(ValueError, match=f"^{field}: must"):
        DiTConfig(**settings).check(LATENT)


def test_xl_2_has_the_parameters_of_the_paper():
    """DiT-XL/2: 675 M with 1000 classes and learned sigma on 4 channels; here without sigma."""
    build = lambda: build_dit(DiTConfig(qk_norm=False), 4, 1000, key=jax.random.key(0))
    count = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(build)))
    assert count == pytest.approx(675e6, rel=0.005)
