"""Post-hoc EMA in a run: the averages of the state, snapshots, resume, and weights of any width afterwards."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from damage import flip_bit
from runs import (
    FAST,
    REPOSITORY,
    assert_same_checkpoint,
    call,
    error_line,
    finish,
    free_address,
    start,
    steps_of,
    stored_arrays,
    stored_item,
    stored_json,
    train_here,
)

import flowdit
from flowdit import convert, sample
from flowdit.checkpoint.files import verify_files
from flowdit.interop.conversion import read_source
from flowdit.interop.metadata import ForeignConfig
from flowdit.power_ema import exponent

ON = ("train.ema_snapshot_every=1", "train.save_every=1", "train.num_steps=8", "optim.warmup_steps=0")
WEIGHT = "blocks.mlp.up.weight"


@pytest.fixture(scope="module")
def averaged_run(tiny_data, tmp_path_factory) -> Path:
    """A run with a snapshot and a checkpoint at each of its 8 steps. Tests that change it work on a copy."""
    run = tmp_path_factory.mktemp("averaged") / "run"
    done = train_here(tiny_data, run, *ON)
    assert (done.status, done.err) == (0, "")
    return run


def directly(run: Path, width: float, until: int) -> np.ndarray:
    """The average of one weight from the raw weights of every step."""
    weights = np.stack([stored_arrays(run / str(step))[f"state.model.{WEIGHT}"] for step in range(1, until + 1)])
    shares = np.diff((np.arange(until + 1) / until) ** (exponent(width) + 1))
    return np.tensordot(shares, weights.astype(np.float64), axes=1)


def of_width(source: Path, width: float) -> np.ndarray:
    return read_source(str(source), "ema", ForeignConfig(ema_width=width)).arrays[WEIGHT]


def test_averages_and_snapshots_are_those_of_the_weights(averaged_run):
    assert steps_of(averaged_run / "ema") == steps_of(averaged_run) == [*range(1, 9)]
    meta = stored_json(averaged_run / "ema" / "5", "meta")["averages"]
    assert meta == {"widths": [0.05, 0.1], "updates": 5, "since": 0}
    state = stored_arrays(averaged_run / "8")
    for i, width in enumerate((0.05, 0.1)):
        np.testing.assert_allclose(state[f"state.averages.{i}.{WEIGHT}"], directly(averaged_run, width, 8), atol=1e-6)


@pytest.mark.parametrize("width", [0.08, *(pytest.param(width, marks=pytest.mark.slow) for width in (0.05, 0.2))])
def test_any_width_equals_the_average_of_the_weights_of_all_steps(averaged_run, width):
    made, wanted = of_width(averaged_run, width), directly(averaged_run, width, 8)
    moved = np.abs(wanted - directly(averaged_run, 0.05, 1)).max()
    assert np.abs(made - wanted).max() < 0.05 * moved
    if width == 0.05:
        np.testing.assert_allclose(made, wanted, atol=1e-6)


@pytest.mark.slow
def test_commands_and_load_take_a_width(averaged_run, tmp_path):
    assert flowdit.load(str(averaged_run), ema_width=0.1).trained.step == 8
    settings = (f"checkpoint={averaged_run / '6'}", "ema_width=0.08", "steps=1", "num_images=1", "labels=[0]")
    done = call(sample.main, *settings, f"out={tmp_path / 'out'}")
    assert done.status == 0, done.err
    assert f"an average of width 0.08 from 5 snapshots and {averaged_run / '6'}; error of its profile" in done.out
    target = tmp_path / "wide.safetensors"
    done = call(convert.main, f"source={averaged_run}", f"target={target}", "ema_width=0.2")
    assert done.status == 0, done.err
    np.testing.assert_array_equal(read_source(str(target)).arrays[WEIGHT], of_width(averaged_run, 0.2))


@pytest.mark.slow
def test_a_damaged_snapshot_is_left_out(averaged_run, tmp_path, messages):
    run = shutil.copytree(averaged_run, tmp_path / "run")
    flip_bit(run / "ema" / "3" / "meta" / "metadata")
    assert np.abs(of_width(run, 0.08) - of_width(averaged_run, 0.08)).max() < 1e-3
    assert any(m.startswith(f"snapshot left out: {run / 'ema' / '3'}") for m in messages())


def test_what_cannot_be_made_is_one_line(averaged_run, whole_run, tmp_path):
    alone = shutil.copytree(averaged_run / "8", tmp_path / "8")

    def line(source, width):
        return error_line(call(sample.main, f"checkpoint={source}", f"ema_width={width}", "steps=1"))

    assert line(whole_run, 0.1) == (
        f"error: ema_width: {whole_run / '6'} has no power-function averages (train.ema_snapshot_every=0)"
    )
    assert line(averaged_run, 0.4).startswith("error: ema_width: must be above 0 and below 0.289, ")
    few = line(alone, 0.25)
    assert few.startswith(
        "error: ema_width: must be nearer to 0.05 and 0.1, or the run have more snapshots: an average "
    )
    assert "from 0 snapshots" in few and "100% off (limit 10%)" in few.replace("104%", "100%")
    raw = error_line(call(convert.main, f"source={averaged_run}", "target=x", "weights=model", "ema_width=0.1"))
    assert raw == "error: ema_width: must not be given with weights=model, got 0.1"


def test_a_resumed_run_writes_the_same_snapshots(averaged_run, tiny_data, tmp_path):
    """As if killed between the checkpoint and the snapshot of step 5, after later snapshots of another course."""
    run = shutil.copytree(averaged_run, tmp_path / "run")
    for step in (6, 7, 8):
        shutil.rmtree(run / str(step))
    shutil.rmtree(run / "ema" / "5")
    flip_bit(run / "ema" / "7" / "meta" / "metadata")
    done = train_here(tiny_data, run, *ON, "train.is_restore=true")
    assert (done.status, done.err) == (0, "")
    assert steps_of(run / "ema") == [*range(1, 9)]
    assert_same_checkpoint(run / "8", averaged_run / "8")
    for step in (5, 7):
        here, there = (read_snapshot(folder / "ema" / str(step)) for folder in (run, averaged_run))
        assert here.keys() == there.keys()
        for name, array in here.items():
            np.testing.assert_array_equal(array, there[name], err_msg=name)
    widths = error_line(train_here(tiny_data, run, *ON, "train.is_restore=true", "train.ema_widths=[0.05]"))
    assert widths == "error: train.ema_widths: must be [0.05, 0.1] as in the checkpoint to resume, got [0.05]"


def read_snapshot(folder: Path) -> dict[str, np.ndarray]:
    """The averages of an intact snapshot by name."""
    verify_files(folder)
    return stored_item(folder / "averages")


@pytest.mark.slow
def test_switching_it_on_and_off(whole_run, tiny_data, tmp_path):
    """A run without averages goes on with them from its weights of then, and again without."""
    run = shutil.copytree(whole_run, tmp_path / "run")
    done = train_here(tiny_data, run, "train.is_restore=true", *ON)
    assert "train.ema_snapshot_every: power-function averages start from the weights of step 6" in done.out
    assert stored_json(run / "8", "meta")["averages"] == {"widths": [0.05, 0.1], "updates": 8, "since": 6}
    weights = {step: stored_arrays(run / str(step))[f"state.model.{WEIGHT}"] for step in (6, 7, 8)}
    shares = np.diff((np.array([0, 6, 7, 8]) / 8) ** (exponent(0.1) + 1))
    wanted = sum(share * weights[step] for share, step in zip(shares, weights, strict=True))
    np.testing.assert_allclose(of_width(run, 0.1), wanted, atol=1e-6)
    done = train_here(tiny_data, run, "train.is_restore=true", "train.ema_snapshot_every=0", "train.num_steps=9")
    assert (done.status, done.err) == (0, "")
    assert not [name for name in stored_arrays(run / "9") if "averages" in name]
    assert "averages" not in stored_json(run / "9", "meta")


@pytest.mark.slow
def test_two_processes_write_what_one_does(tiny_data, tmp_path):
    """Snapshots and the best checkpoint, with weights that are split over the devices of both; also after a resume."""
    script = str(REPOSITORY / "train_stage1.py")
    one, two = tmp_path / "one", tmp_path / "two"
    tasks = (
        "train.validate_every=1",
        "train.keep_best=validation/loss",
        "train.keep_last=1",
        "train.ema_snapshot_every=2",
    )
    settings = (
        "experiment=tiny",
        *FAST,
        *tasks,
        "train.save_every=0",
        f"data.path={tiny_data}",
        "optim.warmup_steps=0",
    )
    done = finish(start(script, *settings, f"train.checkpoint_dir={one}"))
    assert done.status == 0, done.err
    for more in (("train.num_steps=4",), ("train.num_steps=6", "train.is_restore=true")):
        mesh = (f"mesh.coordinator={free_address()}", "mesh.num_processes=2", "mesh.fsdp=4")
        command = (script, *settings, f"train.checkpoint_dir={two}", *more, *mesh)
        pair = [start(*command, f"mesh.process_id={i}", devices=2) for i in (0, 1)]
        finished = [finish(process) for process in pair]
        assert [(process.status, process.err) for process in finished] == [(0, "")] * 2
    best, other = (json.loads((run / "best.json").read_text()) for run in (one, two))
    assert best["step"] == other["step"] and best["value"] == pytest.approx(other["value"], rel=1e-4)
    assert best["step"] in steps_of(two) and 6 in steps_of(two)
    assert steps_of(one / "ema") == steps_of(two / "ema") == [2, 4, 6]
    for step in (2, 4, 6):
        ours, theirs = (read_snapshot(run / "ema" / str(step)) for run in (one, two))
        assert ours.keys() == theirs.keys()
        for name, array in ours.items():
            np.testing.assert_allclose(theirs[name], array, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(of_width(two, 0.08), of_width(one, 0.08), atol=1e-5)
