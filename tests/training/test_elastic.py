"""A run goes on with other numbers of processes and devices: the same records in the same order, and equal losses."""

import signal

import numpy as np
import pytest
from layouts import ORDER, Layout, assert_every_record_once, recorded, task, train_on
from runs import NUM_STEPS, metrics, steps_of

ONE = Layout(1, 4)
TWO = Layout(2, 2)
FOUR = Layout(4, 1)
FSDP = ("mesh.fsdp=4",)
OTHER_LOADER = ("data.num_threads=1", "data.prefetch=1")
TERM, KILL = signal.SIGTERM, signal.SIGKILL

CASES = {
    "2 to 1 process": (1, TWO, ONE, TERM),
    "1 to 2 processes": (1, ONE, TWO, TERM),
    "2 to 4 processes": (1, TWO, FOUR, TERM),
    "4 devices to 1": (1, ONE, Layout(1, 1), TERM),
    "fsdp to data": (1, TWO._replace(settings=FSDP), Layout(1, 4, ("mesh.fsdp=1",)), TERM),
    "data to fsdp, another loader": (1, TWO, Layout(2, 2, (*FSDP, *OTHER_LOADER)), TERM),
    "2 to 1 process, killed": (1, TWO, ONE, KILL),
    "1 to 4 processes, killed": (1, ONE, FOUR, KILL),
    "2 micro-batches": (1, TWO, Layout(1, 2, ("train.gradient_accum=2",)), TERM),
    "text, 2 to 1 process": (2, TWO, ONE, TERM),
    "text, 1 to 2 processes, killed": (2, ONE, TWO, KILL),
    "text, 2 to 4 processes": (2, TWO, FOUR, TERM),
    "text, fsdp to data on 1 device": (2, TWO._replace(settings=FSDP), Layout(1, 1, ("mesh.fsdp=1",)), TERM),
    "text, 4 micro-batches, another loader": (2, ONE, Layout(2, 1, ("train.gradient_accum=4", *OTHER_LOADER)), TERM),
}


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "first", "second", "number"), CASES.values(), ids=CASES.keys())
def test_a_run_goes_on_in_another_layout(request, tiny_data, tmp_path, stage, first, second, number):
    whole = request.getfixturevalue({1: "whole_run", 2: "whole_text_run"}[stage])
    run, stop = tmp_path / "run", 3 if number == TERM else 5
    command = task(stage, tiny_data, run)
    before = train_on(first, command, stop=(stop, number), stopped=first.processes - 1)
    expected = 0 if number == TERM else 75
    assert [process.status for process in before[:-1]] == [expected] * (first.processes - 1), before[0].err
    assert before[-1].status == (0 if number == TERM else -KILL), before[-1].err
    reached = steps_of(run)[-1]
    assert 2 <= reached < NUM_STEPS

    after = train_on(second, (*command, "train.is_restore=true"))
    assert [process.status for process in after] == [0] * second.processes, after[0].err
    seen = recorded(tiny_data, before, run)
    again = recorded(tiny_data, after, run)
    assert min(again) == reached + 1
    rows = {step: seen[step] for step in seen if step <= reached} | again
    assert_every_record_once(rows)
    assert rows == ORDER[stage]
    losses, expected = metrics(run, "train/loss"), metrics(whole, "train/loss")
    assert sorted(losses) == sorted(expected) == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose([losses[i] for i in expected], list(expected.values()), rtol=1e-5)


MESHES = {
    "data": (),
    "fsdp": FSDP,
    "data x fsdp": ("mesh.fsdp=2",),
    "data x tensor": ("mesh.tensor=2",),
    "fsdp x tensor": ("mesh.fsdp=2", "mesh.tensor=2"),
}
TEN_STEPS = ("train.num_steps=10", "train.save_every=0")


@pytest.mark.slow
@pytest.mark.parametrize("layout", [TWO, FOUR], ids=["2 processes", "4 processes"])
@pytest.mark.parametrize("stage", [1, 2])
def test_ten_steps_have_the_losses_of_one_process(tiny_data, tmp_path, stage, layout):
    alone = tmp_path / "alone"
    assert [process.status for process in train_on(Layout(1, 1), task(stage, tiny_data, alone, *TEN_STEPS))] == [0]
    expected = metrics(alone, "train/loss")
    assert sorted(expected) == list(range(1, 11))
    for name, mesh in MESHES.items():
        run = tmp_path / name.replace(" ", "_")
        finished = train_on(layout, task(stage, tiny_data, run, *TEN_STEPS, *mesh))
        assert [process.status for process in finished] == [0] * layout.processes, finished[0].err
        losses = metrics(run, "train/loss")
        assert losses.keys() == expected.keys()
        np.testing.assert_allclose(list(losses.values()), list(expected.values()), rtol=1e-5, err_msg=name)
        assert {step: rows for step, rows in recorded(tiny_data, finished, run).items() if step <= 6} == ORDER[stage]
