"""Collectives with `mesh.fsdp` in the compiled program: weights of one block at a time, and gradients.

Sizes identify the axes: batches are multiples of 5, image tokens of 7 and text tokens of 11; axes of parameters only
have the factors 2 and 3.
"""

import collections
import math
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.text_folders import ENCODER

from flowdit.conditioning.labels import Labels
from flowdit.conditioning.text import Text, make_encode_step
from flowdit.diffusion.objective import FlowMatching
from flowdit.fsdp import split_over_fsdp
from flowdit.models.compute import Compute
from flowdit.models.config import DiTConfig, PixArtConfig
from flowdit.models.dit import build_dit
from flowdit.models.pixart import build_pixart
from flowdit.models.t5gemma import T5GemmaEncoder
from flowdit.models.t5gemma_config import T5GemmaConfig
from flowdit.optim import OptimConfig, make_optimizer
from flowdit.sharding import MeshConfig, make_mesh, parameter_shardings, shard_batch
from flowdit.training.step import init_state, make_train_step, make_validation_step

DEPTH = 3
CLASSES = 5
LATENT = (4, 2, 14)
TEXT = (11, 18)
BATCH = 40
OPTIMIZER = make_optimizer(OptimConfig(learning_rate=1e-2), 100)
# The gradient of the null caption is summed over the batch before it is summed over the tokens that share it.
NULL_CAPTION = TEXT

Collective = collections.namedtuple("Collective", "kind shapes times")


def collectives(text: str) -> list[Collective]:
    """Every collective operation of a compiled program: its kind, shapes as (dtype, axes), and how often it runs."""
    lines = collections.defaultdict(list)
    name = entry = ""
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
            name = header[2]
            entry = name if header[1] else entry
        lines[name].append(line)
    found = []

    def walk(name: str, times: int) -> None:
        for line in lines[name]:
            kind = re.search(r" = (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)\(", line)
            if kind:
                shapes = [
                    (dtype, tuple(int(axis) for axis in axes.split(",") if axis))
                    for dtype, axes in re.findall(r"(\w+)\[([\d,]*)\]", kind[1])
                ]
                found.append(Collective(kind[2], shapes, times))
            trips = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
            for inner in re.findall(r"(?:body|calls|to_apply)=%?([\w.-]+)", line):
                walk(inner, times * int(trips[1]) if trips else times)

    walk(entry, 1)
    return found


def moved_activations(found: list[Collective]) -> list[Collective]:
    """Collectives on arrays with a batch or token axis."""

    def is_activation(axes: tuple[int, ...]) -> bool:
        return axes != NULL_CAPTION and any(math.gcd(axis, 5 * 7 * 11) > 1 for axis in axes)

    return [each for each in found if any(is_activation(axes) for _, axes in each.shapes)]


def reduced_bytes(found: list[Collective]) -> int:
    sizes = {"f32": 4, "bf16": 2, "s32": 4, "pred": 1}
    reduced = [each for each in found if each.kind == "all-reduce"]
    return sum(each.times * sizes[dtype] * math.prod(axes) for each in reduced for dtype, axes in each.shapes)


def counts(kind: str, found: list[Collective]) -> dict[tuple[int, ...], int]:
    """Number of collectives of one kind by the shape of a result."""
    times = collections.Counter()
    for each in found:
        if each.kind == kind:
            times[each.shapes[0][1]] += each.times
    return times


def build_model(stage: int, remat: str):
    shape = dict(depth=DEPTH, hidden_dim=24, num_heads=2, remat=remat)
    if stage == 1:
        return build_dit(DiTConfig(**shape), LATENT[0], CLASSES, key=jax.random.key(0))
    return build_pixart(PixArtConfig(**shape), LATENT[0], TEXT[1], key=jax.random.key(0))


def objective_of(stage: int) -> FlowMatching:
    conditioning = Labels(tuple(map(str, range(CLASSES)))) if stage == 1 else Text()
    return FlowMatching(conditioning, 0.1, (0.0,) * 4, (1.0,) * 4)


