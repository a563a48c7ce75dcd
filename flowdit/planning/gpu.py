"""Estimates for GPUs that are not there: operations and bytes of the step against published rates."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flowdit.models.compute import Compute
from flowdit.models.flops import matmul_flops
from flowdit.planning.compilation import Step, build_step
from flowdit.planning.config import PlanConfig
from flowdit.planning.cost import Collective
from flowdit.planning.data import PlannedData
from flowdit.planning.machines import Gpu, Topology
from flowdit.planning.memory import bytes_on_device, memory_of_state
from flowdit.sharding import batch_shards

OVERHEAD = 10**9
"""Bytes of a GPU that CUDA, its libraries and fragmentation take."""
STATE_PASSES = 9
"""Reads and writes of a float32 array of the parameters' size in an update: gradient, and each of the four states twice."""


@dataclasses.dataclass(frozen=True)
class AbsentGpu:
    """Stands for a GPU in a mesh whose program is never compiled."""

    id: int
    device_kind: str
    platform: str = "gpu"
    process_index: int = 0


class Estimate(NamedTuple):
    """Memory of a device by part, in bytes; seconds of operations and of the update; collectives of a step."""

    memory: dict[str, int]
    seconds: float
    collectives: Counter[Collective]


def absent_gpus(topology: Topology) -> list[Any]:
    return [AbsentGpu(number, topology.machine.kind) for number in range(topology.num_devices)]


def estimate(config: PlanConfig, data: PlannedData, step: Step, topology: Topology) -> Estimate:
    """What a step takes on GPUs at the settings' `utilisation`."""
    gpu = topology.machine
    assert isinstance(gpu, Gpu)
    images = config.train.batch_size // batch_shards(step.mesh)
    flops = images * _executed_flops(step) / config.mesh.tensor
    parameters = bytes_on_device(step.state.parameters)
    update = STATE_PASSES * parameters / gpu.bandwidth
    seconds = flops / (config.utilisation * topology.peak(config.train.compute_dtype)) + update
    return Estimate(_memory(config, data, step, images), seconds, _collectives(config, step, images))


def _memory(config: PlanConfig, data: PlannedData, step: Step, images: int) -> dict[str, int]:
    """By formula: the CPU's compiler widens bfloat16, and would mislead."""
    width = jnp.dtype(config.train.compute_dtype).itemsize
    parameters = bytes_on_device(step.state.parameters)
    micro_batch = math.ceil(images / config.train.gradient_accum)
    kept = float(_kept_bytes(step))
    if config.model.remat != "none":  # what is computed again for one block
        model = dataclasses.replace(config.model, remat="none")
        whole = build_step(dataclasses.replace(config, model=model), data, list(step.mesh.devices.flat))
        kept += _kept_bytes(whole) / config.model.depth
    kept *= micro_batch / config.mesh.tensor
    cast = 0 if width == 4 else parameters * width // 4
    return memory_of_state(step) | {
        "gradients": parameters,
        "activations and temporaries": int(kept) + cast + OVERHEAD,
    }


def _loss(step: Step, compute: Compute) -> Any:
    objective = step.parts.objective

    def loss(parameters: Any, batch: Any, keys: Any) -> jax.Array:
        return objective.loss(compute.cast(parameters), batch, keys, jnp.zeros((), jnp.int32)).total.mean()

    return compute.on(None, loss)


def _inputs(step: Step, images: int) -> tuple[Any, Any, Any]:
    plain = lambda x, shape: jax.ShapeDtypeStruct(shape, x.dtype)
    parameters = jax.tree.map(lambda x: plain(x, x.shape), step.state.parameters)
    batch = jax.tree.map(lambda x: plain(x, (images, *x.shape[1:])), step.batch)
    return parameters, batch, jax.eval_shape(lambda: jax.random.split(jax.random.key(0), images))


def _kept_bytes(step: Step) -> int:
    """Bytes that the backward pass keeps for each image, from the shapes of what the forward pass hands to it."""
    loss = _loss(step, step.parts.compute)

    def backward(parameters: Any, batch: Any, keys: Any) -> Any:
        return jax.vjp(lambda parameters: loss(parameters, batch, keys), parameters)[1]

    one, two = (
        sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(backward, *_inputs(step, n))))
        for n in (1, 2)
    )
    return two - one  # what does not grow with the batch are weights


def _executed_flops(step: Step) -> int:
    """Operations of an image forward and backward, recomputation included."""
    return matmul_flops(jax.value_and_grad(_loss(step, step.parts.compute)), *_inputs(step, 1))


def _collectives(config: PlanConfig, step: Step, images: int) -> Counter[Collective]:
    """What sharding sends: weights twice and gradients once a micro-batch, and activations along the tensor axis."""
    width = jnp.dtype(config.train.compute_dtype).itemsize
    data, fsdp, tensor = step.mesh.devices.shape
    weights = sum(leaf.size for leaf in jax.tree.leaves(step.state.model)) * width // tensor
    passes, found = config.train.gradient_accum, Counter()
    if fsdp > 1:
        found[Collective("all-gather", weights, _group(fsdp, tensor))] += 2 * passes
        found[Collective("reduce-scatter", weights, _group(fsdp, tensor))] += passes
    if data > 1:
        found[Collective("all-reduce", weights // fsdp, _group(data, fsdp * tensor))] += passes
    if tensor > 1:
        tokens = math.prod(step.batch["latent"].shape[2:]) // config.model.patch_size**2
        activation = images // passes * tokens * config.model.hidden_dim * width
        found[Collective("all-reduce", activation, _group(tensor, 1))] += 4 * config.model.depth * passes
    return found


def _group(size: int, stride: int) -> str:
    """The first group along an axis of the mesh, whose neighbours are `stride` devices apart."""
    return "{{" + ",".join(str(number * stride) for number in range(size)) + "}}"
