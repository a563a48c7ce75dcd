"""`--multirun`: several runs by one command, in this process and in those of Hydra's submitit launcher."""

import signal

import pytest
from runs import REPOSITORY, call, finish, metrics, start, steps_of, wait_for_line

from flowdit.train import stage1

SCRIPT = str(REPOSITORY / "train_stage1.py")
TINY = ("experiment=tiny", "optim.warmup_steps=4", "train.validate_every=0", "train.sample_every=0")


def sweep(data, *overrides):
    folder = "train.checkpoint_dir=sweep/${hydra:job.num}"
    return ("--multirun", *TINY, f"data.path={data}", folder, *overrides)


def test_a_failing_job_ends_no_other_and_the_same_command_resumes(tiny_data, tmp_path):
    arguments = sweep(tiny_data, "optim.learning_rate=-1,2e-3", "train.is_restore=null")
    first, again = (call(stage1, *arguments, f"train.num_steps={steps}") for steps in (5, 6))
    for finished in (first, again):
        assert finished.status == 2
        errors = [line for line in finished.err.splitlines() if line.startswith("error: ")]
        assert set(errors) == {errors[-1]} and errors[-1].startswith("error: job 0: optim.learning_rate: must be ")
        assert "job 1: experiment=tiny" in finished.out
    assert "resumed" not in first.out and "resumed from sweep/1/5" in again.out
    assert steps_of(tmp_path / "sweep" / "1") == [4, 5, 6]
    assert metrics(tmp_path / "sweep" / "1", "train/learning_rate")[6] == pytest.approx(2e-3, rel=1e-5)


def test_a_sweep_without_folders_of_its_own_is_refused(tiny_data, tmp_path):
    finished = call(stage1, *sweep(tiny_data, "seed=1,2", "train.checkpoint_dir=runs"))
    assert (finished.status, finished.err) == (
        2,
        "error: train.checkpoint_dir: must differ between the jobs of --multirun, as in "
        "train.checkpoint_dir=sweep/${hydra:job.num}, got 'runs'\n",
    )
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_signal_ends_the_run_and_the_sweep_and_the_same_command_goes_on(tiny_data, tmp_path):
    arguments = sweep(tiny_data, "seed=1,2", "train.is_restore=null")
    process = start(SCRIPT, *arguments, "train.num_steps=2000", "train.save_every=0")
    wait_for_line(process, "step 10/2000")
    process.send_signal(signal.SIGTERM)
    finished = finish(process)
    assert (finished.status, finished.err) == (0, "")
    assert finished.out.splitlines()[-1].startswith("the sweep ends here")
    (step,) = steps_of(tmp_path / "sweep" / "0")
    assert not (tmp_path / "sweep" / "1").exists()
    again = call(stage1, *arguments, f"train.num_steps={step + 2}")
    assert (again.status, again.err) == (0, "")
    assert f"resumed from sweep/0/{step}" in again.out
    assert [steps_of(tmp_path / "sweep" / number)[-1] for number in "01"] == [step + 2, step + 2]


@pytest.mark.slow
def test_processes_of_submitit(tiny_data, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    arguments = sweep(tiny_data, "hydra/launcher=submitit_local", "optim.learning_rate=1e-3,-1,2e-3")
    finished = finish(start(SCRIPT, *arguments))
    assert finished.status == 2
    assert finished.err.splitlines()[-1].startswith("error: job 1: optim.learning_rate: must be ")
    assert steps_of(tmp_path / "sweep" / "0") == steps_of(tmp_path / "sweep" / "2") == [2, 4, 6]
    logs = [path.read_text() for path in (tmp_path / "multirun").rglob("*_log.out")]
    assert sum("step 6/6" in log for log in logs) == 2 and len(logs) == 3
    assert any("error: job 1: " in path.read_text() for path in (tmp_path / "multirun").rglob("*_log.err"))
