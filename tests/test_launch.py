"""The files in launch/: their syntax, what they do on each exit status, and real runs with the launchers there are.

Slurm and gcloud are small programs that are called as the real ones and do what those are documented to do.
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_module
from jax.sharding import AbstractMesh
from jsonschema import Draft202012Validator
from runs import REPOSITORY, metrics, steps_of

from flowdit.config import Config, register_schemas, resolve
from flowdit.overrides import for_hydra
from flowdit.settings import settings_of
from flowdit.sharding import AXES, batch_shards, check_batch_size, mesh_shape

LAUNCH = REPOSITORY / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *(REPOSITORY / "scripts").glob("*.sh")])
JOBSETS = sorted(LAUNCH.glob("jobset_*.yaml"))
# The fields that are used, of jobset.x-k8s.io/v1alpha2 and of Kubernetes' batch/v1 and v1; no others are allowed.
SCHEMA = json.loads((Path(__file__).parent / "jobset_schema.json").read_text())
BIN = str(Path(sys.executable).parent)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_have_no_errors(script):
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)
    checker = shutil.which("shellcheck", path=f"{BIN}{os.pathsep}{os.environ['PATH']}")
    assert checker is not None, "the test extra brings it"
    checked = subprocess.run([checker, script], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("file", JOBSETS, ids=lambda path: path.name)
def test_jobsets_fit_their_schema(file):
    jobset = yaml.safe_load(file.read_text())
    errors = [error.message for error in Draft202012Validator(SCHEMA).iter_errors(jobset)]
    assert errors == []
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert spec["parallelism"] == spec["completions"]
    assert spec["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [1, 2]
    (container,) = spec["template"]["spec"]["containers"]
    settings = dict(argument.partition("=")[::2] for argument in container["command"] if "=" in argument)
    if coordinator := settings.get("mesh.coordinator"):
        name = jobset["metadata"]["name"]
        assert coordinator.startswith(f"{name}-{job['name']}-0-0.{name}:")  # the first pod's name in the network
        assert settings["mesh.num_processes"] == str(spec["parallelism"])


def test_the_schema_refuses_a_misplaced_field():
    jobset = yaml.safe_load(JOBSETS[0].read_text())
    jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["restartPolicy"] = "Never"
    assert not Draft202012Validator(SCHEMA).is_valid(jobset)


def command_of(file: Path) -> list[str]:
    """The training command of a file in launch/, as it is written."""
    text = file.read_text()
    if file.suffix == ".sh":
        (command,) = re.findall(r"^RUN=\((.*?)^\)", text, re.MULTILINE | re.DOTALL)
    elif file.name == "skypilot.yaml":
        lines = yaml.safe_load(text)["run"].replace("\\\n", " ").splitlines()
        (command,) = (line for line in lines if line.startswith("flowdit "))
    else:
        (job,) = yaml.safe_load(text)["spec"]["replicatedJobs"]
        return job["template"]["spec"]["template"]["spec"]["containers"][0]["command"]
    return shlex.split(command, comments=True)


RUNNING = [path for path in LAUNCH.iterdir() if path.name not in ("again.sh", "Dockerfile")]


@pytest.mark.parametrize("file", RUNNING, ids=lambda path: path.name)
def test_the_settings_of_every_file_compose(file):
    program, name, *arguments = command_of(file)
    assert (program, name) == ("flowdit", "train-stage1")
    values = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "JOB_COMPLETION_INDEX": "3"}
    given = [re.sub(r"\$\(?(\w+)\)?", lambda name: values.get(name[1], "x"), argument) for argument in arguments]
    register_schemas()
    with initialize_config_module("flowdit.configs", version_base="1.3"):
        config = resolve(compose("config", for_hydra(given, settings_of(Config))), Config)
    config.check()
    assert {"is_restore=null", "requeue=true"} <= set(re.findall(r"train\.(\w+=\w+)", file.read_text()))


PAGE = (REPOSITORY / "docs" / "scaling.md").read_text()
ROW = r"^\| .*? \| (\d+) \| (.*?) \| (\d+)\b.*? \| (\d+) \| (\d+) x (\d+) \|"
MACHINES = re.findall(ROW, PAGE, re.MULTILINE)


@pytest.mark.parametrize(("devices", "settings", "images", "batch", "data", "fsdp"), MACHINES)
def test_the_settings_by_machine_divide_evenly(devices, settings, images, batch, data, fsdp):
    register_schemas()
    arguments = ["experiment=imagenet256_xl2", *(settings.strip("`").split() if "=" in settings else ())]
    with initialize_config_module("flowdit.configs", version_base="1.3"):
        config = resolve(compose("config", for_hydra(arguments, settings_of(Config))), Config)
    config.check()
    shape = mesh_shape(config.mesh, int(devices))
    assert shape == (int(data), int(fsdp), 1) and config.train.batch_size == int(batch)
    train, mesh = config.train, AbstractMesh(shape, AXES)
    check_batch_size(mesh, train.batch_size, train.gradient_accum)
    assert train.batch_size // train.gradient_accum // batch_shards(mesh) == int(images)
    assert config.model.hidden_dim % config.mesh.fsdp == 0  # the parameters are split


def test_every_kind_of_machine_has_settings():
    assert [int(devices) for devices, *_ in MACHINES] == [1, 8, 32, 16, 256]


def test_skypilot_s_file_has_its_structure():
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert task.keys() == {"name", "num_nodes", "resources", "workdir", "envs", "setup", "run"}
    assert task["resources"]["job_recovery"] == {"recover_on_exit_codes": [75]}
    for script in (task["setup"], task["run"]):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def install(folder: Path, name: str, code: str) -> None:
    """A program of this name, in Python."""
    folder.mkdir(exist_ok=True)
    program = folder / name
    program.write_text(f"#!{sys.executable}\n{code}")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)


# Ends with the next of the statuses in the file.
ENDING = """
import os, sys
path = os.environ["STATUSES"]
first, *rest = open(path).read().split()
open(path, "w").write(" ".join(rest))
print("run with", *sys.argv[1:], flush=True)
if first == "KILL":
    os.kill(os.getpid(), 9)
