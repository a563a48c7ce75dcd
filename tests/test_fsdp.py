"""The order of devices in a mesh of a TPU's torus, and the hops in which weights are gathered along it."""

from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flowdit import fsdp
from flowdit.models.config import DiTConfig
from flowdit.models.dit import build_dit
from flowdit.models.layers import Linear
from flowdit.sharding import AXES, MeshConfig, make_mesh


def torus(x: int, y: int, z: int = 1, slices: int = 1, shuffle: int = 0) -> list:
    """Absent devices of a torus, in the order of the hosts, which have 2 x 2 of them, or shuffled."""
    places = [(s, k, j, i) for s in range(slices) for k in range(z) for j in range(y) for i in range(x)]
    places.sort(key=lambda place: (place[:2], place[2] // 2, place[3] // 2, place))
    devices = [
        Mock(spec=jax.Device, platform="tpu", coords=(i, j, k), core_on_chip=0, slice_index=s) for s, k, j, i in places
    ]
    if shuffle:
        np.random.default_rng(shuffle).shuffle(devices)
    return devices


@pytest.mark.parametrize("shuffle", [0, 1])
def test_devices_follow_the_lines_of_the_torus(shuffle):
    mesh = make_mesh(MeshConfig(data=4, fsdp=4), torus(4, 4, shuffle=shuffle))
    assert [device.coords for device in mesh.devices[1, :, 0]] == [(i, 1, 0) for i in range(4)]
    assert [device.coords for device in mesh.devices[:, 2, 0]] == [(2, j, 0) for j in range(4)]


def test_slices_are_split_by_the_first_axis():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4), torus(2, 2, slices=2))
    assert [device.slice_index for device in mesh.devices[:, 0, 0]] == [0, 1]
    assert {device.slice_index for device in mesh.devices[1].flat} == {1}


@pytest.mark.parametrize(
    ("shape", "config", "hops"),
    [
        ((4, 4), MeshConfig(fsdp=16), (4, 4)),
        ((4, 4), MeshConfig(fsdp=8, tensor=2), (2, 4)),
        ((4, 4), MeshConfig(fsdp=4), (4,)),
        ((4, 4), MeshConfig(fsdp=8), (4, 2)),
        ((4, 4, 4), MeshConfig(fsdp=64), (4, 4, 4)),
        ((2, 2), MeshConfig(), ()),
        ((4, 2), MeshConfig(fsdp=2, tensor=4), (2,)),
    ],
    ids=str,
)
def test_hops_are_the_sides_of_the_box_that_the_devices_fill(shape, config, hops):
    assert fsdp.hops_along(make_mesh(config, torus(*shape))) == fsdp.Hops(hops, on_tpu=True)


def test_slices_are_the_last_hop_and_devices_in_no_box_take_one():
    assert fsdp.hops_along(make_mesh(MeshConfig(data=1, fsdp=8), torus(2, 2, slices=2))).sizes == (2, 2, 2)
    shuffled = np.asarray(torus(4, 4, shuffle=1)).reshape(1, 16, 1)
    assert fsdp.hops_along(Mesh(shuffled, AXES)).sizes == (16,)
    assert fsdp.hops_along(make_mesh(MeshConfig(data=1, fsdp=4))) == fsdp.Hops((4,))


@pytest.mark.parametrize("axis", [0, 1])
def test_two_hops_gather_and_scatter_as_one(axis, monkeypatch):
    """On the four devices of the tests as if they were a torus of 2 x 2."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=4))
    axes = ("embed", "mlp") if axis == 0 else ("mlp", "embed")
    weight = jax.random.normal(jax.random.key(0), (8, 8))
    rows = jax.random.normal(jax.random.key(1), (12, 8))

    def loss_and_gradient(layer: Linear, rows: jax.Array, step: jax.Array):
        def loss(layer):
            return jnp.square(fsdp.gather(layer)(rows)).sum(-1).mean()

        value, gradient = jax.value_and_grad(loss)(layer)
        return jnp.full(len(rows), value), gradient

    def run(hops):
        monkeypatch.setattr(fsdp, "hops_along", lambda mesh: fsdp.Hops(hops, on_tpu=True))
        layer = Linear(weight, jnp.ones(8), axes)
        compute = fsdp.on_mesh(mesh, fsdp.over_devices(mesh, loss_and_gradient, "float32"))
        layer = jax.device_put(layer, jax.tree.map(lambda leaf: NamedSharding(mesh, PartitionSpec()), layer))
        with jax.default_matmul_precision("highest"):
            values, gradient = jax.jit(compute)(layer, rows, jnp.zeros(()))
        return values.mean(), gradient.weight, gradient.bias

    with jax.default_matmul_precision("highest"):
        whole = Linear(weight, jnp.ones(8))
        expected, gradient = jax.value_and_grad(lambda layer: jnp.square(layer(rows)).sum(-1).mean())(whole)
    for hops in ((4,), (2, 2)):
        for got, reference in zip(run(hops), (expected, gradient.weight, gradient.bias), strict=True):
            np.testing.assert_allclose(got, reference, rtol=1e-5, atol=1e-5)


def test_a_width_that_cannot_be_split_is_refused():
    mesh = make_mesh(MeshConfig(data=1, fsdp=4))
    model = jax.eval_shape(
        lambda: build_dit(DiTConfig(depth=1, hidden_dim=54, num_heads=3), 4, 3, key=jax.random.key(0))
    )
    message = r"^mesh\.fsdp: must divide the width of the model, 54 in blocks\.attention\.qkv\.weight, got 4$"
    with pytest.raises(ValueError, match=message):
        fsdp.check_width(mesh, model)
    fsdp.check_width(make_mesh(MeshConfig(data=1, fsdp=2, tensor=2)), model)
