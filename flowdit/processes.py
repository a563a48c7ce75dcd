"""The processes of a run: joining them, broadcasting decisions of the first one, and gathering values.

Built on JAX: `jax.distributed` joins the processes, and they communicate by collectives over all devices.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from flowdit.errors import first_line
from flowdit.sharding import MeshConfig


def check_processes(config: MeshConfig) -> None:
    """Raise `ValueError` unless coordinator, num_processes and process_id are all null, or all given and consistent."""
    fields = {name: getattr(config, name) for name in ("coordinator", "num_processes", "process_id")}
    missing = [name for name, value in fields.items() if value is None]
    if len(missing) == len(fields):
        return
    if missing:
        raise ValueError(f"mesh.{missing[0]}: must be given together with {' and '.join(_given(fields))}")
    host, _, port = fields["coordinator"].rpartition(":")
    if not re.fullmatch(r"[^\s:]+|\[[0-9a-fA-F:]+\]", host) or not port.isdigit() or not 0 < int(port) < 2**16:
        raise ValueError(f"mesh.coordinator: must be host:port, got {fields['coordinator']!r}")
    if fields["num_processes"] < 1:
        raise ValueError(f"mesh.num_processes: must be at least 1, got {fields['num_processes']}")
    if not 0 <= fields["process_id"] < fields["num_processes"]:
        raise ValueError(
            f"mesh.process_id: must be in [0, mesh.num_processes={fields['num_processes']}), got {fields['process_id']}"
        )


def _given(fields: dict[str, Any]) -> list[str]:
    return [f"mesh.{name}={value}" for name, value in fields.items() if value is not None]


def join_processes(config: MeshConfig) -> None:
    """Join the processes of this run, found by `mesh.coordinator` or, with `mesh.multi_process`, by the cluster.

    Must be called before any use of a device. Raises `ValueError` if the others cannot be found.
    """
    asked = config.coordinator is not None or config.multi_process
    if not asked or jax.distributed.is_initialized():
        return
    try:
        jax.distributed.initialize(config.coordinator, config.num_processes, config.process_id)
    except (ValueError, RuntimeError) as problem:
        reason = first_line(problem)
        if config.coordinator is not None:
            raise ValueError(f"mesh.coordinator: {config.coordinator} cannot be joined: {reason}") from problem
        raise ValueError(
            "mesh.multi_process: no cluster was recognised (Slurm, Open MPI, Kubernetes, Cloud TPU); give "
            f"mesh.coordinator, mesh.num_processes and mesh.process_id: {reason}"
        ) from problem


def from_first(decide: Callable[[], Any]) -> Any:
    """Call `decide` on the first process only and return its result on all processes.

    The result must be JSON. An error is raised on all processes, on the others as `ValueError`.
    """
    if jax.process_count() == 1:
        return decide()
    answer, failure = {}, None
    if jax.process_index() == 0:
        try:
            answer = {"value": decide()}
        except Exception as problem:  # any error, as the others must not wait for an answer
            answer, failure = {"error": str(problem)}, problem
    answer = _broadcast(answer)
    if failure is not None:
        raise failure
    if "error" in answer:
        raise ValueError(answer["error"])
    return answer["value"]


def _broadcast(answer: dict[str, Any]) -> dict[str, Any]:
    content = _to_bytes(answer)
    # All processes need the same shape, which only the first one knows.
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    padded = np.resize(content, size)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes())


def gather(value: Any) -> list[Any]:
    """The values of all processes, in order, on all processes. They must be JSON. All processes must call it."""
    if jax.process_count() == 1:
        return [value]
    content = _to_bytes(value)
    sizes = multihost_utils.process_allgather(np.int32(len(content)))
    rows = multihost_utils.process_allgather(np.resize(content, sizes.max()))
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def _to_bytes(value: Any) -> np.ndarray:
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def any_process(value: bool) -> bool:
    """Whether `value` is true on any process. All processes must call it."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.process_allgather(np.bool_(value)).any())


def wait_for_all(name: str) -> None:
    """Wait until every process has reached the point called `name`."""
    multihost_utils.sync_global_devices(name)