sys.exit(int(first))
"""


def start_script(
    tmp_path: Path, *command: object, stop_at: str = "", kill_at: str = "", **environment: str
) -> subprocess.CompletedProcess:
    """Run a command with the programs in `bin` first; its children end with it.

    The first line that begins with `stop_at` is answered by SIGTERM, one with `kill_at` by the kill of a process.
    """
    if (statuses := tmp_path / "statuses").exists():
        install(tmp_path / "bin", "flowdit", ENDING)
    one_device = " ".join(flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag)
    paths = {
        "PATH": os.pathsep.join([str(tmp_path / "bin"), BIN, os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])),
    }
    inherited = {**os.environ, **paths, "XLA_FLAGS": one_device, "STATUSES": str(statuses), "PAUSE": "0"}
    process = subprocess.Popen(
        [str(part) for part in command],
        env=inherited | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None and process.stderr is not None
    lines = []
    try:
        for line in process.stdout:
            lines.append(line)
            if stop_at and line.startswith(stop_at):
                process.terminate()
            elif kill_at and line.startswith(kill_at):
                kill_at = ""
                os.kill(int(Path(environment["PID_FILE"]).read_text()), signal.SIGKILL)
        errors = process.stderr.read()
        return subprocess.CompletedProcess(process.args, process.wait(60), "".join(lines), errors)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("statuses", "final", "runs"),
    [("75 KILL 0", 0, 3), ("9 143 0", 0, 3), ("2 0", 2, 1), ("1 0", 1, 1), ("75 75 75 75", 75, 3)],
)
def test_a_command_is_started_again_after_75_and_kills_alone(tmp_path, statuses, final, runs):
    (tmp_path / "statuses").write_text(statuses)
    ended = start_script(tmp_path, LAUNCH / "again.sh", "flowdit", MAX_RESTARTS="2")
    assert (ended.returncode, ended.stdout.count("run with")) == (final, runs)


def test_a_command_is_not_started_again_after_a_signal_in_the_pause(tmp_path):
    file, again = tmp_path / "pid", shlex.quote(str(LAUNCH / "again.sh"))
    script = f"exec {again} bash -c 'echo $$ >$PID_FILE; echo run; exit 75' 2>&1"
    environment = {"PAUSE": "1", "PID_FILE": str(file), "MAX_RESTARTS": "1"}
    ended = start_script(tmp_path, "bash", "-c", script, stop_at="again.sh: status 75", **environment)
    assert ended.returncode == 75 and ended.stdout.count("run\n") == 1 and "kill" not in ended.stdout
    assert not file.exists()


@pytest.mark.parametrize(("status", "final"), [("0", 0), ("75", 75), ("KILL", 75), ("143", 75), ("2", 2), ("1", 1)])
def test_skypilot_sees_75_after_a_kill(tmp_path, status, final):
    (tmp_path / "statuses").write_text(status)
    script = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())["run"].replace("~/venv/bin", str(tmp_path / "bin"))
    command = ["bash", "-c", f"cd {shlex.quote(str(REPOSITORY))}\n{script}"]  # SkyPilot's `workdir`
    ended = start_script(tmp_path, *command)
    assert ended.returncode == final and "xla_flags" not in ended.stderr


# Starts the tasks of a job step as Slurm does, on this machine, and returns the highest of their statuses. With
# SIGNAL_AT, the beginning of a line, all get SIGTERM after it, as before the time limit of the job.
SRUN = """
import os, signal, subprocess, sys
command = sys.argv[1:]
assert "--cpus-per-task=" + os.environ["SLURM_CPUS_PER_TASK"] in command
while command[0].startswith("--"):
    del command[0]
