"""Two processes with two devices each: training, and agreement on the checkpoint to resume."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from damage import flip_bit
from runs import FAST, Finished, error_line, finish, free_address, metrics, start, steps_of, train_here

from flowdit.checkpoint.files import CHECKSUMS, TEMPORARY_SUFFIX, verify_files

PAIR = """
import json, sys
from pathlib import Path
import jax
from flowdit import train
from flowdit.checkpoint import files
from flowdit.checkpoint.restore import restore_newest
from flowdit.training import loop, setup

cluster, folder, tasks = json.loads(sys.argv[1])
hashed = []
file_sha256 = files.file_sha256
files.file_sha256 = lambda file: (hashed.append(str(file)), file_sha256(file))[1]

def start_and_keep_layout(config, found):
    global layout
    run = setup.start_run(config, found)
    layout = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), run.state)
    return run

loop.start_run = start_and_keep_layout
for stage, *arguments in tasks:
    sys.argv = [stage, *arguments, *cluster]
    getattr(train, stage)()
    print("hashed", json.dumps(hashed), flush=True)
    hashed.clear()
for run in sorted(Path(folder).iterdir()):
    restored = restore_newest(run, layout, lambda meta: None, lambda names: {})
    print("restored", run.name, int(restored.state.step), flush=True)
