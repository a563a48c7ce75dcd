"""The device mesh, and how parameters, optimizer state and batches are split over it.

Only this file and `fsdp.py`, which moves weights and gradients between devices, name the axes of the mesh.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from flowdit.fields import require
from flowdit.joining import ProcessConfig

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

LOGICAL_AXES: dict[str | None, str | None] = {
    "embed": "fsdp",  # the width of the residual stream
    "heads": "tensor",  # channels of all heads of an attention
    "mlp": "tensor",  # hidden channels of an MLP
    "modulation": "tensor",  # shifts, scales and gates of a block
    None: None,
}
"""Mesh axis of each logical axis of a parameter."""


@dataclasses.dataclass(frozen=True)
class ParameterSpec:
    """The declaration of one parameter by its layer, for sharding and for the optimizer.

    `axes` are logical axes, one for each of the parameter's own axes; empty for a parameter that every device holds:
    sharding biases, norms and tables makes XLA rematerialise whole tensors. `decay` says whether weight decay applies.
    `parts` is the number of projections that are fused along the last axis, and `stacked` counts the leading axes over
    blocks, which are scanned and never sharded: optimizers that act on matrices, such as Muon, need both.
    """

    axes: tuple[str | None, ...] = ()
    parts: int = 1
    decay: bool = False
    stacked: int = 0


REPLICATED = ParameterSpec()
STACKED = "stacked"
"""Declares a field whose modules are stacked: every parameter has a leading axis over blocks."""


@dataclasses.dataclass
class MeshConfig(ProcessConfig):
    """Devices along each axis of the mesh, and how several processes find each other.

    Attributes:
        data: devices that share a batch and hold all parameters; -1: all remaining devices.
        fsdp: devices that share a batch and split the parameters.
        tensor: devices that split the matrices within a layer.
        step_timeout: seconds without a finished step after which the process ends with exit status 75, for a scheduler
            to start it again; null: 20 times the median step, at least 300 s, once three steps are timed; 0: never.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    step_timeout: float | None = None

    def check(self) -> None:
        """Raise `FieldError` naming the first field that breaks a rule."""
        limit = self.step_timeout
        require("step_timeout", limit, limit is None or limit >= 0, "must be null (automatic), 0 (never) or more")


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all devices of all processes, or over `devices`, which may be of a topology to compile for."""
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(config, len(devices))
    types = (AxisType.Auto,) * len(AXES)
    if devices[0].platform != "tpu":
        return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
    # Along the lines of the torus, as `fsdp.hops_along` needs it; slices are the slowest to change.
    ordered = sorted(devices, key=lambda device: (slice_of(device), *device.coords[::-1], device.core_on_chip))
    return Mesh(np.asarray(ordered).reshape(shape), AXES, axis_types=types)


def slice_of(device: Any) -> int:
    """The slice of a TPU device; several slices are connected by a slower network."""
    return getattr(device, "slice_index", 0)


def make_local_mesh() -> Mesh:
    """A mesh over the devices of this process, all of which share batches."""
    return make_mesh(MeshConfig(), jax.local_devices())


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """The number of devices that share a batch."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def mesh_shape(config: MeshConfig, num_devices: int) -> tuple[int, int, int]:
    """Devices along each axis. Raises `ValueError` unless they are `num_devices` together."""
    for axis in ("fsdp", "tensor"):
        if (value := getattr(config, axis)) < 1:
            raise ValueError(f"mesh.{axis}: must be at least 1, got {value}")
    rest = config.fsdp * config.tensor
    data = num_devices // rest if config.data == -1 else config.data
    if data < 1 or data * rest != num_devices:
        sizes = f"data={config.data} fsdp={config.fsdp} tensor={config.tensor}"
        raise ValueError(f"mesh: data x fsdp x tensor must equal the {num_devices} devices there are, got {sizes}")
    return data, config.fsdp, config.tensor


