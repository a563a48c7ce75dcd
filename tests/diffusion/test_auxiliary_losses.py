"""The auxiliary losses of the package, computed again with NumPy, and their defaults by network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowdit.config import Config
from flowdit.diffusion import flow
from flowdit.diffusion.auxiliary import AUXILIARY, DataShapes, View
from flowdit.diffusion.auxiliary.clean_latent import CleanLatent
from flowdit.diffusion.auxiliary.internal_guidance import InternalGuidance
from flowdit.diffusion.auxiliary.layer_sync import LayerSync
from flowdit.fields import FieldError
from flowdit.models.config import DiTConfig

LATENT = (4, 6, 8)
CONFIG = DiTConfig(depth=12, hidden_dim=16, num_heads=2)


def view(**hidden):
    """A view of noise, with tokens by depth."""
    names = ("x_0", "x_t", "velocity", "target")
    latents = dict(zip(names, jax.random.normal(jax.random.key(0), (4, *LATENT)), strict=True))
    return View({}, t=jnp.asarray(0.3), hidden={int(depth[1:]): tokens for depth, tokens in hidden.items()}, **latents)


def tokens(seed):
    return 3 * jax.random.normal(jax.random.key(seed), (12, 16))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_layer_sync_is_one_minus_the_cosine(dtype):
    early, late = (tokens(seed).astype(dtype) for seed in (1, 2))
    loss = LayerSync(depth=4, teacher_depth=8)
    a, b = (np.asarray(x.astype(jnp.float32), np.float64) for x in (early, late))
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    np.testing.assert_allclose(loss({}, view(d4=early, d8=late)), (1 - cosine).mean(), rtol=1e-5)
    assert loss({}, view(d4=early, d8=late)).dtype == jnp.float32
    assert 0 <= float(loss({}, view(d4=early, d8=2 * early))) < 1e-6
    gradients = jax.grad(lambda both: loss({}, view(d4=both[0], d8=both[1])))((early, late))
    assert [bool(jnp.any(gradient != 0)) for gradient in gradients] == [True, False]


def test_clean_latent_is_the_smooth_error_of_patches():
    loss = CleanLatent(beta=0.5).for_model(CONFIG)
    parameters = loss.init(CONFIG, DataShapes(LATENT), key=jax.random.key(3))
    seen = view(d2=tokens(1))
    x = np.asarray(seen.hidden[2], np.float64)
    for i, linear in enumerate(parameters):
        x = x @ np.asarray(linear.weight) + np.asarray(linear.bias)
        x = x if i == len(parameters) - 1 else x / (1 + np.exp(-x))
    assert len(parameters) == 5 and x.shape == (12, 16)
    rows, columns = np.divmod(np.arange(12), 4)
    patches = [
        np.asarray(seen.x_0)[:, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2] for r, c in zip(rows, columns, strict=True)
    ]
    error = np.abs(x - np.stack(patches).transpose(0, 2, 3, 1).reshape(12, 16))
    expected = np.where(error < 0.5, error**2, error - 0.25).mean()  # error^2 / (2 x 0.5)
    assert (error < 0.5).any() and (error > 0.5).any()
    np.testing.assert_allclose(loss(parameters, seen), expected, rtol=1e-5)
    in_bfloat16 = loss(jax.tree.map(lambda x: x.astype(jnp.bfloat16), parameters), seen)
    assert in_bfloat16.dtype == jnp.float32
    np.testing.assert_allclose(in_bfloat16, expected, rtol=0.02)


@pytest.mark.parametrize(
    ("depth", "blocks"),
    [
        (40, (8, 16, 8, 8)),
        (28, (8, 16, 8, 8)),
        (26, (8, 18, 8, 8)),
        (24, (8, 18, 8, 8)),
        (12, (4, 8, 2, 4)),
        (8, (2, 5, 1, 3)),
        (2, (1, 2, 1, 1)),
    ],
)
def test_blocks_by_the_depth_of_the_network(depth, blocks):
    config = Config(model=DiTConfig(depth=depth))
    names = ("layer_sync", "clean_latent", "repa")
    for name in names:
        config.auxiliary[name].weight = 1.0
    config.check()
    losses = {loss.name: loss for loss in config.auxiliary_losses()}
    assert sum((losses[name].depths() for name in names), ()) == blocks


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (LayerSync(depth=8, teacher_depth=8), "teacher_depth: must be after block depth=8, got 8"),
        (
            InternalGuidance(last_step=100),
            "internal_guidance.last_step: must be null: samplers use the guidance head.*, got 100",
        ),
        (CleanLatent(beta=0.0), "beta: must be positive and finite, got 0.0"),
        (LayerSync(depth=13, teacher_depth=14), r"layer_sync.depths: must be blocks in \[1, model.depth=12\]"),
    ],
)
def test_bad_setting(loss, message):
    loss.weight = 1.0
    config = Config(model=CONFIG, auxiliary={name: kind() for name, kind in AUXILIARY.items()} | {loss.name: loss})
    with pytest.raises(FieldError, match=message):
        config.check()


@pytest.mark.parametrize("std", [0.5, 1.0, 2.0])
def test_logit_normal_times(std):
    times = jax.vmap(lambda key: flow.sample_time(key, "logit_normal", 2.0, std))(
        jax.random.split(jax.random.key(0), 4000)
    )
    logits = np.log(times / (1 - times))
    assert logits.mean() == pytest.approx(np.log(2), abs=0.1)
    assert logits.std() == pytest.approx(std, rel=0.1)
