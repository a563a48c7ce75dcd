"""`scripts/xla_flags.sh`: the compilers know the flags, and every file in launch/ sets them."""

import os
import re
import subprocess
import sys

import pytest
import yaml
from runs import REPOSITORY

SCRIPT = REPOSITORY / "scripts" / "xla_flags.sh"
LAUNCH = REPOSITORY / "launch"
TOPOLOGIES = {"v5e": "v5e:4x4", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
COMPILE = """
import sys
import jax
from jax.experimental import topologies
device = topologies.get_topology_desc(topology_name=sys.argv[1], platform="tpu").devices[0]
x = jax.ShapeDtypeStruct((128, 128), "float32", sharding=jax.sharding.SingleDeviceSharding(device))
jax.jit(lambda x: x @ x).lower(x).compile()
"""


def printed(kind: str) -> str:
    return subprocess.run([SCRIPT, kind], capture_output=True, text=True, check=True).stdout.strip()


def start_jax(flags: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"XLA_FLAGS": flags}
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_jax_starts_with_the_flags_for_gpus():
    """XLA reads all of its flags on any backend, and ends the process at the first that it does not know."""
    assert (ended := start_jax(printed("gpu"))).returncode == 0, ended.stderr
    ended = start_jax(printed("gpu") + " --xla_gpu_of_another_version=true")
    assert ended.returncode != 0 and "--xla_gpu_of_another_version" in ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", TOPOLOGIES)
def test_libtpu_compiles_with_the_flags(kind):
    pytest.importorskip("libtpu", reason="needs libtpu, the extra tpu")
    for flags, is_known in ((printed(kind), True), (printed(kind) + " --xla_tpu_of_another_version=true", False)):
        here = {"LIBTPU_INIT_ARGS": flags, "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
        command = [sys.executable, "-c", COMPILE, TOPOLOGIES[kind]]
        ended = subprocess.run(command, env=os.environ | here, capture_output=True, text=True)
        assert (ended.returncode == 0) is is_known, ended.stderr
        assert ("xla_tpu_of_another_version" in ended.stderr) is not is_known


@pytest.mark.parametrize(
    ("kind", "variable"), [("gpu", "XLA_FLAGS"), *((kind, "LIBTPU_INIT_ARGS") for kind in TOPOLOGIES)]
)
@pytest.mark.parametrize("given", [None, "--of-the-user=1"])
def test_sourced_it_sets_the_variable_and_the_user_s_flags_come_last(kind, variable, given):
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}
    environment |= {variable: given} if given else {}
    command = ["bash", "-euc", f'. {SCRIPT} {kind}; env | grep -E "^(XLA_FLAGS|LIBTPU_INIT_ARGS)="']
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert out == f"{variable}={' '.join(filter(None, [printed(kind), given]))}\n"


def test_another_kind_of_machine_is_one_line():
    ended = subprocess.run([SCRIPT, "v2"], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "xla_flags.sh: kind of machine: must be gpu, v5e, v5p or v6e, got 'v2'\n"


def test_every_flag_has_a_comment():
    lines = SCRIPT.read_text().splitlines()
    first = [i for i, line in enumerate(lines) if "echo --" in line and "echo --" not in lines[i - 1]]
    assert first and all(lines[i - 1].strip().startswith("#") for i in first)


@pytest.mark.parametrize(
    ("file", "kind", "variable"),
    [("jobset_gpu.yaml", "gpu", "XLA_FLAGS"), ("jobset_tpu.yaml", "v5e", "LIBTPU_INIT_ARGS")],
)
def test_pods_have_the_same_flags(file, kind, variable):
    (job,) = yaml.safe_load((LAUNCH / file).read_text())["spec"]["replicatedJobs"]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    assert {entry["name"]: entry["value"] for entry in container["env"]}[variable] == printed(kind)


@pytest.mark.parametrize("file", ["slurm.sh", "mpirun.sh", "skypilot.yaml"])
def test_the_other_files_source_it(file):
    assert re.search(r'^ *\. \S*.*scripts/xla_flags\.sh"? gpu', (LAUNCH / file).read_text(), re.MULTILINE)
