"""Fully sharded data parallelism: gathering weights of a block, summing gradients, and dividing matrices among devices."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from flowdit.sharding import (
    AXES,
    BATCH_AXES,
    LOGICAL_AXES,
    ParameterSpec,
    batch_shards,
    dotted_name,
    parameter_shardings,
    parameter_specs,
    partition,
    slice_of,
)


def on_mesh(mesh: Mesh | None, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, about to be jitted, with `mesh` made known to every `gather` in it; with None, `function` itself."""
    if mesh is None:
        return function

    @functools.wraps(function)
    def on_the_mesh(*arguments: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*arguments)

    return on_the_mesh


def is_gathering() -> bool:
    """Whether `gather` does anything here: in a function of `on_mesh`, where `fsdp` is above 1."""
    return jax.sharding.get_abstract_mesh().shape.get("fsdp", 1) > 1


def gather(module: Any) -> Any:
    """Gather the matrices of `module` over `fsdp`; the split over `tensor` stays.

    Call it on one block in the scan over blocks, so that only the weights of one block are whole at a time. Within
    `over_devices`, as in training, the gradient of a gathered matrix is summed over `fsdp` and split again.

    Elsewhere it is a constraint for XLA. Without it, XLA multiplies activations by each device's part of the weights
    and sums the products over all devices: that moves many times the bytes, and each device then computes with the
    whole batch.
    """
    if not is_gathering():
        return module
    mesh = jax.sharding.get_abstract_mesh()

    def gather_leaf(spec: ParameterSpec, leaf: jax.Array) -> jax.Array:
        if "fsdp" in mesh.manual_axes:
            axis = _split_axis(spec, leaf)
            return leaf if axis is None else _all_gather(leaf, axis)
        split = partition(mesh, spec, leaf.shape)
        whole = PartitionSpec(*(None if axis == "fsdp" else axis for axis in split))
        return leaf if whole == split else jax.lax.with_sharding_constraint(leaf, whole)

    return jax.tree.map(gather_leaf, parameter_specs(module), module)


def keep_all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """A policy for `jax.checkpoint`: the backward pass gathers weights again instead of keeping those of all blocks."""
    return primitive.name not in ("sharding_constraint", "all_gather")


def over_devices(mesh: Mesh | None, function: Callable[..., Any], dtype: str) -> Callable[..., Any]:
    """Run `function(parameters, rows, step) -> (results by row, gradients)` on all devices, each with its rows.

    The gradients must be of a mean over the rows. Returned is the gradient of the mean over all rows, laid out like the
    parameters. In `function`, a device has its own part of the parameters, which `gather` makes whole. Those that `gather`
    makes whole are summed over `data` in `dtype`, the others over all devices in float32.

    Where `tensor` is above 1, XLA divides the work instead, and `function` sees all rows.
    """
    if mesh is None:
        return function

    def run(parameters: Any, rows: Any, step: jax.Array) -> tuple[Any, Any]:
        divided = function
        if mesh.shape["tensor"] == 1 and batch_shards(mesh) > 1:
            own = split_over_fsdp(mesh, parameters)
            by_row = PartitionSpec(BATCH_AXES)
            divided = jax.shard_map(
                functools.partial(_on_one_device, function, own, dtype),
                mesh=mesh,
                in_specs=(own, by_row, PartitionSpec()),
                out_specs=(by_row, own),
                check_vma=False,  # objectives of users need not say what differs between devices
            )
        with _current_hops(hops_along(mesh)):
            results, gradients = divided(parameters, rows, step)
        return results, jax.lax.with_sharding_constraint(gradients, parameter_shardings(mesh, gradients))

    return run


def _on_one_device(function: Callable[..., Any], own: Any, dtype: str, *arguments: Any) -> tuple[Any, Any]:
    results, gradients = function(*arguments)
    sums = _sum_over_devices(gradients, own, dtype)
    shards = batch_shards(jax.sharding.get_abstract_mesh())
    return results, jax.tree.map(lambda total: total / shards, sums)


