"""The other files of an exported diffusers folder: configuration, scheduler, VAE, images and the model card."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from interop.small_models import (
    DEFAULT_TEXT,
    SMALL,
    STOCK_CLASS,
    STOCK_TEXT,
    assert_same,
    converted,
    random_model,
    saved,
)
from PIL import Image
from runs import call

from flowdit.convert import main
from flowdit.interop import read_source
from flowdit.interop.architectures import ARCHITECTURES
from flowdit.models.config import PixArtConfig


@pytest.fixture(scope="module")
def drawn_folder(whole_run, tmp_path_factory) -> Path:
    """The run's checkpoint, exported with a sample image."""
    target = tmp_path_factory.mktemp("exported") / "openmoji"
    return converted(whole_run / "6", target, to="diffusers", own_class=True, image="draw")


def read_json(file: Path):
    return json.loads(file.read_text())


def test_folder_has_config_scheduler_and_vae(drawn_folder, meta):
    pytest.importorskip("torch", reason="needs torch")
    import diffusers

    config = read_json(drawn_folder / "transformer" / "config.json")
    assert config["_class_name"] == "FlowDiTClassTransformer"
    shape = ("num_layers", "num_attention_heads", "attention_head_dim", "in_channels", "sample_size", "patch_size")
    assert [config[name] for name in shape] == [2, 2, 16, 16, 8, 2]
    assert config["num_embeds_ada_norm"] == 4 and config["qk_norm"] is True
    index = read_json(drawn_folder / "model_index.json")
    assert index["latents_mean"] == meta["latent_mean"] and index["latents_scale"] == meta["latent_scale"]
    assert index["class_names"] == {"0": "cat", "1": "dog", "2": "heart", "3": "sun"}
    assert [index[name] for name in ("guidance", "steps", "vae_name")] == [2.0, 2, "openmoji"]
    assert diffusers.AutoencoderKL.from_pretrained(drawn_folder / "vae").config.latent_channels == 16
    assert (drawn_folder / "pipeline.py").is_file()
    assert (drawn_folder / "transformer" / "flowdit_transformer.py").is_file()
    assert read_json(drawn_folder / "flowdit.json") == meta