def batch_of(stage: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    latent = {"latent": rng.normal(size=(BATCH, *LATENT)).astype(np.float32)}
    if stage == 1:
        return latent | {"label": rng.integers(0, CLASSES, BATCH).astype(np.int32)}
    features = rng.normal(size=(BATCH, *TEXT)).astype(np.float32)
    return latent | {"text_features": features, "text_mask": np.arange(TEXT[0]) < rng.integers(0, 12, (BATCH, 1))}


def on(mesh, shapes):
    """Add shardings to the shapes of parameters."""
    put = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return jax.tree.map(put, shapes, parameter_shardings(mesh, shapes))


def lower_step(stage: int, mesh, *, remat: str, accum: int, dtype: str = "float32", optimizer=OPTIMIZER):
    state = on(mesh, jax.eval_shape(lambda: init_state(build_model(stage, remat), optimizer)))
    step = make_train_step(optimizer, objective_of(stage), 0, accum, compute=Compute(dtype), mesh=mesh)
    return step.lower(state, shard_batch(mesh, batch_of(stage)))


def gradient_bytes(stage: int) -> int:
    return sum(4 * leaf.size for leaf in jax.tree.leaves(jax.eval_shape(lambda: build_model(stage, "none"))))


def split_bytes(stage: int) -> int:
    """Bytes of the gradients of what is split over `fsdp`."""
    shapes = jax.eval_shape(lambda: build_model(stage, "none"))
    specs = jax.tree.leaves(split_over_fsdp(make_mesh(MeshConfig(fsdp=4)), shapes))
    return sum(4 * leaf.size for leaf, spec in zip(jax.tree.leaves(shapes), specs, strict=True) if "fsdp" in spec)


def test_stage_1_gathers_weights_and_scatters_gradients():
    with jax.numpy_dtype_promotion("standard"):  # the backward pass of JAX's attention mixes dtypes
        lowered = lower_step(1, make_mesh(MeshConfig(fsdp=4)), remat="none", accum=1, dtype="bfloat16")
    # In the lowered program, as XLA widens dtypes that CPUs cannot send.
    text = lowered.as_text()
    for kind in ("all_gather", "reduce_scatter"):
        dtypes = re.findall(rf'"stablehlo.{kind}".*?-> tensor<(?:\d+x)+(\w+)>', text, re.DOTALL)
        assert len(dtypes) >= 5 and set(dtypes) == {"bf16"}
    found = collectives(lowered.compile().as_text())
    assert moved_activations(found) == []
    # Forward and again backward, so that the gathered weights of all blocks never exist at once.
    shapes = [(24, 144), (24, 72), (24, 24), (24, 96), (96, 24)]
    assert counts("all-gather", found) == dict.fromkeys(shapes, 2 * DEPTH)
    assert counts("reduce-scatter", found) == {
        (6, 144): DEPTH,
        (6, 72): DEPTH,
        (24, 6): DEPTH,
        (6, 96): DEPTH,
        (96, 6): DEPTH,
    }
    whole = gradient_bytes(1) - split_bytes(1)
    assert whole * 0.95 < reduced_bytes(found) < whole * 1.2


def losses_of(compiled, mesh, optimizer=OPTIMIZER) -> list[float]:
    """Losses of three steps from random weights; zero weights, as at initialisation, would hide errors."""
    state = jax.eval_shape(lambda: init_state(build_model(2, "none"), optimizer))
    rng, zeros = np.random.default_rng(0), jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), state)
    weights = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape, scale=0.1).astype(np.float32), state.model)
    state = jax.device_put(eqx.tree_at(lambda state: state.model, zeros, weights), parameter_shardings(mesh, state))
    losses = []
    for _ in range(3):
        state, metrics = compiled(state, shard_batch(mesh, batch_of(2)))
        losses.append(float(metrics["loss"]))
    return losses


