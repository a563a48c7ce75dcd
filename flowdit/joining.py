"""How the processes of a run find each other: `mesh.coordinator`, a cluster that JAX recognises, or torchrun."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from flowdit import leaving, supervisor
from flowdit.errors import first_line

_GRACE_SECONDS = 5
"""What JAX waits longer than it is told."""


@dataclass
class ProcessConfig:
    """How several processes find each other, and when one counts as lost.

    Attributes:
        multi_process: join the processes that a launcher has started (Slurm, Open MPI, Kubernetes, Cloud TPU, torchrun);
            null: if it has started several; true: they must be found; false: never.
        coordinator: `host:port` of the first process, which the others can reach; first choice, before any launcher.
        num_processes: number of processes that meet at `coordinator`; null: as the launcher says.
        process_id: number of this process, from 0; null: as the launcher says.
        devices_per_process: GPUs (or CPU devices) of each of several processes on one host, in their order; null: one
            GPU where a launcher has numbered the processes of a host (Slurm, MPI, torchrun), else all of the host. On
            CPUs also for a process alone: null is one device of all cores, of which two on two cores are faster.
        init_timeout: seconds to wait for the other processes at the start.
        heartbeat_timeout: seconds without a sign of life after which another process is lost and this one ends, with
            exit status 75.
    """

    multi_process: bool | None = None
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    devices_per_process: int | None = None
    init_timeout: int = 120
    heartbeat_timeout: int = 12


class UnknownCluster(ValueError):
    """JAX recognises no cluster."""


class Launched(NamedTuple):
    """What a launcher has told this process in environment variables; `local_rank` is its number on the host."""

    by: str
    rank: int
    size: int
    local_rank: int


class Peers(NamedTuple):
    """Where the processes meet. None: JAX finds it. `by` says who knew; `local_rank` is a launcher's."""

    by: str
    coordinator: str | None
    num_processes: int | None
    process_id: int | None
    local_rank: int | None


_LAUNCHERS = {
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "Slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    "MPI": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
}
"""Rank, number of processes and rank on the host, as the launchers set them; an inner one before an outer one."""
_RECOGNISED = {"Open MPI": "OMPI_MCA_orte_hnp_uri", "Slurm": "SLURM_STEP_NODELIST"}
"""Where JAX finds the address of the first process. Open MPI 5 does not set it any more."""


def check_processes(config: ProcessConfig) -> None:
    """Raise `ValueError` unless the fields are consistent with each other."""
    for name in ("init_timeout", "heartbeat_timeout", "devices_per_process", "num_processes"):
        if (value := getattr(config, name)) is not None and value < 1:
            raise ValueError(f"mesh.{name}: must be at least 1, got {value}")
    if config.coordinator is None:
        for name in ("num_processes", "process_id"):
            if (value := getattr(config, name)) is not None:
                raise ValueError(f"mesh.coordinator: must be given together with mesh.{name}={value}")
        return
    if config.multi_process is False:
        raise ValueError(f"mesh.multi_process: must not be false with mesh.coordinator={config.coordinator}, got false")
    host, _, port = config.coordinator.rpartition(":")
    if not re.fullmatch(r"[^\s:]+|\[[0-9a-fA-F:]+\]", host) or not port.isdigit() or not 0 < int(port) < 2**16:
        raise ValueError(f"mesh.coordinator: must be host:port, got {config.coordinator!r}")


def join_processes(config: ProcessConfig, *, ends_gracefully: bool = False) -> str | None:
    """Join the other processes, if there are any; returns a line for the log.

    Must be called before any use of a device. From then on an error of one process ends all. With `ends_gracefully`
    SIGTERM is left to JAX, and `reached_preemption` of a checkpoint manager says when all should stop. Raises
    `ValueError` if the others cannot be found or count differently.
    """
    peers = None if jax.distributed.is_initialized() else find_peers(config, os.environ)
    if config.devices_per_process is not None:
        jax.config.update("jax_num_cpu_devices", config.devices_per_process)
    if peers is None:
        return None
    of_all = "" if peers.num_processes is None else f" of {peers.num_processes}"
    number = "" if peers.process_id is None else f"process {peers.process_id}{of_all} at {peers.coordinator}, "
    supervisor.joining(f"{number}after {config.init_timeout} s")
    jax.config.update("jax_enable_preemption_service", ends_gracefully)
    try:
        _initialize(peers, config)
    except UnknownCluster as problem:
        if config.multi_process is None and _is_single_tpu_host(peers, os.environ):
            return f"a process of its own: {problem}"
        raise
    supervisor.joined()
    leaving.watch_others()
    leaving.require_same_count(peers.num_processes, config.init_timeout)
    return f"{count} processes, found by {peers.by}" if (count := jax.process_count()) > 1 else None


