"""How processes find each other, from the settings and the variables of launchers."""

import pytest

from flowdit.joining import Peers, ProcessConfig, _local_devices, check_processes, find_peers

TORCHRUN = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "MASTER_ADDR": "host0", "MASTER_PORT": "29500"}
ELASTIC = {**TORCHRUN, "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True"}
SLURM = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "host[0-1]"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
HERE = ProcessConfig(coordinator="host0:1234")


@pytest.mark.parametrize(
    ("config", "environment", "expected"),
    [
        (ProcessConfig(), {}, None),
        (
            ProcessConfig(coordinator="host0:1234", num_processes=2, process_id=1),
            {},
            Peers("mesh.coordinator", "host0:1234", 2, 1, None),
        ),
        # The address is given, the numbers are the launcher's.
        (HERE, OPEN_MPI, Peers("mesh.coordinator", "host0:1234", 4, 3, 1)),
        (HERE, {"PMI_RANK": "1", "PMI_SIZE": "2"}, Peers("mesh.coordinator", "host0:1234", 2, 1, 1)),
        (ProcessConfig(), SLURM, Peers("Slurm", None, None, None, 1)),
        (ProcessConfig(), SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        # In the batch script, outside of srun, Slurm sets some variables too.
        (ProcessConfig(), {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, None),
        (ProcessConfig(multi_process=False), SLURM, None),
        (ProcessConfig(), OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "x"}, Peers("Open MPI", None, None, None, 1)),
        (ProcessConfig(), TORCHRUN, Peers("torchrun", "host0:29500", 4, 3, 1)),
        # torchrun's agent listens on its own port; within a Slurm job it is torchrun that has started the process.
        (ProcessConfig(), ELASTIC, Peers("torchrun", "host0:29501", 4, 3, 1)),
        (ProcessConfig(), SLURM | ELASTIC, Peers("torchrun", "host0:29501", 4, 3, 1)),
        (ProcessConfig(), TORCHRUN | {"WORLD_SIZE": "1", "RANK": "0"}, None),
        (
            ProcessConfig(),
            {"KUBERNETES_SERVICE_HOST": "a", "JOB_COMPLETION_INDEX": "0"},
            Peers("Kubernetes", None, None, None, None),
        ),
        (ProcessConfig(), {"KUBERNETES_SERVICE_HOST": "a"}, None),
        (
            ProcessConfig(),  # TPUs in Kubernetes
            {"KUBERNETES_SERVICE_HOST": "a", "JOB_COMPLETION_INDEX": "0", "TPU_WORKER_HOSTNAMES": "a,b"},
            Peers("Cloud TPU", None, None, None, None),
        ),
        (ProcessConfig(), {"TPU_WORKER_HOSTNAMES": "a,b"}, Peers("Cloud TPU", None, None, None, None)),
    ],
)
def test_where_processes_meet(config, environment, expected):
    check_processes(config)
    assert find_peers(config, environment) == expected


@pytest.mark.parametrize(
    ("config", "environment", "problem"),
    [
        (
            ProcessConfig(),
            OPEN_MPI,
            "mesh.coordinator: must be host:port of the first process, as Open MPI has started 4",
        ),
        (HERE, {}, "mesh.num_processes: must be given together with mesh.coordinator=host0:1234"),
        (
            ProcessConfig(coordinator="a:1", num_processes=2),
            {},
            "mesh.process_id: must be given together with mesh.coordinator=a:1 and mesh.num_processes=2",
        ),
        (ProcessConfig(), {"WORLD_SIZE": "2", "RANK": "0"}, "mesh.coordinator: must be given, as WORLD_SIZE=2 is set"),
    ],
)
def test_what_is_missing_is_named(config, environment, problem):
    with pytest.raises(ValueError, match=problem.replace("(", r"\(")):
        find_peers(config, environment)


@pytest.mark.parametrize(
    ("peers", "count", "expected"),
    [
        (Peers("mesh.coordinator", "a:1", 4, 3, 1), None, [1]),  # numbered on its host by a launcher
        (Peers("mesh.coordinator", "a:1", 4, 3, 1), 2, [2, 3]),
        (Peers("torchrun", "a:1", 4, 3, 1), None, [1]),
        (Peers("mesh.coordinator", "a:1", 2, 1, None), None, None),  # by hand: all of the host
        (Peers("mesh.coordinator", "a:1", 2, 1, None), 4, [4, 5, 6, 7]),
        (Peers("mesh.coordinator", "a:1", 4, 3, None), 4, [4, 5, 6, 7]),  # the second process of the second host
        (Peers("Slurm", None, None, None, 1), None, None),  # left to JAX: one
        (Peers("Slurm", None, None, None, 1), 4, [4, 5, 6, 7]),
        (Peers("Kubernetes", None, None, None, None), 8, [0, 1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_gpus_of_a_process_on_a_host_with_eight(peers, count, expected, monkeypatch):
    monkeypatch.setattr("glob.glob", lambda pattern: [f"/dev/nvidia{i}" for i in range(8)])
    assert _local_devices(peers, count) == expected