def check_width(mesh: Mesh, parameters: Any) -> None:
    """Raise `ValueError` for parameters that `over_devices` cannot split."""
    if mesh.shape["tensor"] == 1:
        split_over_fsdp(mesh, parameters)


def split_over_fsdp(mesh: Mesh, tree: Any) -> Any:
    """The `PartitionSpec` over `fsdp` alone of every array in a pytree of parameters.

    Raises `ValueError` for an array that is not divisible: each device would hold all of it.
    """
    size = mesh.shape["fsdp"]

    def spec_of(path: tuple, spec: ParameterSpec, leaf: Any) -> PartitionSpec:
        axis = _split_axis(spec, leaf)
        if axis is None:
            return PartitionSpec()
        if leaf.shape[axis] % size:
            raise ValueError(
                f"mesh.fsdp: must divide the width of the model, {leaf.shape[axis]} in {dotted_name(path)}, got {size}"
            )
        return PartitionSpec(*(None,) * axis, "fsdp")

    return jax.tree_util.tree_map_with_path(spec_of, parameter_specs(tree), tree)


def _split_axis(spec: ParameterSpec, leaf: Any) -> int | None:
    """The axis of a parameter that is split over `fsdp`."""
    axes = [LOGICAL_AXES[axis] for axis in spec.axes]
    return len(leaf.shape) - len(axes) + axes.index("fsdp") if "fsdp" in axes else None


def _sum_over_devices(gradients: Any, own: Any, dtype: str) -> Any:
    """Sum over the axes of the batch over which `gather` did not: over `data`, and for what is not split over `fsdp`."""
    leaves, structure = jax.tree.flatten(gradients)
    are_split = ["fsdp" in spec for spec in structure.flatten_up_to(own)]
    sizes = jax.sharding.get_abstract_mesh().shape
    # What is not split is small: its sum costs little in float32.
    for split, axes, sum_dtype in ((True, ("data",), dtype), (False, BATCH_AXES, "float32")):
        chosen = [i for i, is_split in enumerate(are_split) if is_split == split]
        if math.prod(sizes[axis] for axis in axes) > 1:
            sums = jax.lax.psum([leaves[i].astype(sum_dtype) for i in chosen], axes)
            for i, total in zip(chosen, sums, strict=True):
                leaves[i] = total.astype(leaves[i].dtype)
    return structure.unflatten(leaves)


class Hops(NamedTuple):
    """How weights are gathered along `fsdp`: the number of devices as a product, a hop for each factor.

    `on_tpu`: whether gradients are laid out for the TPU compiler.
    """

    sizes: tuple[int, ...] = ()
    on_tpu: bool = False


# A user context is part of the keys of JAX's caches, so a function traced with other hops is traced again.
_current_hops = jax.make_user_context(default_value=Hops())


