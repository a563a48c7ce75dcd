"""The training step: its results, independent of devices and accumulation, and non-finite steps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flowdit.conditioning.labels import Labels
from flowdit.diffusion.objective import FlowMatching, Parameters
from flowdit.models.compute import FLOAT32, Compute
from flowdit.models.config import DiTConfig
from flowdit.models.dit import build_dit
from flowdit.models.flops import matmul_flops
from flowdit.optim import OptimConfig, decay_mask, learning_rate_schedule, make_optimizer
from flowdit.sharding import MeshConfig, init_sharded, make_mesh, shard_batch
from flowdit.training.step import image_flops, init_state, make_train_step

LATENT, CLASSES = (4, 8, 8), 5
MODEL = DiTConfig(depth=2, hidden_dim=32, num_heads=2)
OBJECTIVE = FlowMatching(Labels(tuple(map(str, range(CLASSES)))), 0.1, (0.1,) * 4, (0.9,) * 4)


def batch_of(size: int, step: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(step)
    labels = rng.integers(0, CLASSES, size).astype(np.int32)
    return {
        "latent": rng.normal(size=(size, *LATENT)).astype(np.float32) + labels.reshape(-1, 1, 1, 1),
        "label": labels,
    }


def run(
    mesh_config=None,
    *,
    steps=3,
    batch=8,
    accum=1,
    objective=OBJECTIVE,
    optim=None,
    batches=batch_of,
    decay=0.9,
    compute=FLOAT32,
    devices=None,
):
    """Losses and final state of a few steps."""
    mesh = make_mesh(mesh_config or MeshConfig(), devices)
    optimizer = make_optimizer(optim or OptimConfig(learning_rate=1e-2), 100)
    build = lambda: init_state(build_dit(MODEL, LATENT[0], CLASSES, key=jax.random.key(0)), optimizer)
    state = init_sharded(mesh, build)
    step = make_train_step(optimizer, objective, 0, accum, decay, compute=compute, mesh=mesh)
    history = []
    for i in range(steps):
        state, metrics = step(state, shard_batch(mesh, batches(batch, i)))
        history.append(jax.device_get(metrics))
    return history, jax.device_get(state)


def assert_same_run(a, b, rtol=2e-4):
    """Equal to the rounding of float32 sums in another order (AdamW divides small gradients, which widens it)."""
    np.testing.assert_allclose([m["loss"] for m in a[0]], [m["loss"] for m in b[0]], rtol=1e-5)
    for x, y in zip(jax.tree.leaves(a[1].model), jax.tree.leaves(b[1].model), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=2e-4)


@pytest.fixture(scope="module")
def baseline():
    """Three steps of batch 8 on four data-parallel devices, the reference of most tests."""
    return run()


def test_validation_ends_with_the_loss_without_condition_where_conditions_are_dropped():
    batch, key = jax.tree.map(jnp.asarray, batch_of(6)), jax.random.key(3)
    model = jax.tree.map(jnp.asarray, run(steps=2)[1].model)
    rows = OBJECTIVE.validation(model, batch, key)
    null = batch | {"label": jnp.full(6, CLASSES, jnp.int32)}
    whole, never = (dataclasses.replace(OBJECTIVE, drop_rate=rate).validation(model, null, key) for rate in (0.1, 0.0))
    np.testing.assert_allclose(rows[-1], whole[-2], rtol=1e-6)
    assert (len(rows), len(never)) == (len(OBJECTIVE.validation_times) + 1, len(OBJECTIVE.validation_times))
    assert not np.allclose(rows[-1], rows[-2])


GOLDEN_LOSSES = [4.658321, 7.147029, 4.482697]


def test_golden_losses(baseline):
    """A refactor must reproduce these; a change of randomness, initialisation or mathematics must update them."""
    losses = [float(m["loss"]) for m in baseline[0]]
    np.testing.assert_allclose(losses, GOLDEN_LOSSES, rtol=1e-4)


@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(data=1, fsdp=4),
        MeshConfig(data=1, fsdp=2, tensor=2),
        pytest.param(MeshConfig(data=2, fsdp=2), marks=pytest.mark.slow),
        pytest.param(MeshConfig(data=2, tensor=2), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_layouts_give_the_same_run(mesh, baseline):
    assert_same_run(run(mesh), baseline)


@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(data=1, fsdp=2, tensor=2),
        pytest.param(MeshConfig(data=1, fsdp=4), marks=pytest.mark.slow),
        pytest.param(MeshConfig(data=2, fsdp=2), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_fast_layers_give_the_same_run_on_each_layout(mesh, baseline):
    assert_same_run(run(mesh, accum=2, compute=Compute(is_fast=True)), baseline)


def test_one_device_gives_the_same_run_as_four(baseline):
    assert_same_run(run(devices=jax.devices()[:1]), baseline)


def test_fsdp_parameters_are_sharded():
    mesh = make_mesh(MeshConfig(data=1, fsdp=4))
    optimizer = make_optimizer(OptimConfig(), 10)
    state = init_sharded(
        mesh, lambda: init_state(build_dit(MODEL, LATENT[0], CLASSES, key=jax.random.key(0)), optimizer)
    )
    for tree in (state.model, state.ema, state.opt_state[1][0].mu.model):
        weight = tree.blocks.attention.qkv.weight
        assert weight.addressable_shards[0].data.size == weight.size // 4
        assert tree.class_table.sharding.is_fully_replicated


def test_accumulation_equals_the_large_batch(baseline):
    mesh = MeshConfig(data=1, fsdp=2, tensor=2)
    assert_same_run(run(mesh, accum=4), baseline)


def test_bfloat16_compute_keeps_float32_masters(baseline):
    with jax.numpy_dtype_promotion("standard"):  # the backward pass of JAX's attention mixes dtypes
        history, state = run(compute=Compute("bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves((state.model, state.ema))} == {np.dtype("float32")}
    expected = [m["loss"] for m in baseline[0]]
    np.testing.assert_allclose([m["loss"] for m in history], expected, rtol=0.02)


def test_ema_is_of_the_new_weights():
    history = [run(steps=n, decay=0.75)[1] for n in (1, 2)]
    initial = run(steps=0)[1].model
    expected = jax.tree.map(
        lambda i, a, b: 0.75 * (0.75 * i + 0.25 * a) + 0.25 * b, initial, history[0].model, history[1].model
    )
    for x, y in zip(jax.tree.leaves(history[1].ema), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


ADAMW, MUON = (OptimConfig(name=name, learning_rate=1e-2) for name in ("adamw", "muon"))


@pytest.mark.parametrize(("bad", "optim"), [(np.nan, ADAMW), (np.inf, ADAMW), (np.nan, MUON)])
def test_a_bad_batch_never_reaches_the_weights(bad, optim):
    """The second of three batches is not finite: it is skipped and counted, and training continues."""

    def poisoned(size, step):
        batch = batch_of(size, step)
        if step == 1:
            batch["latent"][3, 0, 0, 0] = bad
        return batch

    after_one, after_two = run(steps=1, optim=optim)[1], run(steps=2, optim=optim, batches=poisoned)[1]
    for name in ("model", "ema", "opt_state"):
        for x, y in zip(
            jax.tree.leaves(getattr(after_two, name)), jax.tree.leaves(getattr(after_one, name)), strict=True
        ):
            np.testing.assert_array_equal(x, y)
    history, state = run(steps=3, optim=optim, batches=poisoned)
    assert [int(m["skipped"]) for m in history] == [0, 1, 1]
    assert [int(m["skipped_in_row"]) for m in history] == [0, 1, 0]
    assert int(state.step) == 3 and np.isfinite(history[2]["loss"])


def test_reported_learning_rate_is_that_of_the_last_update():
    """The second batch is skipped: it does not update, and the schedule counts updates."""

    def poisoned(size, step):
        batch = batch_of(size, step)
        return batch | {"latent": batch["latent"] * np.float32(np.nan if step == 1 else 1)}

    history, _ = run(optim=OptimConfig(learning_rate=1e-2, warmup_steps=4), batches=poisoned)
    np.testing.assert_allclose([m["learning_rate"] for m in history], [0.0025, 0.0025, 0.005], rtol=1e-5)


def test_flops_of_an_image_depend_only_on_its_loss():
    model = build_dit(MODEL, LATENT[0], CLASSES, key=jax.random.key(0))
    forward = matmul_flops(lambda model: model(jnp.zeros(LATENT), jnp.zeros(()), jnp.asarray(0)), model)
    few, many = (jax.tree.map(jnp.asarray, batch_of(size)) for size in (4, 8))
    few["latent_std"] = jnp.ones_like(few["latent"])
    assert image_flops(OBJECTIVE, FLOAT32, Parameters(model), many) == 3 * forward
    assert image_flops(OBJECTIVE, Compute("bfloat16"), Parameters(jax.eval_shape(lambda: model)), few) == 3 * forward


def test_every_step_draws_its_own_noise():
    """The same batch with a learning rate near zero: the losses differ only by noise and times."""
    frozen = OptimConfig(learning_rate=1e-12)
    losses = [float(m["loss"]) for m in run(optim=frozen, batches=lambda size, _: batch_of(size))[0]]
    assert len(set(losses)) == 3


def test_latents_are_sampled_anew_from_the_posterior_at_each_step():
    def with_std(size, _step):
        return batch_of(size) | {"latent_std": np.full((size, *LATENT), 0.5, np.float32)}

    batch = jax.tree.map(jnp.asarray, with_std(256, 0))
    mean = jax.vmap(lambda example: OBJECTIVE.latent(example, None))(batch)
    one, other = (jax.vmap(OBJECTIVE.latent)(batch, jax.random.split(jax.random.key(i), 256)) for i in (0, 1))
    assert jnp.abs((one - mean).std() - 0.5 * 0.9) < 0.01
    assert not jnp.array_equal(one, other)


def test_decay_only_on_matrices_of_linear_layers():
    model = build_dit(MODEL, LATENT[0], CLASSES, key=jax.random.key(0))
    mask = decay_mask(model)
    assert mask.blocks.attention.qkv.weight and mask.final_linear.weight
    assert not (mask.blocks.attention.qkv.bias or mask.class_table or mask.blocks.attention.query_norm.scale)


def test_weight_decay_shrinks_what_has_no_gradient():
    config = OptimConfig(learning_rate=0.1, weight_decay=0.5, clip_norm=None)
    optimizer = make_optimizer(config, 10)
    params = {"linear": {"weight": jnp.ones(3), "bias": jnp.ones(3)}}
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    new = optax.apply_updates(params, updates)
    np.testing.assert_allclose(new["linear"]["weight"], 0.95)
    np.testing.assert_allclose(new["linear"]["bias"], 1.0)


def test_clipping_is_by_global_norm():
    config = OptimConfig(learning_rate=1.0, clip_norm=1e-6, eps=1.0)
    optimizer = make_optimizer(config, 10)
    params = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
    updates, _ = optimizer.update(jax.tree.map(lambda x: x + 1e3, params), optimizer.init(params), params)
    # With eps far above the clipped gradient, AdamW's update is -gradient: its norm is the clip.
    assert float(optax.tree.norm(updates)) == pytest.approx(1e-6, rel=1e-3)


def test_a_bfloat16_first_moment_is_rounded_only_between_steps():
    rng = np.random.default_rng(0)
    params, first, second = ({"weight": jnp.asarray(rng.normal(size=99), jnp.float32)} for _ in range(3))
    wide, narrow = (make_optimizer(OptimConfig(first_moment_dtype=dtype), 10) for dtype in ("float32", "bfloat16"))
    expected, state = wide.update(first, wide.init(params), params)
    updates, narrow_state = narrow.update(first, narrow.init(params), params)
    np.testing.assert_array_equal(updates["weight"], expected["weight"])
    for _ in range(2):
        rounded = jax.tree.map(lambda wide, narrow: wide.astype(narrow.dtype), state, narrow_state)
        for one, other in zip(jax.tree.leaves(narrow_state), jax.tree.leaves(rounded), strict=True):
            np.testing.assert_array_equal(one, other)
        expected, state = wide.update(second, jax.tree.map(lambda x, y: x.astype(y.dtype), rounded, state), params)
        updates, narrow_state = narrow.update(second, narrow_state, params)
        np.testing.assert_array_equal(updates["weight"], expected["weight"])
    moments = narrow_state[1][0]
    assert (moments.mu["weight"].dtype, moments.nu["weight"].dtype) == (jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (dict(), {0: 1.0, 99: 1.0}),
        (dict(warmup_steps=4), {0: 0.25, 1: 0.5, 3: 1.0, 50: 1.0}),
        (dict(schedule="cosine", warmup_steps=20, final_factor=0.1), {19: 1.0, 20: 1.0, 60: 0.55, 100: 0.1}),
        # 1 - sqrt: half-way down after a quarter of the decay, which is a fifth of the steps by default.
        (dict(schedule="wsd", warmup_steps=4), {0: 0.25, 3: 1.0, 79: 1.0, 80: 1 - 21**-0.5, 100: 0.0, 150: 0.0}),
        (dict(schedule="wsd", decay_steps=39, final_factor=0.2), {0: 1.0, 60: 1.0, 70: 0.6, 100: 0.2}),
        (dict(schedule="wsd", decay_steps=1), {98: 1.0, 99: 1 - 0.5**0.5, 100: 0.0}),
        # No more than what follows the warm-up.
        (dict(schedule="wsd", warmup_steps=90), {89: 1.0, 90: 1 - 11**-0.5, 100: 0.0}),
    ],
)
def test_learning_rate_schedules(settings, expected):
    config = OptimConfig(learning_rate=1.0, **settings)
    schedule, of_optimizer = learning_rate_schedule(config, 100), jax.jit(make_optimizer(config, 100).learning_rate)
    for step, value in expected.items():
        assert float(schedule(step)) == pytest.approx(value, rel=1e-4, abs=1e-6), step
        assert of_optimizer(jnp.asarray(step)) == pytest.approx(value, rel=1e-4, abs=1e-6), step


def test_compile_time_does_not_grow_with_depth():
    """The number of operations in the lowered step is the same at any depth: blocks are scanned."""

    def operations(depth: int) -> int:
        optimizer = make_optimizer(OptimConfig(), 10)
        config = DiTConfig(depth=depth, hidden_dim=32, num_heads=2)
        build = lambda: init_state(build_dit(config, LATENT[0], CLASSES, key=jax.random.key(0)), optimizer)
        state = jax.eval_shape(build)
        batch = jax.tree.map(jnp.asarray, batch_of(4))
        return make_train_step(optimizer, OBJECTIVE, 0).lower(state, batch).as_text().count("\n")

    assert operations(2) == operations(12)
