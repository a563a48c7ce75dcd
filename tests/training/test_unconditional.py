"""`conditioning=none`: a folder of images without labels or captions, from preparation to samples and export."""

import shutil

import numpy as np
import pytest
from PIL import Image
from runs import assert_same_checkpoint, call, error_line, metrics, stored_arrays, train_here

import flowdit
from flowdit.prepare import main as prepare
from flowdit.sample import main as sample

NONE = ("conditioning=none", "train.sample_labels=null")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Records with only latents, from images in one folder."""
    root = tmp_path_factory.mktemp("plain")
    (root / "images").mkdir()
    colours = np.random.default_rng(0).integers(0, 256, (24, 2, 2, 3)).astype(np.uint8)
    for i, colour in enumerate(colours):
        Image.fromarray(colour).resize((64, 64), Image.Resampling.NEAREST).save(root / "images" / f"{i:02d}.png")
    done = call(prepare, f"source={root / 'images'}", f"out={root / 'data'}", "held_out_fraction=0.3", "vae_check=0")
    assert (done.status, "no classes, no captions" in done.out) == (0, True), done.err
    return root / "data"


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "none"
    settings = ("train.validate_every=6", "train.sample_every=6", "train.latent_scale=data", "train.latent_mean=data")
    finished = train_here(data, folder, *NONE, *settings)
    assert (finished.status, finished.err) == (0, "")
    assert "latents 16x8x8, without condition" in finished.out
    return folder


def test_it_trains_validates_and_previews(run):
    assert len(metrics(run, "train/loss")) == 6
    assert np.isfinite(metrics(run, "validation/loss")[6])
    assert not metrics(run, "validation/condition_gain")
    assert (run / "samples" / "00000006.png").is_file()
    assert stored_arrays(run / "6")["model_ema.class_table"].shape[0] == 1


def test_resume_is_exact(data, run, tmp_path):
    resumed = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(resumed / "6")
    settings = ("train.latent_scale=data", "train.latent_mean=data", "train.is_restore=true")
    finished = train_here(data, resumed, *NONE, *settings)
    assert (finished.status, finished.err) == (0, "")
    assert_same_checkpoint(resumed / "6", run / "6")


def test_it_samples(run, tmp_path):
    finished = call(sample, f"checkpoint={run}", "num_images=3", "steps=1", f"out={tmp_path / 'out'}")
    assert finished.status == 0, finished.err
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["0000.png", "0001.png", "0002.png", "grid.png", "samples.json"]
    sampler = flowdit.load(str(run))
    (guided,), (unguided,) = (list(sampler.draw(steps=2, guidance=guidance)) for guidance in (4.0, 1.0))
    np.testing.assert_array_equal(guided, unguided)  # there is no guidance
    with pytest.raises(ValueError, match="^labels: not supported by this model, which takes no condition$"):
        sampler.draw(labels=[0])


@pytest.mark.slow
def test_labelled_data_can_be_trained_without_labels(tiny_data, whole_run, tmp_path):
    """A run that starts from a class model keeps everything but its class table."""
    run, start = tmp_path / "run", whole_run / "6"
    finished = train_here(tiny_data, run, *NONE, f"train.init_from={start}", "train.num_steps=5")
    assert (finished.status, finished.err) == (0, "")
    assert "class_table is freshly initialised: this run has no classes" in finished.out
    line = error_line(train_here(tiny_data, run, "train.is_restore=true", "conditioning=labels"))
    assert line == "error: conditioning: must be none as in the checkpoint to resume, got labels"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.sample_labels=[0]", "train.sample_labels: must be null with conditioning=none, got [0]"),
        ("conditioning=text", "model.name: must be pixart with conditioning=text, got ccdit"),
        ("conditioning=image", "conditioning: must be one of labels, text, none, got 'image'"),
        ("conditioning=labels", "has no classes, which conditioning=labels needs; conditioning=none trains without"),
    ],
)
def test_bad_setting(data, tmp_path, override, expected):
    assert expected in error_line(train_here(data, tmp_path / "run", *NONE, override))