"""


def run_pair(*tasks: tuple[str, ...], restore: Path) -> list[Finished]:
    """Run tasks one after another in two processes, then restore the newest checkpoints in `restore`."""
    address = free_address()
    cluster = [f"mesh.coordinator={address}", "mesh.num_processes=2"]
    processes = [
        start("-c", PAIR, json.dumps([[*cluster, f"mesh.process_id={i}"], str(restore), tasks]), devices=2)
        for i in (0, 1)
    ]
    try:
        return [finish(process) for process in processes]
    finally:
        for process in processes:
            process.kill()


def settings(stage: int, data: Path, run: Path, *more: str) -> tuple[str, ...]:
    experiment = {1: "tiny", 2: "tiny_text"}[stage]
    paths = (f"data.path={data}", f"train.checkpoint_dir={run}")
    return (f"stage{stage}", f"experiment={experiment}", *FAST, *paths, *more)


@pytest.fixture(scope="module")
def damaged_runs(whole_run, tmp_path_factory) -> Path:
    """A copy of the run with a flipped bit, for each file of the newest checkpoint."""
    folder = tmp_path_factory.mktemp("damaged")
    files = [path.relative_to(whole_run) for path in sorted((whole_run / "6").glob("*/**/*")) if path.is_file()]
    for i, file in enumerate([*files, Path("6/checksums.json")]):
        flip_bit(shutil.copytree(whole_run, folder / f"{i:02d}") / file)
    return folder


@pytest.fixture(scope="module")
def pair(tiny_data, damaged_runs, whole_run, tmp_path_factory) -> tuple[Path, list[Finished]]:
    """Results of two processes: both stages, a resume past a damaged checkpoint, and restores of the damaged runs."""
    folder = tmp_path_factory.mktemp("pair")
    shutil.copytree(whole_run, folder / "resumed")
    flip_bit(folder / "resumed" / "6" / "meta" / "metadata")
    finished = run_pair(
        settings(1, tiny_data, folder / "1", "mesh.fsdp=4", "train.sample_every=6", "train.validate_every=6"),
        settings(2, tiny_data, folder / "2"),
        settings(1, tiny_data, folder / "resumed", "train.is_restore=true"),
        restore=damaged_runs,
    )
    for process in finished:
        assert (process.status, unexpected(process.err)) == (0, []), process.out
    return folder, finished


def unexpected(err: str) -> list[str]:
    """Lines other than those that the restores of the damaged runs log, outside of a command and its handler."""
    return [line for line in err.splitlines() if not line.startswith("WARNING:flowdit.checkpoint.restore:")]


@pytest.mark.parametrize("stage", [1, 2])
def test_two_processes_have_the_losses_of_one(whole_run, whole_text_run, pair, stage):
    losses, expected = (
        metrics(r, "train/loss") for r in (pair[0] / str(stage), [whole_run, whole_text_run][stage - 1])
    )
    assert sorted(losses) == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose(list(losses.values()), list(expected.values()), rtol=1e-5)
    assert (pair[0] / "1" / "samples" / "00000006.png").is_file()


def test_console_and_log_are_the_first_process_s(pair):
    first, second = (process.out.splitlines() for process in pair[1])
    assert next(line for line in first if line.startswith("model: ")).endswith("'tensor': 1}")
    # Two threads may write Gloo's line in parts.
    own = ("[Gloo]", "restored", "hashed")
    assert [line for line in second if "peer ranks" not in line and not line.startswith(own)] == []


def hashed_in(process: Finished, step_folder: Path) -> list[list[str]]:
    """The files of a checkpoint that each task of a process has hashed."""
    lines = [line.removeprefix("hashed ") for line in process.out.splitlines() if line.startswith("hashed ")]
    files = [[file.replace(TEMPORARY_SUFFIX, "") for file in json.loads(line)] for line in lines]
    prefix = f"{step_folder}/"
    return [sorted(file.removeprefix(prefix) for file in some if file.startswith(prefix)) for some in files]


def test_processes_hash_what_they_have_written(pair):
    step_folder = pair[0] / "1" / "6"
    names = json.loads((step_folder / CHECKSUMS).read_text())
    theirs = sorted(name for name in names if "/ocdbt.process_1/" in name)
    assert hashed_in(pair[1][1], step_folder)[0] == theirs and len(theirs) > 2
    assert hashed_in(pair[1][0], step_folder)[0] == sorted(names.keys() - set(theirs))
    assert not list(step_folder.glob("checksums.*.json"))


def test_verifying_is_shared(whole_run, pair):
    # All read the settings in the newest metadata, before they join.
    arrays = [
        [name for name in hashed_in(process, pair[0] / "resumed" / "4")[2] if name[:4] != "meta"] for process in pair[1]
    ]
    names = json.loads((whole_run / "4" / CHECKSUMS).read_text())
    assert sorted([*arrays[0], *arrays[1]]) == sorted(name for name in names if name[:4] != "meta")
    sizes = [[(whole_run / "4" / name).stat().st_size for name in share] for share in arrays]
    shares, largest = [sum(share) for share in sizes], max(sizes[0] + sizes[1])
    assert max(shares) <= max(0.6 * sum(shares), largest)  # one file is read by one process


def test_checkpoint_of_two_processes_is_restored_in_one(tiny_data, pair, tmp_path):
    run = shutil.copytree(pair[0] / "1", tmp_path / "run")
    verify_files(run / "6")
    finished = train_here(tiny_data, run, "train.is_restore=true", "train.num_steps=7", "mesh.fsdp=1")
    assert (finished.status, finished.err) == (0, "")
    assert "changed since the checkpoint: mesh.fsdp: 4 -> 1" in finished.out
    assert "mesh.coordinator" not in finished.out
    assert steps_of(run) == [2, 4, 6, 7]


def test_resume_past_a_damaged_checkpoint(whole_run, pair):
    run = pair[0] / "resumed"
    assert f"resumed from {run / '4'}" in pair[1][0].out
    assert steps_of(run) == [2, 4, 6] and (run / "6.damaged").is_dir()
    losses, expected = (metrics(folder, "train/loss") for folder in (run, whole_run))
    np.testing.assert_allclose(list(losses.values()), list(expected.values()), rtol=1e-5)


def test_with_any_damaged_file_all_processes_restore_the_same_older_checkpoint(damaged_runs, pair):
    names = sorted(path.name for path in damaged_runs.iterdir())
    assert len(names) > 15
    for process in pair[1]:
        assert [line for line in process.out.splitlines() if line.startswith("restored")] == [
            f"restored {name} 4" for name in names
        ]
    for name in names:
        folders = sorted(path.name for path in (damaged_runs / name).iterdir() if path.is_dir())
        assert folders == ["2", "4", "6.damaged"]
        verify_files(damaged_runs / name / "4")


BAD_CLUSTERS = [
    (("mesh.coordinator=localhost:1",), "mesh.num_processes: must be given together with mesh.coordinator"),
    (
        ("mesh.num_processes=2", "mesh.process_id=0"),
        "mesh.coordinator: must be given together with mesh.num_processes=2",
    ),
    (
        ("mesh.coordinator=localhost", "mesh.num_processes=2", "mesh.process_id=0"),
        "mesh.coordinator: must be host:port",
    ),
    (("mesh.coordinator=a:99999", "mesh.num_processes=2", "mesh.process_id=0"), "mesh.coordinator: must be host:port"),
    (("mesh.coordinator=a:1", "mesh.num_processes=0", "mesh.process_id=0"), "mesh.num_processes: must be at least 1"),
    (("mesh.coordinator=a:1", "mesh.num_processes=2", "mesh.process_id=2"), "mesh.process_id: must be in [0, "),
    (("mesh.multi_process=true",), "mesh.multi_process: JAX's cluster detection cannot say where the processes are"),
]


@pytest.mark.parametrize(("given", "expected"), BAD_CLUSTERS, ids=[" ".join(given) for given, _ in BAD_CLUSTERS])
def test_processes_that_cannot_be_told_apart(tiny_data, tmp_path, given, expected):
    line = error_line(train_here(tiny_data, tmp_path / "run", *given))
    assert line.startswith(f"error: {expected}"), line
    assert not (tmp_path / "run").exists()
