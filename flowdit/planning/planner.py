"""The plan of one topology: memory, time and cost of a training run there."""

from __future__ import annotations

import dataclasses
import logging
from typing import NamedTuple

from flowdit.planning import gpu
from flowdit.planning.compilation import Compiled, Step, build_step, compile_step, devices_of
from flowdit.planning.config import PlanConfig
from flowdit.planning.cost import Cost, program_cost
from flowdit.planning.data import PlannedData, with_batch_size
from flowdit.planning.links import Links
from flowdit.planning.machines import Topology, Tpu
from flowdit.planning.memory import memory_of_step
from flowdit.sharding import batch_shards

logger = logging.getLogger(__name__)


class Range(NamedTuple):
    """The smallest and the largest value that a figure can have under the assumptions."""

    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Exchange:
    """All collectives of a kind in a step: how many, bytes of their arrays, seconds on the links."""

    count: int
    bytes: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run costs on one topology. Memory is in bytes of a device, times in seconds.

    `is_estimate` is true where nothing was compiled. Figures of time are None for a step that does not fit and of which
    only the memory is known. `cycles` are the compiler's, of a device and a step, without the `kernels` (custom
    calls) for which it makes no estimate; `kernel_flops` are theirs. Of a conditional the dearest branch counts;
    `conditional_cycles` are those that the cheapest would save.
    """

    topology: str
    devices: int
    mesh: dict[str, int]
    is_estimate: bool
    batch_size: int
    images_per_device: int
    fits: bool
    memory: dict[str, int]
    memory_limit: float
    host_memory: int
    image_flops: int
    compile_seconds: float
    cycles: int | None = None
    conditional_cycles: int = 0
    kernels: dict[str, int] = dataclasses.field(default_factory=dict)
    kernel_flops: int = 0
    unknown_loops: int = 0
    collectives: dict[str, Exchange] = dataclasses.field(default_factory=dict)
    compute_seconds: float | None = None
    communication_seconds: float | None = None
    step_seconds: Range | None = None
    images_per_second: Range | None = None
    utilisation: Range | None = None
    days: Range | None = None
    device_hours: Range | None = None
    price: Range | None = None
    largest_batch: int | None = None

    @property
    def peak_memory(self) -> int:
        return sum(self.memory.values())

    @property
    def cycles_per_image(self) -> float | None:
        """The compiler's cycles of a device for each image of its share."""
        return None if self.cycles is None else self.cycles / self.images_of_a_device

    @property
    def images_of_a_device(self) -> float:
        """Its share of the batch; devices along `tensor` share the same images, and count a part of each."""
        return self.batch_size / self.devices


class Figures(NamedTuple):
    """What a plan follows from. `cost` and `compute_seconds` are None for a step that does not fit."""

    memory: dict[str, int]
    limit: float
    compiled: Compiled | None
    cost: Cost | None
    compute_seconds: float | None


class PlannedStep(NamedTuple):
    """The step on a topology. With `is_absent` it cannot be compiled here."""

    topology: Topology
    step: Step
    is_absent: bool


def planned_step(config: PlanConfig, data: PlannedData, topology: Topology) -> PlannedStep:
    """The step of a configuration on a topology. Raises `ValueError` for settings that do not fit it."""
    devices = devices_of(topology)
    if devices is None:
        step = build_step(config, data, gpu.absent_gpus(topology), gpu.traced_compute(config))
    else:
        step = build_step(config, data, devices)
    return PlannedStep(topology, step, devices is None)


def plan(config: PlanConfig, data: PlannedData, planned: PlannedStep) -> Plan:
    """The plan of a configuration; `planned` is its step."""
    found = _plan(config, data, planned)
    if config.largest_batch:
        found = dataclasses.replace(found, largest_batch=_largest_batch(config, data, planned.topology, found))
    return found


def _plan(config: PlanConfig, data: PlannedData, planned: PlannedStep) -> Plan:
    topology, step, is_absent = planned
    compiled = None
    if not is_absent:
        logger.info("compiling the step for %s, batch %d", topology.name, config.train.batch_size)
        compiled = compile_step(step, topology.machine.memory)
    if topology.is_tpu:
        assert compiled is not None
        figures = _tpu_figures(config, step, topology, compiled)
    else:
        figures = _gpu_figures(config, data, step, topology, compiled)
    found = Plan(
        topology=topology.name,
        devices=topology.num_devices,
        mesh=dict(step.mesh.shape),
        is_estimate=compiled is None,
        batch_size=config.train.batch_size,
        images_per_device=config.train.batch_size // batch_shards(step.mesh),
        fits=sum(figures.memory.values()) <= figures.limit,
        memory=figures.memory,
        memory_limit=figures.limit,
        host_memory=compiled.host_memory if compiled else 0,
        image_flops=step.parts.image_flops(step.batch),
        compile_seconds=compiled.seconds if compiled else 0.0,
    )
    return found if figures.cost is None else _with_times(found, config, step, topology, figures)


