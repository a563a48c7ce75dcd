"""`scripts/gpu_check.sh`, on the CPU: a dry run of all parts, its budget, and workers that fail or end."""

import json
import os
import subprocess
import sys
import time

import jax
import pytest
from contenders import Counter
from runs import REPOSITORY

from benchmarks import gpu_check
from benchmarks.sizes import SIZES
from benchmarks.workers import Worker, WorkerFailed

HERE = {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])}


@pytest.fixture
def standard_promotion():
    """Of all threads: JAX's own gradient of its attention mixes bfloat16 with float32."""
    strict = jax.config.jax_numpy_dtype_promotion  # type: ignore[attr-defined]
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    yield
    jax.config.update("jax_numpy_dtype_promotion", strict)


PARTS = {"XL/2": "XL/2 training", "sampling": "XL/2 sampling, 25 guided steps"}


@pytest.mark.parametrize("name", ["XL/2", pytest.param("sampling", marks=pytest.mark.slow)])
def test_a_dry_run_has_figures_of_both(name, tmp_path, capsys, standard_promotion):
    pytest.importorskip("torch", reason="needs torch")  # diffusers' DiT beside flowdit's
    file = tmp_path / "check.json"
    assert gpu_check.main(["--dry-run", "--json", str(file), "--only", "attention", name]) == 0
    report, out = json.loads(file.read_text()), capsys.readouterr().out
    assert report["card"]["platform"] == "cpu" and report["card"]["versions"].keys() >= {"jax", "jaxlib", "torch"}
    assert "driver" in out and "attention by XLA (cuDNN needs an NVIDIA GPU, not cpu)" in out
    for row in report["attention"]:
        assert max(row["against_xla"].values()) == 0  # XLA with itself
        assert 0 < max(row["against_float32"].values()) < 0.02
    contenders = report[PARTS[name]]["contenders"]
    assert set(contenders) == {"flowdit", "diffusers in torch"} and contenders["flowdit"]["flops"] > 0
    for result in contenders.values():
        assert "problem" not in result and min(result["seconds"]) > 0
    assert "| diffusers in torch | 2 |" in out


@pytest.mark.slow
def test_the_script_makes_a_dry_run_of_all_parts(tmp_path):
    environment = os.environ | HERE | {"PYTHON": sys.executable}
    command = [REPOSITORY / "scripts" / "gpu_check.sh", "--dry-run", "--json", tmp_path / "check.json"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "| XL/2 training, Q/K norm, whole card |" in ended.stdout


def test_the_exit_status_says_that_a_contender_failed(tmp_path, monkeypatch):
    def sampling(check: gpu_check.Check) -> None:
        gpu_check.report(check, "XL/2 sampling", 2, {"flowdit": {"seconds": [], "problem": "MemoryError: too large"}})

    monkeypatch.setattr(gpu_check, "describe_card", lambda check: None)
    monkeypatch.setitem(gpu_check.PARTS, "sampling", (0, sampling))
    assert gpu_check.main(["--dry-run", "--json", str(tmp_path / "check.json"), "--only", "sampling"]) == 1


def test_what_has_no_time_left_is_skipped_with_a_line(tmp_path, capsys):
    assert gpu_check.main(["--dry-run", "--minutes", "0", "--json", str(tmp_path / "check.json")]) == 2
    assert "error: the time is used up" in capsys.readouterr().err


def test_without_a_gpu_one_line_says_so(tmp_path):
    environment = os.environ | HERE | {"JAX_PLATFORMS": "cpu", "PYTHON": sys.executable}
    command = [REPOSITORY / "scripts" / "gpu_check.sh", "--json", tmp_path / "check.json"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.splitlines()[-1] == "error: JAX finds no GPU but cpu; --dry-run tries the script on the CPU"


@pytest.mark.parametrize(("memory", "batches"), [(36e9, [128, 64, 16]), (72e9, [256, 128, 32]), (10e9, [64, 16, 1])])
def test_the_batch_follows_from_the_memory(memory, batches):
    assert [size.batch_size(memory) for size in SIZES.values()] == batches


# --- workers ---


@pytest.fixture
def other_processes(monkeypatch):
    """Processes that are started find `contenders`."""
    monkeypatch.setenv("PYTHONPATH", HERE["PYTHONPATH"])


def start(make: str, *arguments, inside: bool = False) -> Worker:
    return Worker(f"contenders:{make}", *arguments, environment={"FOR_THE_WORKER": "1"}, inside=inside)


@pytest.mark.parametrize("inside", [False, True])
def test_a_worker_answers_and_an_error_is_one_line(inside, other_processes, monkeypatch):
    monkeypatch.setenv("FOR_THE_WORKER", "0")
    with start("Counter", 3, inside=inside) as worker:
        assert worker.prepared(60) >= 0
        assert [worker.ask("add", 2, timeout=60) for _ in range(2)] == [5, 7]
        with pytest.raises(WorkerFailed, match=r"^ValueError: no plan$"):
            worker.ask("fail", timeout=60)
        assert worker.ask("add", 1, timeout=60) == 8
    with start("broken", inside=inside) as worker, pytest.raises(WorkerFailed, match=r"^MemoryError: too large$"):
        worker.prepared(60)


def test_a_process_that_ends_or_takes_too_long_ends_no_other(other_processes):
    with start("Counter", 0) as ending, start("Counter", 0) as sleeping:
        for worker in (ending, sleeping):
            worker.prepared(60)
        with pytest.raises(WorkerFailed, match="its process has ended"):
            ending.ask("end", timeout=60)
        with pytest.raises(WorkerFailed, match="the time is used up"):
            sleeping.ask("sleep", timeout=0.1)
        begin = time.monotonic()
    assert time.monotonic() - begin < 20  # it was killed, and not waited for


def test_a_contender_that_fails_is_left_out_and_the_other_goes_on(tmp_path, capsys, monkeypatch):
    check = gpu_check.Check(dry_run=True, end=time.monotonic() + 60, json_file=tmp_path / "check.json")
    monkeypatch.setattr(Counter, "run", lambda self: 0.5, raising=False)
    monkeypatch.setattr(Counter, "facts", lambda self: {"peak_memory": None, "flops": 10}, raising=False)
    contenders = {
        "flowdit": lambda: start("Counter", 0, inside=True),
        "diffusers in torch": lambda: start("broken", inside=True),
    }
    results = gpu_check.take_turns(check, contenders, rounds=2)
    assert results["flowdit"]["seconds"] == [0.5, 0.5]
    assert results["diffusers in torch"]["problem"] == "MemoryError: too large"
    gpu_check.report(check, "XL/2 training", 4, results)
    out = capsys.readouterr().out
    assert "XL/2 training, diffusers in torch: MemoryError: too large" in out and check.has_failed
    assert "| flowdit | 4 | 500 ms (500 to 500) | 8.0 (8.0 to 8.0) | unknown | unknown |  |" in out