def test_scheduler_has_the_samplers_shift(meta, tmp_path):
    pytest.importorskip("torch", reason="needs torch")
    import diffusers

    portable = random_model(meta, STOCK_CLASS, sampler={"time_shift": 2.5})
    folder = converted(saved(portable, tmp_path / "source.safetensors"), tmp_path / "out", to="diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    assert scheduler.config.shift == 2.5 and scheduler.config.num_train_timesteps == 1000


def test_noise_prediction_has_ddim(meta, tmp_path):
    pytest.importorskip("torch", reason="needs torch")
    import diffusers

    portable = random_model(meta | {"prediction": "noise"}, STOCK_CLASS)
    folder = converted(saved(portable, tmp_path / "source.safetensors"), tmp_path / "out", to="diffusers")
    scheduler = diffusers.DDIMScheduler.from_pretrained(folder / "scheduler")
    expected = {"prediction_type": "epsilon", "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
    assert dict(scheduler.config) | expected == dict(scheduler.config)
    assert "predicts the noise" in (folder / "README.md").read_text()
    assert_same(read_source(str(folder)), portable)


def test_card_has_data_licence_recipe_and_sampler(drawn_folder, meta):
    card = (drawn_folder / "README.md").read_text()
    front, body = card.removeprefix("---\n").split("\n---\n", 1)
    assert 'license: other\nlicense_name: "CC0"' in front and "library_name: diffusers" in front
    assert "# openmoji\n" in body and "ema weights after 6 steps of flowdit" in body
    assert "Class-conditional (4)" in body and "predicts the velocity" in body
    rows = dict(re.findall(r"^\| (\S[^|]*) \| ([^|]*) \|$", body, re.MULTILINE))
    wanted = {
        "records": "{'train': 48, 'validation': 8}",
        "licence": "CC0",
        "VAE": "openmoji",
        "image size": "64",
        "batch_size": "8",
        "num_steps": "6",
        "ema_decay": "0.9",
        "optim.learning_rate": "0.001",
        "seed": "0",
        "solver": "euler",
        "steps": "2",
        "guidance": "2.0",
        "time_shift": "1.0",
        "depth": "2",
        "qk_norm": "True",
    }
    assert rows | wanted == rows
    assert meta["versions"]["jax"] in rows["versions"]
    assert set(re.findall("^## (.*)$", body, re.MULTILINE)) == {"Use", "Data", "Recipe", "Sampler", "Model"}


def test_licence_that_the_hub_knows_has_its_identifier(meta, tmp_path):
    manifest = meta["manifest"] | {"license": "CC BY-SA 4.0"}
    source = saved(random_model(meta | {"manifest": manifest}, STOCK_CLASS), tmp_path / "source.safetensors")
    card = (converted(source, tmp_path / "out", to="diffusers") / "README.md").read_text()
    assert "\nlicense: cc-by-sa-4.0\n---\n" in card and "| licence | CC BY-SA 4.0 |" in card


def test_sample_image_opens_and_is_linked(drawn_folder):
    assert "![samples](sample.png)" in (drawn_folder / "README.md").read_text()
    with Image.open(drawn_folder / "sample.png") as image:
        assert image.width > 2 * 64 and image.height > 64  # two previews and their captions
        assert np.ptp(np.asarray(image.convert("L"))) > 50


def test_image_of_the_user_or_none(meta, tmp_path):
    source = saved(random_model(meta, STOCK_CLASS), tmp_path / "source.safetensors")
    Image.new("RGB", (8, 4), "red").save(mine := tmp_path / "mine.png")
    given = converted(source, tmp_path / "given", to="diffusers", image=str(mine))
    assert (given / "sample.png").read_bytes() == mine.read_bytes()
    # `picture` is another name of the key.
    none = converted(source, tmp_path / "none", to="diffusers", image="draw", picture="none")
    assert not (none / "sample.png").exists() and "![" not in (none / "README.md").read_text()


def test_image_that_cannot_be_drawn_does_not_prevent_the_export(meta, tmp_path):
    """The text model of this run has no prompts to preview."""
    source = saved(random_model(meta, STOCK_TEXT), tmp_path / "source.safetensors")
    finished = call(main, f"source={source}", f"target={tmp_path / 'out'}", "to=diffusers")
    assert finished.status == 0, finished.err
    assert re.search("^warning: no sample image: train.sample_prompts: must hold", finished.out, re.MULTILINE)
    assert not (tmp_path / "out" / "sample.png").exists()
    assert (tmp_path / "out" / "transformer" / "config.json").is_file()


def test_every_field_of_the_model_is_exported_or_for_training_only(meta, tmp_path):
    """A new field of the model must be exported, or it would be silently dropped."""
    portable = random_model(meta, DEFAULT_TEXT)
    out = converted(saved(portable, tmp_path / "source.safetensors"), tmp_path / "out", to="diffusers", own_class=True)
    config = read_json(out / "transformer" / "config.json")
    renamed = {
        "name": "_class_name",
        "depth": "num_layers",
        "hidden_dim": "cross_attention_dim",
        "num_heads": "num_attention_heads",
        "micro_conditioning": "use_additional_conditions",
    }
    # Training only; the shape of the null caption in model_index.json; the side of the latents; left out, with a line.
    elsewhere = {"remat", "kernels", "scan_blocks", "null_tokens", "position_base", "guidance_head"}
    fields = (
        {field.name for field in dataclasses.fields(PixArtConfig)}
        - elsewhere
        - ARCHITECTURES["pixart"].own.fixed.keys()
    )
    assert {renamed.get(field, field) for field in fields} <= config.keys()
    assert SMALL["depth"] == config["num_layers"]