def check_batch_size(mesh: Mesh | AbstractMesh, batch_size: int, gradient_accum: int) -> None:
    """Raise `ValueError` unless every micro-batch can be split evenly over the devices that share batches."""
    if batch_size < 1:
        raise ValueError(f"train.batch_size: must be at least 1, got {batch_size}")
    if gradient_accum < 1 or batch_size % gradient_accum:
        raise ValueError(f"train.gradient_accum: must divide train.batch_size={batch_size}, got {gradient_accum}")
    shards = batch_shards(mesh)
    if (micro_batch := batch_size // gradient_accum) % shards:
        raise ValueError(
            "train.batch_size: batch_size / gradient_accum must be divisible by the mesh's data x fsdp = "
            f"{shards} devices, got {batch_size} / {gradient_accum} = {micro_batch}"
        )


def dotted_name(path: tuple) -> str:
    """`blocks.attention.qkv.weight` for a pytree path: the name on disk."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def parameter_specs(tree: Any) -> Any:
    """The `ParameterSpec` of every array in a pytree of arrays or shapes: a model, its gradients, an optimizer's state.

    A module declares its arrays in a method `parameter_specs() -> {field: ParameterSpec or STACKED}`. Arrays that nothing
    declares are replicated, and decayed where they are called `weight`, as the matrices of other libraries' layers are.
    Raises `ValueError` for a matrix in a stack of blocks that no module declares: replicating it would cost every device
    the memory of the whole stack.
    """
    return jax.tree_util.tree_map_with_path(lambda path, leaf: _find_spec(tree, path, leaf), tree)


def _find_spec(tree: Any, path: tuple, leaf: Any) -> ParameterSpec:
    node, stacked = tree, 0
    for entry in path:
        # From the class: Equinox builds a pytree for every method that is looked up on a module, a tenth of a start.
        specs = getattr(type(node), "parameter_specs", None)
        declared = specs(node).get(entry.name) if specs else None
        if isinstance(declared, ParameterSpec):
            return dataclasses.replace(declared, stacked=stacked)
        stacked += declared == STACKED
        node = _child(node, entry)
    if stacked and len(leaf.shape) - stacked > 1:
        raise ValueError(
            f"{dotted_name(path)}: a matrix of a block must be declared in its module's parameter_specs, got none "
            f"(shape {leaf.shape})"
        )
    return ParameterSpec(decay=dotted_name(path[-1:]) == "weight", stacked=stacked)


def _child(node: Any, entry: Any) -> Any:
    if isinstance(entry, jax.tree_util.GetAttrKey):
        return getattr(node, entry.name)
    return node[entry.idx] if isinstance(entry, jax.tree_util.SequenceKey) else node[entry.key]


def parameter_shardings(mesh: Mesh, tree: Any) -> Any:
    """The sharding of every array in a pytree of arrays or `ShapeDtypeStruct`s, by what its modules declare."""
    return jax.tree.map(
        lambda spec, leaf: NamedSharding(mesh, partition(mesh, spec, leaf.shape)), parameter_specs(tree), tree
    )


def partition(mesh: Mesh | AbstractMesh, spec: ParameterSpec, shape: tuple[int, ...]) -> PartitionSpec:
    """How a parameter of this shape is split over the mesh."""
    if not any(spec.axes):
        return PartitionSpec()
    axes = (None,) * (len(shape) - len(spec.axes)) + tuple(LOGICAL_AXES[axis] for axis in spec.axes)
    # A dimension that is not divisible by the size of the axis is not split.
    return PartitionSpec(
        *(axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in zip(axes, shape, strict=True))
    )


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def init_sharded(mesh: Mesh, build: Callable[..., Any], *arguments: Any) -> Any:
    """Run `build` under jit with its results laid out as `parameter_shardings` says, so that no device ever holds the whole state.

    `arguments` are pytrees of arrays; as arguments, and not as part of `build`, they do not become constants.
    """
    shapes = jax.eval_shape(build, *arguments)
    return jax.jit(build, out_shardings=parameter_shardings(mesh, shapes))(*arguments)


def own_rows(mesh: Mesh, batch_size: int) -> Int[np.ndarray, " rows"]:
    """The rows of a global batch that this process's devices need, ascending.

    Processes whose devices share a part of the batch, as those along the axis `tensor` do, get the same rows.
    """
    parts = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    slices = {index[0].indices(batch_size)[:2] for index in parts if index is not None}
    return np.concatenate([np.arange(start, stop) for start, stop in sorted(slices)])


def shard_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """This process's rows (`own_rows`) -> global arrays split over the data and fsdp axes: the only host-to-device copy."""
    sharding, shards = batch_sharding(mesh), batch_shards(mesh)

    def place(rows: np.ndarray) -> jax.Array:
        size = len(rows) * shards // len(own_rows(mesh, shards))
        numbers = own_rows(mesh, size)

        def of_device(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(size)
            first = int(np.searchsorted(numbers, start))
            return rows[first : first + stop - start]

        return jax.make_array_from_callback((size, *rows.shape[1:]), sharding, of_device)

    return {name: place(rows) for name, rows in batch.items()}


def micro_batch(batch: Any, i: jax.Array, count: int) -> Any:
    """Every `count`-th row of `batch` from row i on, so that each micro-batch is spread over all devices.

    One micro-batch is sliced at a time, as all of them together would be a second copy of the batch.
    """
    cut = lambda x: jax.lax.dynamic_index_in_dim(x.reshape(-1, count, *x.shape[1:]), i, axis=1, keepdims=False)
    return jax.tree.map(cut, batch)


def join_micro_batches(results: Any) -> Any:
    """(count, batch / count, ...) results of the micro-batches -> (batch, ...) in the order of the batch."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), results)


def prefetch_to_device(
    mesh: Mesh, stream: Any, encode: Callable[[dict[str, jax.Array]], dict[str, jax.Array]], ahead: int = 2
) -> Iterator[tuple[dict[str, jax.Array], dict]]:
    """Encoded batches on the devices, each with the stream's state after it.

    `ahead` further ones are under way, so that copying and encoding overlap with the current step.
    """
    queue: collections.deque = collections.deque()
    for batch in stream:
        queue.append((encode(shard_batch(mesh, batch)), stream.get_state()))
        if len(queue) > ahead:
            yield queue.popleft()