count = int(os.environ["SLURM_NTASKS"])
step = {"SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_ID": "0"}
tasks = []
for i in range(count):
    task = {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}
    tasks.append(subprocess.Popen(command, env=os.environ | step | task, stdout=subprocess.PIPE, text=True))
for line in tasks[0].stdout:
    print(line, end="", flush=True)
    if os.environ.get("SIGNAL_AT") and line.startswith(os.environ["SIGNAL_AT"]):
        for task in tasks:
            task.send_signal(signal.SIGTERM)
statuses = [task.wait() for task in tasks]
sys.exit(max(128 - status if status < 0 else status for status in statuses))
"""
SCONTROL = """
import os, sys
assert sys.argv[1:] == ["requeue", os.environ["SLURM_JOB_ID"]], sys.argv
open(os.environ["REQUEUED"], "w").close()
"""


def sbatch(tmp_path: Path, *settings: str, run: str = "flowdit", tasks: int = 1, **environment: str) -> list:
    """Run slurm.sh with other settings in RUN as Slurm does, and again when it is queued again; the finished starts."""
    for name, code in {"srun": SRUN, "scontrol": SCONTROL}.items():
        install(tmp_path / "bin", name, code)
    text = (LAUNCH / "slurm.sh").read_text()
    script = tmp_path / "slurm.sh"
    script.write_text(re.sub(r"^RUN=\(.*?^\)", f"RUN=({run})", text, flags=re.MULTILINE | re.DOTALL))
    queued, starts = tmp_path / "requeued", []
    while not starts or queued.exists():
        queued.unlink(missing_ok=True)
        job = {"SLURM_JOB_ID": "4242", "SLURM_NTASKS": str(tasks), "SLURM_RESTART_COUNT": str(len(starts))}
        job |= {"SLURM_CPUS_PER_TASK": "8", "SLURM_SUBMIT_DIR": str(REPOSITORY)}
        starts.append(start_script(tmp_path, "bash", script, *settings, **job, REQUEUED=str(queued), **environment))
        environment.pop("SIGNAL_AT", None)
    return starts


@pytest.mark.parametrize(("statuses", "count"), [("75 KILL 0", 3), ("2 0", 1), ("1 0", 1)])
def test_slurm_queues_a_job_again_after_75_and_kills_alone(tmp_path, statuses, count):
    (tmp_path / "statuses").write_text(statuses)
    starts = sbatch(tmp_path, "seed=1", SLURM_GPUS_ON_NODE="8", SLURM_NTASKS_PER_NODE="2")
    assert len(starts) == count
    assert str(starts[-1].returncode) == statuses.split()[count - 1]
    assert "run with train.is_restore=null train.requeue=true mesh.devices_per_process=4 seed=1" in starts[0].stdout


def test_slurm_does_not_queue_a_job_without_end(tmp_path):
    (tmp_path / "statuses").write_text("75 75 75 75")
    assert len(sbatch(tmp_path, MAX_RESTARTS="2")) == 3


# Answers as gcloud: with the next of the answers to the kind of call; one that begins with ERROR is a failure.
GCLOUD = """
import json, os, re, sys
path, line = os.environ["ANSWERS"], " ".join(sys.argv[1:])
(kind,) = re.findall("describe|create|delete|scp|uv venv|uv pip|systemd-run|ExecMainStatus", line)[:1]
answers = json.load(open(path))
answers["calls"].append([kind, line])
answer = answers[kind].pop(0) if answers.get(kind) else ""
json.dump(answers, open(path, "w"))
sys.exit(answer) if answer.startswith("ERROR") else print(answer)
"""
STARTING = ["uv venv", "scp", "uv pip", "systemd-run"]


def run_tpu_pod(tmp_path: Path, *units: str, **answers: list[str]) -> tuple[subprocess.CompletedProcess, dict, list]:
    """Run tpu_pod.sh with these answers, `units` to the question for the units; its calls by kind, and their order."""
    install(tmp_path / "bin", "gcloud", GCLOUD)
    path = tmp_path / "answers"
    states = {"describe": ["ACTIVE"] * len(units)}
    path.write_text(json.dumps({"calls": [], "ExecMainStatus": units} | states | answers))
    ended = start_script(tmp_path, LAUNCH / "tpu_pod.sh", ANSWERS=str(path), POLL="0")
    calls = json.loads(path.read_text())["calls"]
    return ended, dict(calls), [kind for kind, _ in calls if kind not in ("describe", "ExecMainStatus")]


DEAD = "unit dead 0\nunit dead 0"
RUNNING = "unit running 0\nunit auto-restart 75"
COMPLETE = "unit exited 0\nunit exited 0"


def test_a_preempted_slice_is_made_again(tmp_path):
    states = ["ERROR: NOT_FOUND: was not found", "WAITING_FOR_RESOURCES", *["ACTIVE"] * 3, "SUSPENDED", "DELETING"]
    states += ["ERROR: NOT_FOUND: was not found", *["ACTIVE"] * 2]
    ended, last, calls = run_tpu_pod(tmp_path, DEAD, RUNNING, RUNNING, DEAD, COMPLETE, describe=states)
    assert (ended.returncode, ended.stderr) == (0, "") and "the run is complete" in ended.stdout
    assert calls == ["create", *STARTING, "delete", "create", *STARTING]
    flags = subprocess.run(
        [REPOSITORY / "scripts" / "xla_flags.sh", "v5e"], capture_output=True, text=True
    ).stdout.strip()
    assert f"--setenv=LIBTPU_INIT_ARGS='{flags}' " in last["systemd-run"]
    command = last["systemd-run"].partition("TimeoutStopSec=600 ")[2]
    assert command.startswith("$HOME/venv/bin/flowdit train-stage1 ") and "train.requeue=true" in command


def test_an_answer_of_gcloud_that_is_an_error_changes_nothing(tmp_path):
    states = ["ERROR: UNAVAILABLE", *["ERROR: NOT_FOUND"] * 2, *["SUSPENDED"] * 2, "ERROR: NOT_FOUND", *["ACTIVE"] * 4]
    failing = {"create": ["ERROR: quota", ""], "delete": ["ERROR: UNAVAILABLE"], "scp": ["ERROR: no host"]}
    ended, _, calls = run_tpu_pod(tmp_path, DEAD, DEAD, "ERROR: no host", COMPLETE, describe=states, **failing)
    assert ended.returncode == 0
    assert calls == ["create", "create", "delete", "delete", "create", *STARTING[:2], *STARTING]
    for line in ("ERROR: UNAVAILABLE", "no slice was created; again", "the slice was not deleted; again"):
        assert line in ended.stderr


@pytest.mark.parametrize(
    ("units", "status", "starts"),
    [
        ([RUNNING, COMPLETE], 0, 0),  # the script is started again: nothing is installed beside running processes
        ([DEAD, RUNNING, "unit dead 0\nunit running 0", RUNNING, COMPLETE], 0, 2),  # the first host was booted
        ([DEAD, "", "unit running 0\nunit failed 2"], 2, 1),
        (["unit failed 2\nunit failed 2", RUNNING, "unit failed 75\nunit failed 75"], 75, 1),
    ],
)
def test_the_units_are_started_where_they_are_not_known(tmp_path, units, status, starts):
    ended, _, calls = run_tpu_pod(tmp_path, *units)
    assert (ended.returncode, ended.stderr) == (status, "") and calls == STARTING * starts


def tiny(data: Path, run: str, steps: int) -> str:
    text = f"flowdit train-stage1 experiment=tiny data.path={data} train.checkpoint_dir={run} train.num_steps={steps}"
    return f"{text} train.validate_every=0 train.sample_every=0 train.save_every=0 mesh.heartbeat_timeout=60"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.slow
def test_a_job_of_slurm_is_stopped_by_its_limit_and_completes_when_it_is_queued_again(tiny_data, tmp_path):
    environment = {"SIGNAL_AT": "step 3/", "JAX_COORDINATOR_PORT": str(free_port())}
    first, second = sbatch(tmp_path, run=tiny(tiny_data, "run", 300), tasks=2, **environment)
    assert (first.returncode, second.returncode) == (75, 0), (first.stderr, second.stderr)
    assert "2 processes, found by Slurm" in first.stdout and "mesh {'data': 2," in first.stdout
    assert "stopped by signal" in first.stdout and "resumed from run/" in second.stdout
    assert steps_of(tmp_path / "run")[-1] == 300
    assert metrics(tmp_path / "run", "train/loss").keys() == set(range(1, 301))


@pytest.mark.slow
def test_mpirun_starts_processes_that_stop_with_a_save_and_go_on(tiny_data, tmp_path):
    script = tmp_path / "launch" / "mpirun.sh"
    script.parent.mkdir()
    shutil.copytree(REPOSITORY / "scripts", tmp_path / "scripts")
    command = tiny(tiny_data, "run", 300)
    text = (LAUNCH / "mpirun.sh").read_text()
    script.write_text(re.sub(r"^RUN=\(.*?^\)", f"RUN=({command})", text, flags=re.MULTILINE | re.DOTALL))
    shutil.copy(LAUNCH / "again.sh", script.parent)
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "DEVICES_PER_PROCESS": "1"}
    environment = root | {"PORT": str(free_port()), "PID_FILE": str(tmp_path / "pid")}
    first = start_script(tmp_path, "bash", script, stop_at="step 3/", **environment)
    assert first.returncode == 75 and "stopped by signal" in first.stdout, first.stderr
    second = start_script(tmp_path, "bash", script, kill_at="step 2", **environment)
    assert second.returncode == 0 and "again.sh: status " in second.stderr, second.stderr
    assert steps_of(tmp_path / "run")[-1] == 300 and not (tmp_path / "pid").exists()


@pytest.mark.slow
def test_torchrun_starts_the_processes(tiny_data, tmp_path):
    pytest.importorskip("torch", reason="needs torch")
    torchrun = shutil.which("torchrun", path=BIN)
    arguments = tiny(tiny_data, "run", 4).split()[2:]
    ended = start_script(tmp_path, torchrun, "--nproc-per-node=2", REPOSITORY / "train_stage1.py", *arguments)
    assert ended.returncode == 0, ended.stderr
    assert "2 processes, found by torchrun" in ended.stdout and steps_of(tmp_path / "run") == [4]
