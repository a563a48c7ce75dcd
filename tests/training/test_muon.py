"""Muon: which parameters it updates, its update of stacked and fused matrices, devices, and resume."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from runs import NUM_STEPS, assert_same_checkpoint, error_line, train_here

from flowdit.checkpoint.names import named_arrays
from flowdit.diffusion.auxiliary import AUXILIARY, DataShapes
from flowdit.diffusion.objective import Parameters
from flowdit.fsdp import on_mesh, on_whole_matrices
from flowdit.models.config import DiTConfig, PixArtConfig
from flowdit.models.dit import build_dit
from flowdit.models.pixart import build_pixart
from flowdit.muon import hidden_matrices, orthogonalise
from flowdit.optim import OptimConfig, make_optimizer
from flowdit.sharding import MeshConfig, ParameterSpec, dotted_name, make_mesh, partition

SHAPE = {"depth": 2, "hidden_dim": 24, "num_heads": 2}
ATTENTION = {"blocks.attention.qkv.weight", "blocks.attention.out.weight"}
CROSS = {f"blocks.cross_attention.{name}.weight" for name in ("query", "key_value", "out")}
MLP = {"blocks.mlp.up.weight", "blocks.mlp.down.weight"}


def class_model(**options):
    """Its shapes."""
    return jax.eval_shape(lambda: build_dit(DiTConfig(**SHAPE, **options), 4, 3, key=jax.random.key(0)))


def text_model(**options):
    """Its shapes."""
    return jax.eval_shape(lambda: build_pixart(PixArtConfig(**SHAPE, **options), 4, 10, key=jax.random.key(0)))


def names(tree) -> set[str]:
    """The names of the leaves that are true."""
    return {dotted_name(path) for path, leaf in jax.tree_util.tree_leaves_with_path(tree) if leaf}


@pytest.mark.parametrize("options", [{}, {"mlp": "swiglu", "value_residual": True, "norm": "rms"}], ids=str)
@pytest.mark.parametrize(
    ("build", "matrices", "modulation"),
    [
        (class_model, ATTENTION | MLP, {"blocks.ada_ln.weight"}),
        (text_model, ATTENTION | CROSS | MLP, {"time_block.weight"}),
    ],
)
def test_the_matrices_of_the_blocks_are_muons_and_nothing_else(build, matrices, modulation, options):
    model = build(**options)
    assert names(hidden_matrices(model, modulation=True)) == matrices | modulation
    assert names(hidden_matrices(model, modulation=False)) == matrices


def test_blocks_in_a_list_have_the_same_matrices():
    block = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), class_model().blocks)
    blocks = [block, block]
    found = names(hidden_matrices(blocks, modulation=True))
    assert found == {f"{i}.{name.removeprefix('blocks.')}" for i in range(2) for name in ATTENTION | MLP} | {
        "0.ada_ln.weight",
        "1.ada_ln.weight",
    }


def test_the_matrices_of_auxiliary_losses_are_adamws():
    config, key = DiTConfig(**SHAPE), jax.random.key(0)
    shapes = DataShapes((4, 8, 8), (4, 4, 12))
    auxiliary = {name: loss().init(config, shapes, key=key) for name, loss in AUXILIARY.items()}
    parameters = Parameters(class_model(), auxiliary)
    found = names(hidden_matrices(parameters, modulation=True))
    assert found == {f"model.{name}" for name in ATTENTION | MLP | {"blocks.ada_ln.weight"}}
    optimizer = make_optimizer(OptimConfig(name="muon"), 10)
    momenta = named_arrays(jax.eval_shape(optimizer.init, parameters))
    assert any(".nu." in name and "auxiliary.repa.layers.0.weight" in name for name in momenta)


def random_like(tree, seed: int):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), tree)


PLAIN = optax.contrib.scale_by_muon(beta=0.0, nesterov=False)
OPTAX = jax.jit(lambda matrix: PLAIN.update(matrix, PLAIN.init(matrix))[0])


def matrix_alone(gradients: list[np.ndarray], weight: np.ndarray) -> np.ndarray:
    """The last update of a matrix by the formulas, made orthogonal by optax."""
    mean = sum(0.95 ** (len(gradients) - 1 - i) * 0.05 * gradient for i, gradient in enumerate(gradients))
    with jax.numpy_dtype_promotion("standard"):
        orthogonal = OPTAX(jnp.asarray(0.95 * mean + 0.05 * gradients[-1]))
    return -0.1 * (0.2 * max(weight.shape) ** 0.5 * np.asarray(orthogonal) + 0.5 * weight)


@pytest.mark.parametrize("build", [class_model, text_model])
def test_the_update_of_stacked_and_fused_matrices_is_that_of_each_alone(build):
    config = OptimConfig(name="muon", learning_rate=0.1, weight_decay=0.5, clip_norm=None)
    optimizer, model = make_optimizer(config, 10), random_like(build(mlp="swiglu"), 0)
    state, gradients = optimizer.init(model), [random_like(model, seed) for seed in (1, 2, 3)]
    update = jax.jit(optimizer.update)
    for gradient in gradients:
        updates, state = update(gradient, state, model)
    trees = [named_arrays(tree) for tree in (updates, model, *gradients)]
    fused, compared = {"qkv": 3, "key_value": 2, "up": 2, "ada_ln": 6, "time_block": 6}, 0
    for name in names(hidden_matrices(model, modulation=True)):
        parts = fused.get(name.split(".")[-2], 1)
        leaves = (np.asarray(tree[name]).reshape(-1, *tree[name].shape[-2:]) for tree in trees)
        update, weight, *history = (np.concatenate(np.split(leaf, parts, axis=-1)) for leaf in leaves)
        for i in range(len(update)):
            expected = matrix_alone([gradient[i] for gradient in history], weight[i])
            np.testing.assert_allclose(update[i], expected, atol=2e-5, err_msg=name)
        compared += len(update)
    assert compared == (26 if build is class_model else 2 * 11 + 6)


def test_a_matrix_without_a_gradient_is_not_updated():
    """Of the two blocks the second has gradients in the first update only: from then on it stays."""
    optimizer = make_optimizer(OptimConfig(name="muon", learning_rate=0.1), 10)
    model = random_like(class_model(), 0)
    gradient, state = random_like(model, 1), optimizer.init(model)
    update, weight = jax.jit(optimizer.update), lambda tree: np.asarray(tree.blocks.attention.qkv.weight)
    first, state = update(gradient, state, model)
    second, _ = update(jax.tree.map(lambda leaf: leaf.at[1:2].set(0), gradient), state, model)
    assert np.abs(weight(first)).max((1, 2)).min() > 0.01
    assert np.abs(weight(second)[0]).max() > 0.01 and not weight(second)[1].any()


def test_singular_values_are_near_one_and_zeros_stay():
    matrices = jnp.concatenate([jnp.zeros((1, 8, 32)), jax.random.normal(jax.random.key(0), (2, 8, 32))])
    for given in (matrices, matrices.swapaxes(1, 2)):
        values = jnp.linalg.svd(orthogonalise(given), compute_uv=False)
        assert not values[0].any() and values[1:].min() > 0.6 and values.max() < 1.3
    narrow = orthogonalise(matrices.astype(jnp.bfloat16))
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_allclose(narrow.astype(jnp.float32), orthogonalise(matrices), atol=0.05)


OUTWARDS, INWARDS = ("embed", "heads"), ("heads", "embed")


@pytest.mark.parametrize(
    ("mesh", "spec", "shape"),
    [
        ((1, 4, 1), ParameterSpec(OUTWARDS, parts=3, stacked=1), (5, 8, 12)),
        ((2, 2, 1), ParameterSpec(INWARDS, stacked=1), (5, 12, 8)),
        ((4, 1, 1), ParameterSpec(OUTWARDS, parts=3, stacked=1), (5, 8, 12)),
        ((1, 2, 2), ParameterSpec(OUTWARDS, parts=3, stacked=1), (5, 8, 12)),
        ((1, 4, 1), ParameterSpec(OUTWARDS), (8, 4)),  # fewer matrices than devices
        ((1, 4, 1), ParameterSpec(OUTWARDS), (6, 4)),  # not split, as it does not divide
        ((1, 4, 1), ParameterSpec(INWARDS, parts=2, stacked=1), (1, 4, 8)),  # the fused axis itself is split
        ((2, 2, 1), ParameterSpec(parts=2), (4, 6)),  # not split at all
    ],
    ids=str,
)
def test_devices_share_the_whole_matrices_of_a_parameter(mesh, spec, shape):
    """A function of a whole matrix, over numbers of matrices that do not divide among the devices."""
    data, fsdp, tensor = mesh
    mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor))
    cumulate = lambda matrices: jnp.cumsum(matrices, 1) + jnp.cumsum(matrices, 2)
    parameter = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    parts = np.stack(np.split(parameter, spec.parts, axis=-1))
    expected = np.concatenate(list(np.cumsum(parts, -2) + np.cumsum(parts, -1)), axis=-1)
    layout = NamedSharding(mesh, partition(mesh, spec, shape))
    divided = jax.jit(on_mesh(mesh, lambda x: on_whole_matrices(cumulate, spec, x)), out_shardings=layout)
    np.testing.assert_allclose(divided(jax.device_put(parameter, layout)), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        on_whole_matrices(cumulate, spec, jnp.asarray(parameter)), expected, rtol=1e-5, atol=1e-5
    )


ON = "optim=muon"


@pytest.fixture(scope="module")
def muon_run(tiny_data, tmp_path_factory):
    """A finished, uninterrupted run with checkpoints 2, 4 and 6."""
    run = tmp_path_factory.mktemp("muon") / "whole"
    finished = train_here(tiny_data, run, ON)
    assert (finished.status, finished.err) == (0, "")
    return run


def copy_up_to(whole, run, step: int):
    shutil.copytree(whole, run)
    for later in (path for path in run.iterdir() if path.name.isdigit() and int(path.name) > step):
        shutil.rmtree(later)
    return run


def test_a_run_with_muon_resumes_exactly(tiny_data, muon_run, tmp_path):
    run = copy_up_to(muon_run, tmp_path / "run", 2)
    finished = train_here(tiny_data, run, ON, "train.is_restore=true")
    assert (finished.status, finished.err) == (0, "") and f"resumed from {run / '2'}" in finished.out
    assert_same_checkpoint(run / str(NUM_STEPS), muon_run / str(NUM_STEPS))


def test_a_resume_with_another_optimizer_says_so(tiny_data, muon_run, tmp_path):
    run = copy_up_to(muon_run, tmp_path / "run", 2)
    line = error_line(train_here(tiny_data, run, "train.is_restore=true", "optim=adamw"))
    assert line == "error: optim.name: must be muon as in the checkpoint to resume, got adamw"
    line = error_line(train_here(tiny_data, run, "train.is_restore=true", "optim.muon_modulation=false"))
    assert line == "error: optim.muon_modulation: must be True as in the checkpoint to resume, got False"


def test_the_momentum_may_be_bfloat16_and_is_rounded_only_between_steps():
    model = random_like(class_model(), 0)
    wide, narrow = (
        make_optimizer(OptimConfig(name="muon", first_moment_dtype=dtype), 10) for dtype in ("float32", "bfloat16")
    )
    gradient = random_like(model, 1)
    (expected, _), (updates, state) = (
        jax.jit(each.update)(gradient, each.init(model), model) for each in (wide, narrow)
    )
    jax.tree.map(np.testing.assert_array_equal, updates, expected)
    moments = [name for name, leaf in named_arrays(state).items() if leaf.dtype == jnp.bfloat16]
    assert any("muon" in name and name.endswith("mu.blocks.attention.qkv.weight") for name in moments)
    assert len(moments) == len(jax.tree.leaves(model))
