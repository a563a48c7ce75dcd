"""Estimates for GPUs: operations and bytes of the step against published rates."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp

from flowdit.models.attention import AttentionShape, attend
from flowdit.models.compute import Compute
from flowdit.models.flops import matmul_flops
from flowdit.muon import hidden_matrices
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
"""Reads and writes of an update, of float32 arrays of the parameters' size: gradient, and each of four states twice."""

MANY = 10**6
"""Images of a batch whose shapes are looked at: more than any other axis has, so that none is taken for another."""


@dataclasses.dataclass(frozen=True)
class AbsentGpu:
    """Stands for a GPU in a mesh whose program is never compiled."""

    id: int
    device_kind: str
    platform: str = "gpu"
    process_index: int = 0


def absent_gpus(topology: Topology) -> list[Any]:
    return [AbsentGpu(number, topology.machine.kind) for number in range(topology.num_devices)]


def traced_compute(config: PlanConfig) -> Compute:
    """Layers to count operations and bytes with, never cuDNN: it can only be traced where it is installed."""
    return Compute(config.train.compute_dtype, is_fast=config.model.kernels == "fast")


def cudnn_shapes(config: PlanConfig, data: PlannedData) -> list[AttentionShape]:
    """The shapes that cuDNN is assumed to compute on absent GPUs, by JAX's own rules. No library is asked."""
    shapes = data.conditioning.attention_shapes(config.model, data.manifest.latent_shape)
    if config.model.kernels != "auto" or config.train.compute_dtype != "bfloat16":
        return []
    return [shape for shape in dict.fromkeys(shapes) if _suits_cudnn(shape)]


def _suits_cudnn(shape: AttentionShape) -> bool:
    is_even = shape.tokens % 2 == 0 and (shape.key_tokens or 0) % 2 == 0
    return shape.head_dim <= 128 and shape.head_dim % 8 == 0 and is_even


def compute_seconds(config: PlanConfig, step: Step, topology: Topology) -> float:
    """Seconds of a step's operations, recomputation included, at the settings' `utilisation`, and of its update."""
    gpu = topology.machine
    assert isinstance(gpu, Gpu)
    images = config.train.batch_size // batch_shards(step.mesh)
    flops = images * _executed_flops(config, step) / config.mesh.tensor
    flops += _update_flops(step) / topology.num_devices
    update = STATE_PASSES * bytes_on_device(step.state.parameters) / gpu.bandwidth
    return flops / (config.utilisation * topology.peak(config.train.compute_dtype)) + update


def estimated_memory(config: PlanConfig, data: PlannedData, step: Step) -> dict[str, int]:
    """Bytes of a device by part, by formula: the CPU's compiler widens bfloat16, and would mislead."""
    width = jnp.dtype(config.train.compute_dtype).itemsize
    parameters = bytes_on_device(step.state.parameters)
    micro_batch = math.ceil(config.train.batch_size / batch_shards(step.mesh) / config.train.gradient_accum)
    blocks, kept = config.model.depth, _kept_bytes(config, step)
    if config.model.remat != "none":  # what is computed again for one block
        model = dataclasses.replace(config.model, remat="none")
        devices, compute = list(step.mesh.devices.flat), traced_compute(config)
        whole = build_step(dataclasses.replace(config, model=model), data, devices, compute)
        kept += (_kept_bytes(config, whole) - kept) / blocks
        blocks = 1
    kept -= blocks * sum(_unkept_by_cudnn(config, shape) for shape in cudnn_shapes(config, data))
    compute_dtype = parameters * width // 4
    return memory_of_state(step) | {
        "gradients": parameters + compute_dtype,  # their float32 sum, and those of a micro-batch
        "activations and temporaries": int(kept * micro_batch) + (compute_dtype if width < 4 else 0) + OVERHEAD,
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


def _kept_bytes(config: PlanConfig, step: Step) -> float:
    """Bytes that the backward pass keeps on a device for each image, from the shapes of `jax.vjp`'s residuals."""
    loss = _loss(step, traced_compute(config))

    def backward(parameters: Any, batch: Any, keys: Any) -> Any:
        return jax.vjp(lambda parameters: loss(parameters, batch, keys), parameters)[1]

    def size(images: int) -> float:
        kept = jax.tree.leaves(jax.eval_shape(backward, *_inputs(step, images)))
        return sum(leaf.size * leaf.dtype.itemsize / _parts(config, leaf.shape) for leaf in kept)

    return size(MANY + 1) - size(MANY)  # what does not grow with the batch are weights


def _parts(config: PlanConfig, shape: tuple[int, ...]) -> int:
    """Over how many devices of the tensor axis a kept array is split: those by head, and wider ones than the model."""
    is_split = config.model.num_heads in shape[-3:-1] or (bool(shape) and shape[-1] > config.model.hidden_dim)
    return config.mesh.tensor if is_split else 1


def _unkept_by_cudnn(config: PlanConfig, shape: AttentionShape) -> float:
    """Bytes on a device, for an image and a block, of the logits and weights that only XLA's attention keeps."""
    heads, keys = config.model.num_heads, shape.key_tokens or shape.tokens
    dtype = config.train.compute_dtype
    query, key = (jax.ShapeDtypeStruct((rows, heads, shape.head_dim), dtype) for rows in (shape.tokens, keys))
    mask = None if shape.key_tokens is None else jnp.ones(keys, bool)
    backward = lambda query, key, value: jax.vjp(functools.partial(attend, mask=mask), query, key, value)[1]
    kept = jax.tree.leaves(jax.eval_shape(backward, query, key, key))
    inside = (leaf for leaf in kept if leaf.shape[-2:] == (shape.tokens, keys) and leaf.dtype != jnp.bool_)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in inside) / config.mesh.tensor


