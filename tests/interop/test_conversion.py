"""What a source and a target may be: run folders, and the format by the suffix of the target."""

import shutil
from pathlib import Path

import pytest
from damage import damage_weights
from interop.foreign_folders import refused
from interop.small_models import DEFAULT_CLASS, random_model, saved
from PIL import Image
from runs import call, error_line

from flowdit.checkpoint import files
from flowdit.convert import main as convert
from flowdit.hashing import file_sha256
from flowdit.interop import read_source
from flowdit.sample import main as sample


def last_line(*settings: str) -> str:
    finished = call(convert, *settings)
    assert finished.status == 0, finished.err
    return finished.out.splitlines()[-1]


@pytest.mark.parametrize(
    ("target", "options", "written"),
    [
        ("x.safetensors", (), "safetensors"),
        ("x.safetensors", ("to=safetensors",), "safetensors"),
        ("x", (), "checkpoint"),
        ("x", ("to=checkpoint",), "checkpoint"),
        ("x.1", ("to=diffusers", "own_class=true", "image=none"), "diffusers"),
    ],
)
def test_the_suffix_of_the_target_decides_and_samples_are_drawn_from_all(meta, tmp_path, target, options, written):
    source = saved(random_model(meta, DEFAULT_CLASS), tmp_path / "source.safetensors")
    line = last_line(f"source={source}", f"target={target}", *options)
    assert line == f"written: {target} ({written}, 0.1 M parameters, float32)"
    assert Path(target).is_file() == (written == "safetensors")
    finished = call(sample, f"checkpoint={target}", "labels=[1]", "steps=1", "guidance=1", "out=samples")
    assert finished.status == 0, finished.err
    assert Image.open("samples/0000_dog.png").size == (64, 64)


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("x.safetensors", "to=checkpoint", "must not end in .safetensors with to=checkpoint, got 'x.safetensors'"),
        ("x.safetensors", "to=diffusers", "must not end in .safetensors with to=diffusers, got 'x.safetensors'"),
        ("x", "to=safetensors", "must end in .safetensors with to=safetensors, got 'x'"),
    ],
)
def test_a_suffix_that_contradicts_the_format(target, options, message):
    line = error_line(call(convert, "source=anything", f"target={target}", options))
    assert line == f"error: target: {message}"


def test_a_run_folder_is_its_newest_intact_step(whole_run, tmp_path):
    run = shutil.copytree(whole_run, tmp_path / "runs" / "run")
    damage_weights(run / "6")
    finished = call(convert, f"source={run}", "target=x.safetensors")
    assert finished.status == 0, finished.err
    skipped, chosen = finished.out.splitlines()[:2]
    assert skipped.startswith(f"warning: checkpoint {run / '6'} is damaged and skipped: ")
    assert chosen == f"{run / '4'}: the newest intact checkpoint of the run"
    assert read_source("x.safetensors").meta.step == 4
    finished = call(sample, f"checkpoint={run}", "labels=[1]", "steps=1", "out=samples")
    assert finished.status == 0, finished.err
    assert f"{run / '4'}: the newest intact checkpoint of the run\n" in finished.out


def test_files_of_a_run_folder_are_hashed_once(whole_run, monkeypatch):
    hashed = []
    monkeypatch.setattr(files, "file_sha256", lambda path: hashed.append(path) or file_sha256(path))
    step = read_source(str(whole_run)).meta.step
    once = sorted(hashed)
    hashed.clear()
    read_source(str(whole_run / str(step)))
    assert once == sorted(hashed) and len(set(once)) == len(once) > 0


def test_a_folder_of_runs_is_refused_with_their_names(whole_run, tmp_path):
    runs = tmp_path / "runs"
    for name in ("one", "two"):
        shutil.copytree(whole_run, runs / name)
    found = f"it holds the run folders {runs / 'one'} (newest step 6), {runs / 'two'} (newest step 6)"
    line = refused(runs)
    assert line.startswith(f"error: source: {runs}: must be a checkpoint") and line.endswith(found)
    line = error_line(call(sample, f"checkpoint={runs}"))
    assert line.startswith(f"error: checkpoint: {runs}: must be a checkpoint") and line.endswith(found)


def test_a_diffusers_folder_without_its_config(stock, tmp_path):
    for folder in (tmp_path / "dit", tmp_path / "pipeline" / "transformer"):
        shutil.copytree(stock / "dit", folder)
        (folder / "config.json").unlink()
    assert refused(tmp_path / "dit") == (
        f"error: source: {tmp_path / 'dit' / 'config.json'} is missing: diffusers writes it next to the weights"
    )
    line = refused(tmp_path / "pipeline")
    missing = tmp_path / "pipeline" / "transformer" / "config.json"
    assert line == f"error: source: {missing} is missing: diffusers writes it next to the weights"


def test_a_folder_of_exports_is_refused_with_their_names(stock, tmp_path):
    models = tmp_path / "models"
    for name in ("dit", "pixart"):
        shutil.copytree(stock / name, models / name)
    shutil.copytree(stock / "dit", models / "deeper" / "dit")  # is not searched
    (models / "deeper" / "dit" / "config.json").unlink()
    assert refused(models).endswith(f", it holds the model folders {models / 'dit'}, {models / 'pixart'}")
    for name in ("dit", "pixart"):
        shutil.rmtree(models / name)
    assert refused(models).endswith(", it holds deeper")


def test_sub_folders_that_cannot_be_read_do_not_hide_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_INSPECTED", 3)
    for name in ("a", "b", "c", "d"):
        (tmp_path / "runs" / name / "6").mkdir(parents=True)

    def list_steps(folder, whole=files.list_steps):
        if folder.name == "b":  # chmod does not stop the superuser
            raise PermissionError(13, "Permission denied")
        return whole(folder)

    monkeypatch.setattr(files, "list_steps", list_steps)
    runs = tmp_path / "runs"
    found = f"it holds the run folders {runs / 'a'} (newest step 6), {runs / 'c'} (newest step 6)"
    assert refused(runs).endswith(found)
