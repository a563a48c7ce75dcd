"""The output folder of `flowdit.sample`: never mixed with other images, and overwriting only on request."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
from damage import contents, refused
from PIL import Image
from runs import call, error_line

from flowdit import sample
from flowdit.config import SampleConfig
from flowdit.inference import sample_folder
from flowdit.inference.sampler import Drawn, Sampler

NAMES = ["0000_cat.png", "0001_a_dog_.png", "grid.png", "samples.json"]


@pytest.fixture(autouse=True)
def quick_images(monkeypatch) -> None:
    """Black images: `test_commands.py` writes real ones."""

    def batches(sampler, requests, *_):
        count = len(requests)
        images, latents = np.zeros((count, 8, 8, 3), np.uint8), np.zeros((count, 16, 8, 8), np.float32)
        yield Drawn(images, latents, np.ones(count, np.int32), list(range(count)))

    monkeypatch.setattr(Sampler, "batches", batches)


def sample_here(checkpoint: Path, *overrides: str):
    return call(sample.main, f"checkpoint={checkpoint}", "steps=1", "solver=euler", "out=out", *overrides)


def names() -> list[str]:
    return sorted(path.relative_to("out").as_posix() for path in Path("out").rglob("*") if path.is_file())


def test_a_second_run_overwrites_the_first_on_request(whole_run):
    assert sample_here(whole_run / "6", "labels=[cat]", "save_latents=true").status == 0
    Path("out/mine").mkdir()
    for name in ("out/mine/0000_cat.png", "out/notes.txt"):
        Path(name).write_text("mine")
    # It is refused before the checkpoint is read.
    line = refused(lambda: sample_here(Path("nowhere"), "labels=[cat]"), Path("out"))
    assert line == "error: out: out holds the 4 files of an earlier run: give another folder, or overwrite=true"
    refused(lambda: sample_here(whole_run / "6", "labels=[4]", "overwrite=true"), Path("out"))
    assert sample_here(whole_run / "6", "labels=[heart]", "overwrite=true").status == 0
    assert names() == ["0000_heart.png", "grid.png", "mine/0000_cat.png", "notes.txt", "samples.json"]


def test_a_list_of_guidance_values_draws_a_row_for_each(whole_run):
    assert sample_here(whole_run / "6", "labels=[cat,dog]", "guidance=[1,2.5,6]", "save_latents=true").status == 0
    pairs = [(name, value) for value in ("1", "2_5", "6") for name in ("cat", "dog")]
    assert names()[:6] == [f"{i:04d}_{name}__guidance_{value}.png" for i, (name, value) in enumerate(pairs)]
    assert np.load("out/latents.npy").shape == (6, 16, 8, 8)
    assert json.loads(Path("out/samples.json").read_text())["settings"]["guidance"] == [1.0, 2.5, 6.0]
    with Image.open("out/grid.png") as grid:
        assert grid.width < 3 * 132 and grid.height > 3 * 132  # two columns, three rows
    assert sample_here(whole_run / "6", "labels=[sun]", "overwrite=true").status == 0
    assert names() == ["0000_sun.png", "grid.png", "samples.json"]


@pytest.mark.parametrize("value", ["[]", "[1,high]", "true", "{a: 1}"])
def test_bad_guidance(whole_run, value):
    line = error_line(sample_here(whole_run / "6", f"guidance={value}"))
    assert line.startswith("error: guidance: must be a number or a list of numbers, got ")


@pytest.mark.parametrize("second", ["prompts=[b]", "prompts_file=prompts.txt"])
def test_prompts_are_given_in_one_way(second):
    line = error_line(sample_here(Path("nowhere"), "prompt=a", second))
    assert line.startswith(f"error: {second.partition('=')[0]}: must not be given together with prompt, got ")


def test_files_of_an_interrupted_run_are_known(whole_run, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sample_folder, "save_grid", interrupted)
        finished = sample_here(whole_run / "6", "labels=[cat]")
    assert finished.status == 128 + signal.SIGINT and finished.err.splitlines()[-1] == "stopped by Ctrl-C"
    assert names() == ["0000_cat.png", "samples.json.unfinished"]
    assert "out holds the 2 files of an earlier run" in error_line(sample_here(Path("nowhere")))
    assert sample_here(whole_run / "6", "labels=[sun]", "overwrite=true").status == 0
    assert names() == ["0000_sun.png", "grid.png", "samples.json"]


@pytest.fixture
def earlier() -> Path:
    """The output folder of a run of two images."""
    folder = Path("out")
    folder.mkdir()
    for name in NAMES:
        (folder / name).write_text("an image")
    settings = {"captions": ["cat", "a dog?"], "save_latents": False}
    (folder / "samples.json").write_text(json.dumps({"settings": settings}))
    return folder


def check(overwrite: bool) -> list[str]:
    return [path.name for path in sample_folder.check_folder(SampleConfig(out="out", overwrite=overwrite))]


def test_only_the_files_of_the_earlier_run_are_removed(earlier):
    assert check(overwrite=True) == NAMES
    (earlier / "0001_a_dog_.png").unlink()
    assert check(overwrite=True) == [name for name in NAMES if "dog" not in name]
    with pytest.raises(ValueError, match="out: out holds the 3 files of an earlier run: give another folder, or over"):
        check(overwrite=False)


@pytest.mark.parametrize("name", ["0002_cat.png", "photo.JPG", "latents.npy"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_other_files_are_never_removed(earlier, name, overwrite):
    (earlier / name).write_text("mine")
    before = contents(earlier)
    message = rf"^out: out holds 1 files that no samples.json in it lists, such as '{name}': give another folder$"
    with pytest.raises(ValueError, match=message):
        check(overwrite)
    assert contents(earlier) == before


@pytest.mark.parametrize("text", ["{", "[]", '{"settings": {"captions": [1], "save_latents": false}}', "[" * 100_000])
def test_a_foreign_samples_json_is_named(earlier, text):
    (earlier / "samples.json").write_text(text)
    with pytest.raises(ValueError, match="^out: out/samples.json is not of an earlier run: give another folder$"):
        check(overwrite=True)


def test_a_list_of_captions_cannot_name_files_elsewhere(earlier):
    settings = {"captions": ["../../cat", "/etc/cat"], "save_latents": False}
    (earlier / "samples.json").write_text(json.dumps({"settings": settings}))
    with pytest.raises(ValueError, match="holds 2 files that no samples.json in it lists"):
        check(overwrite=True)


def test_folders_without_images_are_accepted(tmp_path):
    assert check(overwrite=False) == []
    (tmp_path / "out" / "below").mkdir(parents=True)
    (tmp_path / "out" / "below" / "grid.png").write_text("mine")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert check(overwrite=False) == []
