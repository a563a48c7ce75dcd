"""An exported text model with encoder and VAE in diffusers gives the same images for prompts as flowdit."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from interop.small_models import DEFAULT_TEXT, STOCK_TEXT, random_model, saved
from models.text_folders import write_t5gemma
from runs import LATENT_SHAPE

from flowdit.checkpoint.meta import read_meta
from flowdit.conditioning.text import describe_encoder
from flowdit.diffusion.sampling import image_noise
from flowdit.interop import ConvertConfig, convert, from_pretrained
from flowdit.models.text_encoder import TextConfig, load_text_encoder

pytest.importorskip("torch", reason="needs torch")

import diffusers
import torch
import transformers

PROMPTS = ["a red apple", "red"]
SAMPLER = {"solver": "euler", "steps": 4, "guidance": 3.0, "time_shift": 2.0}


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    return write_t5gemma(tmp_path_factory.mktemp("encoder"))


@pytest.mark.parametrize(
    ("model", "own_class"),
    [
        pytest.param(STOCK_TEXT, False, id="stock", marks=pytest.mark.slow),
        pytest.param(DEFAULT_TEXT, True, id="own"),
    ],
)
def test_prompts_give_the_same_images_in_diffusers(whole_run, encoder_folder, tmp_path, model, own_class):
    settings = TextConfig(str(encoder_folder), max_length=16, dtype="float32")
    meta = read_meta(whole_run / "6").dump()
    meta["config"]["text"] = {"encoder": settings.encoder, "max_length": 16, "dtype": "float32"}
    portable = random_model(meta, model, SAMPLER, dataclasses.asdict(describe_encoder(load_text_encoder(settings))))
    checkpoint, folder = saved(portable, tmp_path / "checkpoint"), tmp_path / "exported"
    convert(ConvertConfig(source=checkpoint, target=str(folder), to="diffusers", own_class=own_class, prompts=PROMPTS))
    assert (folder / "sample.png").is_file()

    pipeline = diffusers.DiffusionPipeline.from_pretrained(
        folder,
        trust_remote_code=True,
        low_cpu_mem_usage=False,
        tokenizer=transformers.AutoTokenizer.from_pretrained(encoder_folder),
        text_encoder=transformers.T5GemmaEncoderModel.from_pretrained(encoder_folder, is_encoder_decoder=False),
    )
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.from_numpy(np.array(image_noise(0, jnp.arange(len(PROMPTS)), LATENT_SHAPE)))
    theirs = pipeline(PROMPTS, latents=noise).images
    for name in (checkpoint, str(folder)):
        ours = from_pretrained(name).sample(prompts=PROMPTS, seed=0)
        for one, other in zip(ours, theirs, strict=True):
            assert one.size == other.size == (64, 64)
            assert np.abs(np.asarray(one, np.int32) - np.asarray(other, np.int32)).max() <= 1
            assert np.asarray(one).std() > 1