def test_stage_2_gathers_weights_and_has_the_losses_of_data_parallel():
    meshes = make_mesh(MeshConfig(fsdp=4)), make_mesh(MeshConfig())
    sharded, whole = (lower_step(2, mesh, remat="none", accum=2).compile() for mesh in meshes)
    for compiled, reduced in ((sharded, gradient_bytes(2) - split_bytes(2)), (whole, gradient_bytes(2))):
        found = collectives(compiled.as_text())
        assert moved_activations(found) == []
        assert reduced * 0.95 < reduced_bytes(found) < reduced * 1.2  # once, not for each micro-batch
    found = collectives(sharded.as_text())
    gathered = counts("all-gather", found)
    assert 1 <= gathered[24, 144] <= 4  # the t block's is gathered outside the scan over blocks
    assert gathered[24, 96] == 2 * 2 * DEPTH
    assert counts("reduce-scatter", found)[6, 96] == 2 * DEPTH
    assert {each.kind for each in collectives(whole.as_text())} == {"all-reduce"}
    np.testing.assert_allclose(losses_of(sharded, meshes[0]), losses_of(whole, meshes[1]), rtol=1e-5)


def test_muon_exchanges_whole_matrices_and_sums_nothing():
    """Each device has whole matrices in the iteration; the losses are those of one device."""
    muon = make_optimizer(OptimConfig(name="muon", learning_rate=1e-2), 100)
    meshes = make_mesh(MeshConfig(data=2, fsdp=2)), make_mesh(MeshConfig(), jax.devices()[:1])
    sharded, alone = (lower_step(2, mesh, remat="none", accum=1, optimizer=muon).compile() for mesh in meshes)
    found = collectives(sharded.as_text())
    # Of qkv nine matrices, padded to twelve: three for each device, which first has half of every matrix.
    exchanged = {(3, 12, 24): 1, (2, 12, 24): 2, (1, 24, 12): 2, (1, 12, 24): 1, (1, 12, 96): 1, (1, 96, 12): 1}
    assert counts("all-to-all", found) == {shape: 2 * count for shape, count in exchanged.items()}
    gathered = counts("all-gather", found)
    assert (gathered[12, 12, 24], gathered[4, 96, 12]) == (1, 1)  # the results of the other half of the devices
    gradients = gradient_bytes(2) - split_bytes(2) // 2
    assert gradients * 0.95 < reduced_bytes(found) < gradients * 1.05
    losses = (losses_of(compiled, mesh, muon) for compiled, mesh in zip((sharded, alone), meshes, strict=True))
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_validation_only_sums_losses():
    mesh = make_mesh(MeshConfig(fsdp=4))
    batch = shard_batch(mesh, batch_of(1) | {"weight": np.ones(BATCH, np.float32)})
    model = on(mesh, jax.eval_shape(lambda: build_model(1, "none")))
    step = make_validation_step(objective_of(1), 0, mesh=mesh)
    found = collectives(step.lower(model, batch, jnp.asarray(0)).compile().as_text())
    assert counts("all-gather", found)
    assert reduced_bytes(found) < 1000


@pytest.mark.parametrize("fsdp", [4, 1])
def test_the_text_encoder_gathers_weights(fsdp):
    """No sums over the batch; rows of the embedding table are exchanged, as the table is large."""
    raw = ENCODER | {"vocab_size": 324, "intermediate_size": 96}
    sizes = {
        f"layers.{i}": (324,) for i in range(raw["num_hidden_layers"])
    }  # of tensors, which must be compatible with the fields
    config = T5GemmaConfig.from_huggingface(raw, sizes)
    mesh = make_mesh(MeshConfig(fsdp=fsdp))
    network = on(mesh, eqx.filter_eval_shape(T5GemmaEncoder, config))
    tokens = shard_batch(mesh, {"ids": np.ones((BATCH, 11), np.int32), "mask": np.ones((BATCH, 11), bool)})
    compiled = make_encode_step(mesh, BATCH // 2).lower(network, tokens["ids"], tokens["mask"]).compile()
    found = collectives(compiled.as_text())
    assert reduced_bytes(found) == 0
    assert (counts("all-gather", found)[1, 96, 48] == 2 * 2 * 3) if fsdp == 4 else (found == [])
