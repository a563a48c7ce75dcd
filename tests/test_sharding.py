"""What layers declare of their parameters: sharding, weight decay, fused parts and stacked axes."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from flowdit.models.config import DiTConfig, PixArtConfig
from flowdit.models.dit import build_dit
from flowdit.models.layers import Linear
from flowdit.models.pixart import build_pixart
from flowdit.optim import OptimConfig, decay_mask, make_optimizer
from flowdit.sharding import (
    STACKED,
    MeshConfig,
    ParameterSpec,
    dotted_name,
    make_mesh,
    parameter_shardings,
    parameter_specs,
)
from flowdit.training.step import init_state

SHAPE = {"depth": 2, "hidden_dim": 48, "num_heads": 4}
OUTWARDS, INWARDS = PartitionSpec(None, "fsdp", "tensor"), PartitionSpec(None, "tensor", "fsdp")
SHARDED = {
    "blocks.attention.qkv.weight": OUTWARDS,
    "blocks.attention.out.weight": INWARDS,
    "blocks.cross_attention.query.weight": OUTWARDS,
    "blocks.cross_attention.key_value.weight": OUTWARDS,
    "blocks.cross_attention.out.weight": INWARDS,
    "blocks.mlp.up.weight": OUTWARDS,
    "blocks.mlp.down.weight": INWARDS,
    "blocks.ada_ln.weight": OUTWARDS,
    "time_block.weight": PartitionSpec("fsdp", "tensor"),
}


def by_name(tree):
    leaves = jax.tree.leaves_with_path(tree, is_leaf=lambda leaf: isinstance(leaf, ParameterSpec))
    return {dotted_name(path): leaf for path, leaf in leaves}


def class_model(**options):
    return jax.eval_shape(lambda: build_dit(DiTConfig(**SHAPE, **options), 4, 3, key=jax.random.key(0)))


def text_model(**options):
    return jax.eval_shape(lambda: build_pixart(PixArtConfig(**SHAPE, **options), 4, 10, key=jax.random.key(0)))


@pytest.mark.parametrize("options", [{}, {"mlp": "swiglu", "value_residual": True, "norm": "rms"}], ids=str)
@pytest.mark.parametrize("build", [class_model, text_model])
def test_matrices_of_blocks_are_sharded_and_nothing_else(build, options):
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2))
    model = build(**options)
    found = {name: sharding.spec for name, sharding in by_name(parameter_shardings(mesh, model)).items()}
    assert found == {name: SHARDED.get(name, PartitionSpec()) for name in by_name(model)}


def test_moments_and_averages_are_sharded_as_their_parameters():
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2))
    state = jax.eval_shape(lambda: init_state(class_model_arrays(), make_optimizer(OptimConfig(), 10)))
    shardings = parameter_shardings(mesh, state)
    for tree in (
        shardings.model,
        shardings.ema,
        shardings.opt_state[1][0].mu.model,
        shardings.opt_state[1][0].nu.model,
    ):
        assert tree.blocks.attention.qkv.weight.spec == OUTWARDS


def class_model_arrays():
    return build_dit(DiTConfig(**SHAPE), 4, 3, key=jax.random.key(0))


def test_an_axis_that_does_not_divide_a_dimension_leaves_it_whole():
    odd = jax.eval_shape(lambda: Linear(jnp.zeros((6, 8)), jnp.zeros(8), ("embed", "mlp")))
    mesh = make_mesh(MeshConfig(data=1, fsdp=4))
    assert parameter_shardings(mesh, odd).weight.spec == PartitionSpec(None, "tensor")
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2))
    assert parameter_shardings(mesh, odd).weight.spec == PartitionSpec("fsdp", "tensor")


def test_specs_say_how_many_projections_are_fused_and_which_axes_are_stacked():
    specs = by_name(parameter_specs(text_model(mlp="swiglu")))
    parts = {name: spec.parts for name, spec in specs.items() if spec.parts > 1}
    assert parts == {
        "time_block.weight": 6,
        "blocks.attention.qkv.weight": 3,
        "blocks.cross_attention.key_value.weight": 2,
        "blocks.mlp.up.weight": 2,
    }
    assert {spec.stacked for name, spec in specs.items() if name.startswith("blocks.")} == {1}
    assert {spec.stacked for name, spec in specs.items() if not name.startswith("blocks.")} == {0}


@pytest.mark.parametrize("build", [class_model, text_model])
def test_weight_decay_is_of_matrices_of_linear_layers(build):
    model = build(value_residual=True)
    decayed = {name for name, is_decayed in by_name(decay_mask(model)).items() if is_decayed}
    assert decayed == {name for name in by_name(model) if name.endswith(".weight")}
    assert "class_table" not in decayed and "null_caption" not in decayed


class Undeclared(eqx.Module):
    matrix: jax.Array
    vector: jax.Array


class Stack(eqx.Module):
    blocks: Undeclared

    def parameter_specs(self):
        return {"blocks": STACKED}


def test_a_matrix_of_a_block_that_nothing_declares_is_an_error():
    stack = Stack(Undeclared(jnp.zeros((2, 8, 8)), jnp.zeros((2, 8))))
    with pytest.raises(ValueError, match=r"^blocks\.matrix: a matrix of a block must be declared in .*\(2, 8, 8\)"):
        parameter_shardings(make_mesh(MeshConfig()), stack)
    outside = parameter_specs(stack.blocks)  # a part of an auxiliary loss, say, that is small
    assert outside.matrix == ParameterSpec()


def test_matrices_of_other_libraries_are_decayed_and_replicated():
    specs = parameter_specs({"head": eqx.nn.Linear(3, 4, key=jax.random.key(0))})
    assert specs["head"].weight == ParameterSpec(decay=True)
    assert specs["head"].bias == ParameterSpec()
