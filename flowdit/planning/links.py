"""How long collectives take on links at their published rate, without latency."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from flowdit.planning.cost import Collective
from flowdit.planning.machines import NODE, Gpu, Topology, Tpu

Coordinates = tuple[int, ...]
_MESH = re.compile(r"mesh\[(.*?)\](?:, device_ids=\((.*?)\))? \{(.*?)\}")
_IOTA = re.compile(r"\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?")


class Links(NamedTuple):
    """The links of a topology; `coordinates` are those of its devices, in the order of the mesh (none for GPUs)."""

    topology: Topology
    coordinates: Sequence[Coordinates] = ()

    def seconds(self, collective: Collective) -> float:
        """Time of a collective: its bytes, as often as its kind moves them, over the links that its groups have."""
        groups = device_groups(collective.groups, self.topology.num_devices)
        size = max(len(group) for group in groups)
        if size == 1:
            return 0.0
        machine = self.topology.machine
        if isinstance(machine, Gpu):
            is_inside = all(len({device // NODE for device in group}) == 1 for group in groups)
            rate, longest = machine.link if is_inside else machine.network, 1
        else:
            rate, longest = self._torus(machine, groups)
        return moved(collective.kind, collective.bytes, size, longest) / rate

    def _torus(self, tpu: Tpu, groups: Sequence[Sequence[int]]) -> tuple[float, int]:
        """Bytes/s into the device of the groups that has the fewest links, and the longest side of a group."""
        places = [[self.coordinates[device] for device in group] for group in groups]
        rates = [self._rate(tpu, group) for group in places if len(group) > 1]
        return min(rate for rate, _ in rates), max(longest for _, longest in rates)

    def _rate(self, tpu: Tpu, group: Sequence[Coordinates]) -> tuple[float, int]:
        """Of one group. Groups whose devices lie between each other's share the links of the box that they span."""
        axes, full = list(zip(*group, strict=True)), self.topology.sides
        whole_cubes = tpu.dimensions == 2 or all(side % tpu.ring == 0 for side in full)
        sides, links = [], 0
        for axis, whole in zip(axes, (*full, 1), strict=False):  # coordinates are three
            side = max(axis) - min(axis) + 1
            is_closed = whole_cubes and whole % tpu.ring == 0
            if is_closed and len(group) == 2:  # two devices use the shorter way around
                side = min(side, whole - side + 2)
            links += 2 if is_closed and side == whole else int(side > 1)  # the end of a row has one neighbour
            sides.append(side)
        box = math.prod(sides)
        distinct = len(set(group))
        return max(links, 1) * tpu.link * min(distinct / box, 1), max(sides)


def moved(kind: str, size: int, devices: int, longest: int = 1) -> float:
    """Bytes that each of `devices` receives for an array of `size` bytes, by the ring algorithms."""
    share = (devices - 1) / devices
    if kind == "all-reduce":
        return 2 * size * share
    if kind == "all-to-all":  # between the ends of a row, each byte crosses a quarter of it on average
        return size * share * max(longest / 4, 1)
    return size * (1.0 if kind == "collective-permute" else share)


def device_groups(text: str, num_devices: int) -> list[list[int]]:
    """The groups of a collective, as positions in the mesh; all devices in one if it does not say."""
    if mesh := _MESH.match(text):
        return _mesh_groups(mesh[1], mesh[2], mesh[3], num_devices)
    if iota := _IOTA.match(text):
        groups = [int(side) for side in iota[1].split(",")]
        return _iota(num_devices, iota[2], iota[3]).reshape(groups).tolist()
    listed = [[int(number) for number in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", text)]
    return listed or [list(range(num_devices))]


def _mesh_groups(sizes: str, order: str | None, axes: str, num_devices: int) -> list[list[int]]:
    """Of `'axis_0'=4,'axis_1'=4`, optionally reordered by `[4,4]T(1,0)`, over the axes `'axis_1'`."""
    mesh = dict(re.findall(r"'(\w+)'=(\d+)", sizes))
    chosen = re.findall(r"'(\w+)'", axes)
    if math.prod(map(int, mesh.values())) != num_devices or not set(chosen) <= mesh.keys() or ":" in axes:
        return [list(range(num_devices))]
    reordered = _IOTA.match(order) if order else None
    numbers = _iota(num_devices, reordered[1], reordered[3]) if reordered else np.arange(num_devices)
    names = list(mesh)
    kept = [i for i, name in enumerate(names) if name not in chosen]
    over = [names.index(name) for name in chosen]
    size = math.prod(int(mesh[name]) for name in chosen)
    return numbers.reshape([int(side) for side in mesh.values()]).transpose(kept + over).reshape(-1, size).tolist()


def _iota(count: int, sides: str | None, permutation: str | None) -> np.ndarray:
    numbers = np.arange(count)
    if sides:
        numbers = numbers.reshape([int(side) for side in sides.split(",")])
    if permutation:
        numbers = numbers.transpose([int(axis) for axis in permutation.split(",")])
    return numbers.reshape(-1)
