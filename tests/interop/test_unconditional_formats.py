"""Unconditional models in all formats, and files of other projects whose class table has one row."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interop.foreign_folders import unreadable
from interop.small_models import (
    DEFAULT_CLASS,
    STOCK_CLASS,
    assert_same,
    converted,
    noise,
    random_model,
    relative_error,
    saved,
)

from flowdit.conditioning import KINDS
from flowdit.conditioning.labels import Labels
from flowdit.diffusion.sampling import SamplerConfig, sample
from flowdit.interop import load, read_source
from flowdit.interop.metadata import ForeignConfig
from flowdit.interop.portable import Portable, to_trained

pytest.importorskip("torch", reason="needs torch")

import diffusers
import torch
from original_models import DiT, randomised

pytestmark = pytest.mark.slow

SAMPLER = {"solver": "euler", "steps": 8, "guidance": 4.0, "time_shift": 2.0}


@pytest.fixture(scope="module")
def portable(meta) -> Portable:
    """Trained on data with classes, which are ignored."""
    model = random_model(meta, STOCK_CLASS, SAMPLER, conditioning="none")
    assert model.arrays["class_table"].shape[0] == 1 and model.meta.manifest.class_names
    return model


def exported(portable: Portable, folder: Path, **options) -> Path:
    source = saved(portable, folder / "source.safetensors")
    return converted(source, folder / "exported", to="diffusers", **options)


@pytest.fixture(scope="module")
def folder(portable, tmp_path_factory) -> Path:
    return exported(portable, tmp_path_factory.mktemp("stock"), image="draw")


def pipeline_of(folder: Path):
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def pipeline(folder):
    return pipeline_of(folder)


def test_every_format_round_trips_and_draws_the_same_images(portable, folder, tmp_path):
    single = converted(folder, tmp_path / "single.safetensors", to="safetensors")
    source, checkpoint = saved(portable, tmp_path / "source"), converted(single, tmp_path / "checkpoint")
    for name in (source, folder, single, checkpoint):
        assert_same(read_source(str(name)), portable)
    drawn = [images for name in (source, checkpoint) for images in load(str(name)).draw(num_images=2, seed=3, steps=1)]
    assert drawn[0].shape == (2, 64, 64, 3) and not np.array_equal(*drawn[0])
    np.testing.assert_array_equal(*drawn)


@pytest.mark.parametrize("own_class", [False, True], ids=["stock", "own"])
def test_diffusers_gives_the_same_latents(meta, tmp_path, own_class):
    portable = random_model(meta, DEFAULT_CLASS if own_class else STOCK_CLASS, SAMPLER, conditioning="none")
    pipeline = pipeline_of(exported(portable, tmp_path, own_class=own_class))
    got = pipeline(num_images=2, latents=torch.from_numpy(noise()), output_type="latent").images
    draw = jax.jit(lambda *inputs: sample(*inputs, None, SamplerConfig(**SAMPLER)).latents)
    expected = draw(to_trained(portable).model, jnp.asarray(noise()), jnp.zeros(2, jnp.int32))
    error = relative_error(got, expected)
    print(f"relative error {error:.2e}")
    assert error < 1e-4
    assert relative_error(got, noise()) > 0.1  # the network has an effect
    # A folder saved by the pipeline is read with its own weights.
    pipeline.save_pretrained(tmp_path / "saved")
    assert_same(read_source(str(tmp_path / "saved")), portable)


def test_pipeline_draws_num_images(pipeline):
    assert len(pipeline(num_inference_steps=1).images) == 1
    assert [image.size for image in pipeline(num_images=3, num_inference_steps=1).images] == [(64, 64)] * 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_labels": 0}, "class_labels: must not be given, this is an unconditional model: pass num_images"),
        ({"prompt": "red"}, "prompt: must not be given, this is an unconditional model: pass num_images"),
        ({"negative_prompt": "red"}, "negative_prompt: must not be given, this is an unconditional model"),
        ({"num_images": 0}, "num_images: must be a whole number above 0, got 0"),
        ({"num_images": True}, "num_images: must be a whole number above 0, got True"),
    ],
)
def test_arguments_that_the_pipeline_does_not_take(pipeline, arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        pipeline(**arguments)


def test_folder_is_unconditional(folder):
    config = json.loads((folder / "transformer" / "config.json").read_text())
    assert config["num_embeds_ada_norm"] == 0
    assert "class_names" not in json.loads((folder / "model_index.json").read_text())
    card = (folder / "README.md").read_text()
    assert "\nUnconditional diffusion transformer of" in card and "pipe(num_images=1).images[0]" in card
    assert (folder / "sample.png").is_file()


def test_table_of_one_row_is_an_unconditional_model(tmp_path):
    """In a diffusers folder and in original DiT files: a class model would have no class to draw."""
    hints_by_name = {"dit": ForeignConfig(prediction="velocity"), "dit.pt": ForeignConfig(format="dit", num_heads=2)}
    stock = diffusers.DiTTransformer2DModel(2, 16, in_channels=4, num_layers=1, sample_size=8, num_embeds_ada_norm=0)
    randomised(stock).save_pretrained(tmp_path / "dit")
    torch.save(randomised(DiT(dim=32, heads=2, classes=0)).state_dict(), tmp_path / "dit.pt")
    for name, hints in hints_by_name.items():
        found = read_source(str(tmp_path / name), hints=hints)
        assert found.arrays["class_table"].shape[0] == 1
        assert found.meta.config.conditioning == "none" and found.meta.manifest.class_names == ()
        saved(found, tmp_path / f"{name}.safetensors")
        load(str(tmp_path / f"{name}.safetensors")).requests(2, {})
    (tmp_path / "names.txt").write_text("cat\n")
    message = "classes: must name the 0 classes of the model"
    assert unreadable(tmp_path / "dit", prediction="velocity", classes=str(tmp_path / "names.txt")).startswith(message)


def test_kind_that_the_pipeline_does_not_support_is_refused(portable, tmp_path, monkeypatch):
    """A kind without an export, as by default."""
    monkeypatch.setitem(KINDS, "numbers", type("Numbers", (Labels,), {"exported": lambda self: None}))
    meta = portable.meta.dump()
    model = random_model(
        meta | {"config": meta["config"] | {"conditioning": "numbers"}}, STOCK_CLASS, conditioning="numbers"
    )
    source = saved(model, tmp_path / "source.safetensors")
    with pytest.raises(ValueError, match="^to: the diffusers pipeline does not support conditioning=numbers$"):
        converted(source, tmp_path / "out", to="diffusers")
    assert_same(read_source(str(converted(source, tmp_path / "checkpoint"))), model)
    assert not (tmp_path / "out").exists()
