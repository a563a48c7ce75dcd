"""Upload to and download from a hub, which is a folder here, and images from two lines of Python."""

import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub.utils import filter_repo_objects
from interop.small_models import STOCK_CLASS, random_model, saved
from PIL import Image
from runs import call, error_line

from flowdit import sample as sample_command
from flowdit.checkpoint.meta import read_meta
from flowdit.convert import main
from flowdit.interop import ConvertConfig, convert, from_pretrained, read_source
from flowdit.interop.hub import find_source, push

REPOSITORY = "user/model"
SETTINGS = {"labels": ["heart", 1], "steps": 2, "seed": 3}


@pytest.fixture(scope="module")
def checkpoint(meta, tmp_path_factory) -> str:
    """A class model whose images depend on its weights; after six steps they hardly would."""
    return saved(random_model(meta, STOCK_CLASS), tmp_path_factory.mktemp("source") / "weights")


@pytest.fixture(scope="module")
def images(checkpoint) -> list[np.ndarray]:
    return drawn(checkpoint)


def drawn(name: str) -> list[np.ndarray]:
    return [np.asarray(image) for image in from_pretrained(name).sample(**SETTINGS)]


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """The hub's API on folders: `<hub>/<user>/<model>` is a repository. It records private repositories."""
    folder = tmp_path / "hub"

    def snapshot_download(repo_id, **patterns):
        if not (folder / repo_id).is_dir():
            raise huggingface_hub.errors.LocalEntryNotFoundError(f"no {repo_id}\nand a second line")
        here, cached = folder / repo_id, folder / ".cache" / repo_id
        files = [str(path.relative_to(here)) for path in here.rglob("*") if path.is_file()]
        for file in filter_repo_objects(files, **patterns):
            (cached / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(here / file, cached / file)
        return str(cached)

    def create_repo(self, repo_id, *, private, exist_ok, repo_type):
        assert exist_ok and repo_type == "model"
        (folder / repo_id).mkdir(parents=True, exist_ok=True)
        (folder / repo_id / ".gitattributes").write_text(f"private={private}")

    def upload_folder(self, *, folder_path, repo_id):
        shutil.copytree(folder_path, folder / repo_id, dirs_exist_ok=True)

    def upload_file(self, *, path_or_fileobj, path_in_repo, repo_id):
        shutil.copyfile(path_or_fileobj, folder / repo_id / path_in_repo)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    for method in (create_repo, upload_folder, upload_file):
        monkeypatch.setattr(huggingface_hub.HfApi, method.__name__, method)
    return folder


@pytest.mark.parametrize(
    ("target", "fields"),
    [
        ("diffusers", {"to": "diffusers", "image": "none"}),
        ("weights", {"to": "checkpoint", "private": False}),
        ("model.safetensors", {"to": "safetensors"}),
    ],
)
def test_pushed_model_draws_the_same_images(hub, checkpoint, images, tmp_path, messages, target, fields):
    convert(ConvertConfig(source=checkpoint, target=str(tmp_path / target), push_to_hub=REPOSITORY, **fields))
    assert messages()[-1] == f"uploaded: {huggingface_hub.HfApi().endpoint}/{REPOSITORY}"
    assert (hub / REPOSITORY / ".gitattributes").read_text() == f"private={fields.get('private', True)}"
    shutil.rmtree(tmp_path / target) if (tmp_path / target).is_dir() else (tmp_path / target).unlink()
    np.testing.assert_array_equal(drawn(REPOSITORY), images)
    fetched = Path(find_source(REPOSITORY))
    assert fetched == hub / ".cache" / REPOSITORY
    assert read_source(REPOSITORY).meta == read_meta(Path(checkpoint))
    # Neither code nor documentation of a repository is downloaded.
    assert not [path for path in fetched.rglob("*") if path.suffix in (".py", ".md", ".png")]


def test_whole_checkpoint_of_a_run_can_be_shared(hub, whole_run):
    """Uploaded by hand, with the optimizer state, which is downloaded too: the checksums cover all files."""
    push(whole_run / "6", REPOSITORY, private=True)
    ours, fetched = from_pretrained(str(whole_run / "6"), "model"), from_pretrained(REPOSITORY, "model")
    np.testing.assert_array_equal(ours.trained.model.final_linear.weight, fetched.trained.model.final_linear.weight)


def test_text_encoder_of_a_pipeline_is_not_fetched(hub):
    for file in ("transformer/a.safetensors", "text_encoder/b.safetensors", "text_encoder_2/c.json", "vae/config.json"):
        (hub / REPOSITORY / file).parent.mkdir(parents=True, exist_ok=True)
        (hub / REPOSITORY / file).write_text("")
    fetched = sorted(path.name for path in Path(find_source(REPOSITORY)).rglob("*") if path.is_file())
    assert fetched == ["a.safetensors", "config.json"]


@pytest.mark.parametrize("folder", ["transformer/", ""], ids=["pipeline", "transformer"])
def test_torchs_files_are_fetched_if_there_are_no_others(hub, folder):
    weights = f"{folder}diffusion_pytorch_model"
    for file in (f"{folder}config.json", f"{weights}.bin", f"{weights}.safetensors", "vae/diffusion_pytorch_model.bin"):
        (hub / REPOSITORY / file).parent.mkdir(parents=True, exist_ok=True)
        (hub / REPOSITORY / file).write_text("")
    assert not list(Path(find_source(REPOSITORY)).rglob("*.bin"))
    (hub / REPOSITORY / f"{weights}.safetensors").unlink()
    shutil.rmtree(hub / ".cache")
    fetched = Path(find_source(REPOSITORY))
    assert [path.relative_to(fetched) for path in fetched.rglob("*.bin")] == [Path(f"{weights}.bin")]


def test_repository_is_converted_by_its_name(hub, checkpoint, tmp_path):
    push(Path(checkpoint), REPOSITORY, private=True)
    finished = call(main, f"source={REPOSITORY}", f"target={tmp_path / 'out.safetensors'}", "to=safetensors")
    assert finished.status == 0, finished.err
    arrays = read_source(checkpoint).arrays
    for name, array in read_source(str(tmp_path / "out.safetensors")).arrays.items():
        np.testing.assert_array_equal(array, arrays[name])


def test_local_path_goes_before_the_hub(hub, tmp_path):
    Path(REPOSITORY).mkdir(parents=True)
    assert find_source(REPOSITORY) == Path(REPOSITORY)


def test_missing_repository_is_one_line(hub):
    finished = call(main, f"source={REPOSITORY}", "target=out")
    assert error_line(finished) == (
        "error: source: must be a file, a folder or a reachable Hugging Face hub id, not 'user/model' "
        "(LocalEntryNotFoundError: no user/model)"
    )


@pytest.mark.parametrize("step", ["create_repo", "upload_file"])
def test_unreachable_hub_keeps_the_target(hub, checkpoint, tmp_path, monkeypatch, step):
    def refuse(*_, **__):
        raise ConnectionError("no route to the hub\nat all")

    monkeypatch.setattr(huggingface_hub.HfApi, step, refuse)
    target = tmp_path / "out.safetensors"
    overrides = (f"source={checkpoint}", f"target={target}", "to=safetensors", f"push_to_hub={REPOSITORY}")
    assert error_line(call(main, *overrides)) == (
        f"error: push_to_hub: user/model cannot be written (ConnectionError: no route to the hub); {target} is complete"
    )
    arrays = read_source(str(target)).arrays
    for name, array in read_source(checkpoint).arrays.items():
        np.testing.assert_array_equal(arrays[name], array)


# --- images in Python ---


def test_images_are_those_of_the_command(checkpoint, images, tmp_path):
    finished = call(
        sample_command.main, f"checkpoint={checkpoint}", "labels=[heart,1]", "steps=2", "seed=3", f"out={tmp_path}/out"
    )
    assert finished.status == 0, finished.err
    for file, image in zip(["0000_heart.png", "0001_dog.png"], images, strict=True):
        np.testing.assert_array_equal(Image.open(tmp_path / "out" / file), image)
    assert np.ptp(images[0]) > 50 and not np.array_equal(*images)


def test_sample_returns_images_and_refuses_unknown_settings(checkpoint):
    model = from_pretrained(checkpoint)
    (image,) = model.sample(labels=["cat"], steps=1)
    assert isinstance(image, Image.Image) and image.size == (64, 64) and image.mode == "RGB"
    with pytest.raises(ValueError, match="^labels: must be .*cow"):
        model.sample(labels=["cow"])
    with pytest.raises(ValueError, match="^steps: must be at least 1, got 0"):
        model.sample(labels=["cat"], steps=0)
    with pytest.raises(ValueError, match="^prompts: not supported by this model, which takes labels"):
        model.sample(prompts=["a cat"])


def test_ema_and_raw_weights_are_chosen(whole_run):
    ema, raw = (from_pretrained(str(whole_run / "6"), weights).trained.model for weights in ("ema", "model"))
    assert not np.array_equal(ema.final_linear.weight, raw.final_linear.weight)