def _executed_flops(config: PlanConfig, step: Step) -> int:
    """Operations of an image forward and backward, recomputation included."""
    return matmul_flops(jax.value_and_grad(_loss(step, traced_compute(config))), *_inputs(step, 1))


def _update_flops(step: Step) -> int:
    """Operations of the matrix products of an update: those of Muon, which all devices share."""
    plain = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    parameters = plain(step.state.parameters)
    return matmul_flops(step.parts.optimizer.update, parameters, plain(step.state.opt_state), parameters)


def estimated_collectives(config: PlanConfig, step: Step) -> Counter[Collective]:
    """What sharding sends in a step.

    For each micro-batch weights twice and gradients once over `fsdp`, and activations over `tensor`; gradients over
    `data` once. With Muon its matrices over `tensor`, twice over `fsdp`, a device's share of them, and their updates over
    the other axes.
    """
    width = jnp.dtype(config.train.compute_dtype).itemsize
    data, fsdp, tensor = step.mesh.devices.shape
    weights = sum(leaf.size for leaf in jax.tree.leaves(step.state.parameters)) * width // tensor
    passes, found = config.train.gradient_accum, Counter()
    if fsdp > 1:
        found[Collective("all-gather", weights, _group(fsdp, tensor))] += 2 * passes
        found[Collective("reduce-scatter", weights, _group(fsdp, tensor))] += passes
    if data > 1:
        found[Collective("all-reduce", weights // fsdp, _group(data, fsdp * tensor))] += 1
    if config.optim.name == "muon":
        is_muons = jax.tree.leaves(hidden_matrices(step.state.parameters, config.optim.muon_modulation))
        sizes = [leaf.size for leaf in jax.tree.leaves(step.state.parameters)]
        matrices = sum(itertools.compress(sizes, is_muons)) * width
        if tensor > 1:
            found[Collective("all-gather", matrices // fsdp, _group(tensor, 1))] += 1
        if fsdp > 1:
            found[Collective("all-to-all", matrices // (data * fsdp * tensor), _group(fsdp, tensor))] += 2
        if data * tensor > 1:
            found[Collective("all-gather", matrices // fsdp, _group(data, fsdp * tensor, tensor))] += 1
    if tensor > 1:
        images = config.train.batch_size // batch_shards(step.mesh) // passes
        tokens = math.prod(step.batch["latent"].shape[2:]) // config.model.patch_size**2
        activation = images * tokens * config.model.hidden_dim * width
        found[Collective("all-reduce", activation, _group(tensor, 1))] += 4 * config.model.depth * passes
    return found


def _group(size: int, stride: int, run: int = 1) -> str:
    """The first group along an axis of the mesh, whose neighbours are `stride` devices apart, each with its `run`."""
    numbers = (number * stride + i for number in range(size) for i in range(run))
    return "{{" + ",".join(map(str, numbers)) + "}}"
