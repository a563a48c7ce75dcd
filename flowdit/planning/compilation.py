"""Compiling the training step of a configuration for devices that need not be attached."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.errors import JaxRuntimeError
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from flowdit.errors import first_line
from flowdit.fields import FieldError
from flowdit.models.compute import Compute
from flowdit.planning.config import PlanConfig
from flowdit.planning.data import PlannedData
from flowdit.planning.environment import compiler_only
from flowdit.planning.machines import GIB, Topology
from flowdit.sharding import check_batch_size, make_mesh
from flowdit.training.run_data import abstract_batch
from flowdit.training.setup import Parts, make_parts
from flowdit.training.step import TrainState

_UNITS = {"K": 2.0**10, "M": 2.0**20, "G": GIB, "T": 2.0**40}
_NEEDED = (
    re.compile(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm"),
    re.compile(r"\(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)"),
)


class Step(NamedTuple):
    """The training step of a configuration on a mesh, with the shapes of its state and batch."""

    mesh: Mesh
    parts: Parts
    batch: dict[str, Any]

    @property
    def state(self) -> TrainState:
        return self.parts.template


class Compiled(NamedTuple):
    """A compiled step: its text, memory of a device in bytes, and how long the compilation took.

    The memory is what is reserved: arguments, results that do not replace arguments, temporaries and the program. A
    step that does not fit has no text, and the memory that the compiler says it needs.
    """

    text: str
    memory: int
    limit: float
    host_memory: int
    seconds: float


def devices_of(topology: Topology) -> Sequence[jax.Device] | None:
    """The devices of a topology: TPUs from the compiler, GPUs if this machine has them; else None.

    Raises `FieldError` if the TPU compiler is missing or does not know the topology.
    """
    if topology.is_tpu:
        return _tpus(topology)
    try:
        found = jax.devices("gpu")
    except RuntimeError:
        return None
    own = [device for device in found if device.device_kind == topology.machine.kind]
    return own[: topology.num_devices] if len(own) >= topology.num_devices else None


def _tpus(topology: Topology) -> Sequence[jax.Device]:
    if importlib.util.find_spec("libtpu") is None:
        raise FieldError("topology", f"{topology.name} needs the TPU compiler: pip install 'flowdit[tpu]'")
    sides = "x".join(str(side) for side in topology.sides)
    # A host has 2 x 2 chips; slices with other sides are described chip by chip.
    hosts = {} if all(side % 2 == 0 for side in topology.sides[:2]) else {"chips_per_host_bounds": [1, 1, 1]}
    name = f"{topology.name.partition(':')[0]}:{sides}"
    try:
        with compiler_only():
            return topologies.get_topology_desc(topology_name=name, platform="tpu", **hosts).devices
    except (JaxRuntimeError, ValueError) as problem:
        raise FieldError("topology", f"the TPU compiler refuses {topology.name}: {first_line(problem)}") from None


def build_step(config: PlanConfig, data: PlannedData, devices: Sequence[Any], compute: Compute | None = None) -> Step:
    """The step of a run with these settings on these devices. Nothing is allocated.

    `compute` is that of the step; None: what a run chooses on these devices.
    Raises `ValueError` for settings that do not fit each other, the data or the devices.
    """
    mesh = make_mesh(config.mesh, devices)
    check_batch_size(mesh, config.train.batch_size, config.train.gradient_accum)
    parts = make_parts(config, data.manifest, data.conditioning, mesh, compute, map_shape=data.map_shape)
    batch = abstract_batch(config, data.manifest, data.conditioning, mesh, map_shape=data.map_shape)
    return Step(mesh, parts, batch)


def compile_step(step: Step, limit: float) -> Compiled:
    """Compile it. `limit` is the memory of a device, unless the compiler says what it can use of it."""
    start = time.perf_counter()
    try:
        with without_cache():
            lowered = step.parts.train_step.lower(step.parts.template, step.batch)  # type: ignore[attr-defined]
            compiled = lowered.compile()
    except JaxRuntimeError as problem:
        found = next((match for pattern in _NEEDED if (match := pattern.search(str(problem)))), None)
        if found is None:
            raise
        needed, usable = (float(found[i]) * _UNITS[found[i + 1]] for i in (1, 3))
        return Compiled("", int(needed), usable, 0, time.perf_counter() - start)
    seconds = time.perf_counter() - start
    sizes = compiled.memory_analysis()
    memory = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    memory += sizes.temp_size_in_bytes + sizes.generated_code_size_in_bytes
    host_memory = sizes.host_argument_size_in_bytes + sizes.host_temp_size_in_bytes
    return Compiled(compiled.as_text(), memory, limit, host_memory, seconds)


@contextlib.contextmanager
def without_cache() -> Iterator[None]:
    """Compile without JAX's compilation cache: programs for TPUs that are not there cannot be read back from it."""
    before = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX looks at the setting once
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def compiler_flags() -> dict[str, str]:
    """The environment variables with flags of the compilers, where they are set."""
    return {name: os.environ[name] for name in ("LIBTPU_INIT_ARGS", "XLA_FLAGS") if os.environ.get(name)}


def compiler_versions() -> str:
    """JAX, and libtpu if it is installed."""
    names = ["jax", *(["libtpu"] if importlib.util.find_spec("libtpu") else [])]
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