def _all_gather(leaf: jax.Array, axis: int) -> jax.Array:
    """Gather in the current hops. The gradient takes them back, each a reduce-scatter.

    In one hop over 16 devices the TPU compiler replaces the reduce-scatter by an all-reduce: twice the traffic.
    """
    hops = _current_hops.value
    stride, count = 1, math.prod(hops.sizes)
    for size in hops.sizes:
        starts = [i for i in range(count) if i // stride % size == 0]
        groups = [[start + stride * i for i in range(size)] for start in starts] if size < count else None
        leaf = jax.lax.all_gather(leaf, "fsdp", axis=axis, tiled=True, axis_index_groups=groups)
        stride *= size
    return _scattered_by(leaf, axis) if hops.on_tpu else leaf


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _scattered_by(leaf: jax.Array, axis: int) -> jax.Array:
    """The identity; its gradient is laid out with `axis` as the slowest to change.

    Otherwise the TPU compiler replaces the reduce-scatter along some axes by an all-reduce.
    """
    return leaf


def _lay_out(axis: int, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    others = [other for other in range(gradient.ndim) if other != axis]
    return (with_layout_constraint(gradient, Layout(major_to_minor=(axis, *others))),)


_scattered_by.defvjp(lambda leaf, axis: (leaf, None), _lay_out)


def hops_along(mesh: Mesh) -> Hops:
    """The sides of the box that the devices along `fsdp` fill in a TPU's torus, then slices.

    One hop on other platforms, or where they fill no box.
    """
    line = mesh.devices[0, :, 0]
    if line[0].platform != "tpu":
        return Hops((len(line),))
    places = np.asarray([(*device.coords, slice_of(device)) for device in line])
    sides = [np.unique(column) for column in places.T]
    box = np.stack(np.meshgrid(*sides, indexing="ij"), axis=-1).transpose(3, 2, 1, 0, 4)
    if not np.array_equal(box.reshape(-1, places.shape[1]), places):
        return Hops((len(line),), on_tpu=True)
    return Hops(tuple(len(side) for side in sides if len(side) > 1), on_tpu=True)


Matrices = Float[Array, "matrices in out"]


def on_whole_matrices(
    function: Callable[[Matrices], Matrices], spec: ParameterSpec, parameter: Float[Array, "..."]
) -> Float[Array, "..."]:
    """`function` of the matrices of a parameter (*stack, in, parts * out), fused ones apart, in its own layout.

    In a function of `on_mesh` they are divided among the devices: each calls `function` with some of them, whole, and with
    zeros where the number does not divide. What is split over `fsdp` is exchanged before and after; the other axes take
    their share of the matrices and gather the results. Without a mesh, `function` gets all of them.
    """
    sizes = jax.sharding.get_abstract_mesh().shape
    if math.prod(sizes.values()) == 1:
        return _with_matrices(function, spec.parts, parameter)
    split = _split_axis(spec, parameter)
    # The parts of a fused axis that is split itself are on different devices: it is gathered first.
    is_fused = spec.parts > 1 and split == parameter.ndim - 1
    if split is None or sizes["fsdp"] == 1 or parameter.shape[split] % sizes["fsdp"] or is_fused:
        own, axis = PartitionSpec(), None
    else:
        own, axis = PartitionSpec(*(None,) * split, "fsdp"), split - parameter.ndim + 3
    divided = functools.partial(_divided, function, axis)
    on_one_device = functools.partial(_with_matrices, divided, spec.parts)
    return jax.shard_map(on_one_device, in_specs=(own,), out_specs=own, check_vma=False)(parameter)


def _with_matrices(function: Callable[[Matrices], Matrices], parts: int, parameter: jax.Array) -> jax.Array:
    """`function` of (*stack, in, parts * out) as (stack * parts, in, out)."""
    rows, columns = parameter.shape[-2:]
    apart = parameter.reshape(-1, rows, parts, columns // parts).swapaxes(1, 2)
    done = function(apart.reshape(-1, rows, columns // parts))
    return done.reshape(apart.shape).swapaxes(1, 2).reshape(parameter.shape)


def _divided(function: Callable[[Matrices], Matrices], axis: int | None, matrices: Matrices) -> Matrices:
    """`function` of this device's share of the matrices, of which it has a part along `axis`; None: has all."""
    sizes, count = jax.sharding.get_abstract_mesh().shape, len(matrices)
    holders = 1 if axis is None else sizes["fsdp"]
    others = tuple(name for name in AXES if axis is None or name != "fsdp")
    # Where each device along `fsdp` has one at most, dividing them further would save no time.
    shares = math.prod(sizes[name] for name in others) if count > holders else 1
    size = math.ceil(count / (holders * shares)) * holders
    share = jnp.pad(matrices, ((0, size * shares - count), (0, 0), (0, 0)))
    if shares > 1:
        share = jax.lax.dynamic_slice_in_dim(share, jax.lax.axis_index(others) * size, size)
    if axis is not None:
        share = jax.lax.all_to_all(share, "fsdp", split_axis=0, concat_axis=axis, tiled=True)
    share = function(share)
    if axis is not None:
        share = jax.lax.all_to_all(share, "fsdp", split_axis=axis, concat_axis=0, tiled=True)
    if shares > 1:
        share = jax.lax.all_gather(share, others, axis=0, tiled=True)
    return share[:count]