def _tpu_figures(config: PlanConfig, step: Step, topology: Topology, compiled: Compiled) -> Figures:
    """By the compiler's cycles, and kernels that it does not know at the published peak."""
    memory = memory_of_step(step, compiled.memory)
    if not compiled.text:
        return Figures(memory, compiled.limit, compiled, None, None)
    assert isinstance(topology.machine, Tpu)
    cost = program_cost(compiled.text)
    seconds = cost.cycles / topology.machine.clock + cost.kernel_flops / topology.peak(config.train.compute_dtype)
    return Figures(memory, compiled.limit, compiled, cost, seconds)


def _gpu_figures(
    config: PlanConfig, data: PlannedData, step: Step, topology: Topology, compiled: Compiled | None
) -> Figures:
    """By published rates; memory and collectives of the compiled step if the GPUs are there."""
    seconds = gpu.compute_seconds(config, step, topology)
    if compiled is None:
        cost = Cost(collectives=gpu.estimated_collectives(config, step))
        return Figures(gpu.estimated_memory(config, data, step), topology.machine.memory, None, cost, seconds)
    memory = memory_of_step(step, compiled.memory)
    cost = Cost(collectives=program_cost(compiled.text).collectives) if compiled.text else None
    return Figures(memory, compiled.limit, compiled, cost, seconds)


def _with_times(found: Plan, config: PlanConfig, step: Step, topology: Topology, figures: Figures) -> Plan:
    cost, compute = figures.cost, figures.compute_seconds
    assert cost is not None and compute is not None
    exchanges = _exchanges(cost, step, topology)
    communication = sum((exchange.seconds for exchange in exchanges.values()), 0.0)
    # The compiler's cycles hold no time for collectives; how much of it hides behind the computation is not known.
    seconds = Range(max(compute, communication), compute + communication)
    peak = topology.num_devices * topology.peak(config.train.compute_dtype)
    work = config.train.batch_size * found.image_flops
    hours = Range(*(config.train.num_steps * value / 3600 for value in seconds))
    price = config.price_per_device_hour
    device_hours = Range(*(value * topology.num_devices for value in hours))
    return dataclasses.replace(
        found,
        cycles=cost.cycles if topology.is_tpu else None,
        conditional_cycles=cost.conditional_cycles if topology.is_tpu else 0,
        kernels=dict(cost.kernels),
        kernel_flops=cost.kernel_flops,
        unknown_loops=cost.unknown_loops,
        collectives=exchanges,
        compute_seconds=compute,
        communication_seconds=communication,
        step_seconds=seconds,
        images_per_second=Range(*(config.train.batch_size / value for value in reversed(seconds))),
        utilisation=Range(*(work / (peak * value) for value in reversed(seconds))),
        days=Range(*(value / 24 for value in hours)),
        device_hours=device_hours,
        price=None if price is None else Range(*(price * value for value in device_hours)),
    )


def _exchanges(cost: Cost, step: Step, topology: Topology) -> dict[str, Exchange]:
    devices = step.mesh.devices.flat
    links = Links(topology, [tuple(device.coords) for device in devices] if topology.is_tpu else ())
    found: dict[str, Exchange] = {}
    for collective, count in sorted(cost.collectives.items()):
        before = found.get(collective.kind, Exchange(0, 0, 0.0))
        found[collective.kind] = Exchange(
            before.count + count,
            before.bytes + count * collective.bytes,
            before.seconds + count * links.seconds(collective),
        )
    return found


def _largest_batch(config: PlanConfig, data: PlannedData, topology: Topology, known: Plan) -> int:
    """The largest batch that fits, in units of an image on every device and in every micro-batch; 0 if none does."""
    unit = config.train.gradient_accum * config.train.batch_size // known.images_per_device
    size = config.train.batch_size // unit

    def fits(count: int) -> bool:
        if count == size and known.fits:
            return True
        tried = with_batch_size(config, count * unit)
        return _plan(tried, data, planned_step(tried, data, topology)).fits

    fitting, too_large = (size, 2 * size) if known.fits else (0, size)
    while fitting == too_large // 2 and known.fits and fits(too_large):
        fitting, too_large = too_large, 2 * too_large
    while too_large - fitting > 1:
        middle = (fitting + too_large) // 2
        fitting, too_large = (middle, too_large) if fits(middle) else (fitting, middle)
    return fitting * unit