def _initialize(peers: Peers, config: ProcessConfig) -> None:
    given: dict[str, Any] = {}
    if peers.coordinator is not None:
        given = {"coordinator_address": peers.coordinator, "num_processes": peers.num_processes}
        # Without detection, JAX would still take the devices of this process from Slurm or Open MPI.
        given |= {"process_id": peers.process_id, "cluster_detection_method": "deactivate"}
    try:
        jax.distributed.initialize(
            local_device_ids=_local_devices(peers, config.devices_per_process),
            initialization_timeout=max(1, config.init_timeout - _GRACE_SECONDS),
            heartbeat_timeout_seconds=config.heartbeat_timeout,
            **given,
        )
    except (ValueError, RuntimeError, OSError) as problem:
        reason = first_line(problem)
        if peers.coordinator is not None:
            raise ValueError(f"mesh.coordinator: {peers.coordinator} cannot be joined: {reason}") from problem
        is_unknown = isinstance(
            problem, ValueError
        )  # JAX's answer without any cluster; others are of the cluster found
        raise (UnknownCluster if is_unknown else ValueError)(
            f"mesh.multi_process: {peers.by} cannot say where the processes are (known are Slurm, Open MPI, Kubernetes, "
            "Cloud TPU and torchrun); give mesh.coordinator, mesh.num_processes and mesh.process_id, or false for a "
            f"process of its own: {reason}"
        ) from problem


def _is_single_tpu_host(peers: Peers, environment: Mapping[str, str]) -> bool:
    return peers.by == "Cloud TPU" and "," not in environment.get("TPU_WORKER_HOSTNAMES", "")


def _local_devices(peers: Peers, count: int | None) -> list[int] | None:
    """The numbers of this process's GPUs on its host; None: all, or as JAX finds out from the cluster."""
    if count is None and (peers.local_rank is None or peers.coordinator is None):
        return None
    count, rank = count or 1, peers.local_rank or 0
    if peers.local_rank is None and peers.process_id is not None:  # by hand: one host is filled after the other
        processes_per_host = len(glob.glob("/dev/nvidia[0-9]*")) // count
        rank = peers.process_id % (processes_per_host or peers.process_id + 1)
    return list(range(rank * count, (rank + 1) * count))


def find_peers(config: ProcessConfig, environment: Mapping[str, str]) -> Peers | None:
    """Where the processes meet, or None for a process of its own. Raises `ValueError` where something is missing."""
    launched = _launched(environment)
    if config.coordinator is not None:
        return _at_coordinator(config, launched)
    if config.multi_process is False:
        return None
    local_rank = None if launched is None else launched.local_rank
    if launched is not None and launched.size > 1:
        if launched.by == "torchrun":
            return _at_master(launched, environment)
        if _RECOGNISED.get(launched.by, "") in environment:
            return Peers(launched.by, None, None, None, local_rank)
        raise ValueError(
            f"mesh.coordinator: must be host:port of the first process, as {launched.by} has started "
            f"{launched.size} processes without telling it, got null"
        )
    if launched is None and supervisor.is_tpu_host(environment):
        return Peers("Cloud TPU", None, None, None, None)
    if launched is None and {"JOB_COMPLETION_INDEX", "KUBERNETES_SERVICE_HOST"} <= environment.keys():
        return Peers("Kubernetes", None, None, None, None)
    return Peers("JAX's cluster detection", None, None, None, local_rank) if config.multi_process else None


def _launched(environment: Mapping[str, str]) -> Launched | None:
    names = list(_LAUNCHERS)
    if "TORCHELASTIC_RUN_ID" in environment:  # torchrun itself, and not only its variables: it is the inner launcher
        names = ["torchrun"]
    for name in names:
        numbers = [environment.get(variable, "") for variable in _LAUNCHERS[name]]
        if name == "Slurm" and _RECOGNISED[name] not in environment:  # in the batch script, outside of srun
            continue
        if numbers[0].isdigit() and numbers[1].isdigit():
            return Launched(name, int(numbers[0]), int(numbers[1]), int(numbers[2] or numbers[0]))
    return None


def _at_coordinator(config: ProcessConfig, launched: Launched | None) -> Peers:
    assert config.coordinator is not None
    count, number = config.num_processes, config.process_id
    if launched is not None:
        count = launched.size if count is None else count
        number = launched.rank if number is None else number
    given = {"coordinator": config.coordinator, "num_processes": count, "process_id": number}
    if count is None or number is None:
        missing = next(name for name, value in given.items() if value is None)
        others = [f"mesh.{name}={value}" for name, value in given.items() if value is not None]
        raise ValueError(f"mesh.{missing}: must be given together with {' and '.join(others)}")
    if not 0 <= number < count:
        raise ValueError(f"mesh.process_id: must be in [0, mesh.num_processes={count}), got {number}")
    local_rank = None if launched is None else launched.local_rank
    return Peers("mesh.coordinator", config.coordinator, count, number, local_rank)


def _at_master(launched: Launched, environment: Mapping[str, str]) -> Peers:
    """Where torchrun's variables say. With its agent, torchrun itself uses that port, and JAX gets the next one."""
    host, port = environment.get("MASTER_ADDR"), environment.get("MASTER_PORT", "")
    if not host or not port.isdigit():
        raise ValueError(
            f"mesh.coordinator: must be given, as WORLD_SIZE={launched.size} is set without MASTER_ADDR and MASTER_PORT"
        )
    number = int(port)
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        number += 1 if number < 2**16 - 1 else -1
    return Peers("torchrun", f"{host}:{number}", launched.size, launched.rank, launched.local_rank)
