"""Import: converted networks of diffusers and of the original repositories give the outputs of the originals."""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import call, train_here

from flowdit import load
from flowdit.convert import main as convert
from flowdit.inference.trained import Trained
from flowdit.models.pixart import TextCondition
from flowdit.sample import main as sample

pytest.importorskip("torch", reason="needs torch")

import diffusers
import safetensors.torch
import torch
from original_models import DiT, PixArt, randomised

TIMES = np.asarray([0.0, 0.5, 0.875], np.float32)  # eighths are exact, and so are 1000 t and 1 - t
LABELS = np.asarray([0, 9, 10], np.int32)
TEXT_DIM = 20


def converted(source: Path, *options: str) -> tuple[Trained, str]:
    """The checkpoint made by the command, and its output."""
    target = source.parent / "converted"
    finished = call(convert, f"source={source}", f"target={target}", *options)
    assert finished.status == 0, finished.err
    return load(str(target)).trained, finished.out


def latents(channels: int = 4, size: int = 8) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((3, channels, size, size), np.float32)


def texts(tokens: int = 7) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features, ragged masks and pixel sizes."""
    features = np.random.default_rng(1).standard_normal((3, tokens, TEXT_DIM), np.float32)
    mask = np.arange(tokens)[None] < np.asarray([tokens, 1, 4])[:, None]
    return features, mask, np.asarray([[1024, 1024], [512, 2048], [704, 1408]], np.float32)


def assert_equal(trained: Trained, x: np.ndarray, condition, expected: torch.Tensor, times: np.ndarray = TIMES) -> None:
    with jax.default_matmul_precision("highest"):
        got = jax.jit(jax.vmap(trained.model))(*jax.tree.map(jnp.asarray, (x, times, condition)))
    expected = expected.detach().numpy()
    assert np.linalg.norm(got - expected) / np.linalg.norm(expected) < 1e-5


# --- diffusers ---


def diffusers_dit(
    heads: int = 4, head_dim: int = 12, out_channels: int = 8, **settings
) -> diffusers.DiTTransformer2DModel:
    model = randomised(
        diffusers.DiTTransformer2DModel(
            num_attention_heads=heads,
            attention_head_dim=head_dim,
            num_layers=1 if heads == 16 else 2,
            in_channels=4,
            out_channels=out_channels,
            sample_size=8,
            num_embeds_ada_norm=10,
            **settings,
        )
    )
    first = model.transformer_blocks[0].norm1.emb.state_dict()
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(first)
    return model


@pytest.mark.parametrize(
    ("heads", "head_dim"),
    [(6, 64), pytest.param(12, 64, marks=pytest.mark.slow), pytest.param(16, 72, marks=pytest.mark.slow)],
    ids="SBX",
)
def test_diffusers_dit(tmp_path, heads, head_dim):
    model = diffusers_dit(heads, head_dim)
    model.save_pretrained(tmp_path / "dit")
    trained, out = converted(tmp_path / "dit")
    expected = model(torch.from_numpy(latents()), torch.from_numpy(1000 * TIMES), torch.from_numpy(LABELS)).sample
    assert_equal(trained, latents(), LABELS, expected[:, :4])
    assert trained.prediction == "noise" and "learned sigmas are dropped: the first 4 of 8" in out


def diffusers_pixart(heads: int = 4, head_dim: int = 12, **settings) -> diffusers.PixArtTransformer2DModel:
    return randomised(
        diffusers.PixArtTransformer2DModel(
            num_attention_heads=heads,
            attention_head_dim=head_dim,
            num_layers=1 if heads == 16 else 2,
            in_channels=4,
            out_channels=8,
            sample_size=8,
            cross_attention_dim=heads * head_dim,
            caption_channels=TEXT_DIM,
            **settings,
        )
    )


@pytest.mark.parametrize(
    ("heads", "head_dim", "micro", "tokens", "shards"),
    [
        (6, 64, False, 120, "10GB"),
        pytest.param(12, 64, False, 300, "3MB", marks=pytest.mark.slow),
        pytest.param(16, 72, True, 120, "10GB", marks=pytest.mark.slow),
    ],
    ids=["S-alpha", "B-sigma-shards", "XL-alpha-1024"],
)
def test_diffusers_pixart(tmp_path, heads, head_dim, micro, tokens, shards):
    model = diffusers_pixart(heads, head_dim, use_additional_conditions=micro, interpolation_scale=2 if micro else None)
    model.save_pretrained(tmp_path / "pixart", max_shard_size=shards)
    trained, out = converted(tmp_path / "pixart", f"max_length={tokens}")
    features, mask, sizes = texts(tokens)
    size = torch.from_numpy(sizes)
    expected = model(
        torch.from_numpy(latents()),
        torch.from_numpy(features),
        torch.from_numpy(1000 * TIMES),
        added_cond_kwargs={"resolution": size, "aspect_ratio": size[:, :1] / size[:, 1:]} if micro else None,
        encoder_attention_mask=torch.from_numpy(mask),
    ).sample
    assert_equal(trained, latents(), TextCondition(features, mask, np.zeros(3, bool), sizes), expected[:, :4])
    assert trained.conditioning.describe().text.max_length == tokens
    assert "null caption, which is set to 0" in out


@pytest.mark.parametrize(
    ("scheduler", "prediction"),
    [
        (diffusers.DDIMScheduler(beta_schedule="linear", beta_end=0.02), "noise"),
        (diffusers.FlowMatchEulerDiscreteScheduler(), "velocity"),
    ],
)
def test_pipeline_folder_has_the_prediction_type_and_the_vae(tmp_path, scheduler, prediction):
    folder = tmp_path / "pipeline"
    diffusers_dit(out_channels=4).save_pretrained(folder / "transformer")
    scheduler.save_pretrained(folder / "scheduler")
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        scaling_factor=0.13,
    )
    vae.save_pretrained(folder / "vae")
    (folder / "model_index.json").write_text("{}")
    trained, _ = converted(folder)
    assert trained.prediction == prediction
    assert (trained.manifest.vae.scale, trained.manifest.vae.stride, trained.scale) == (0.13, 2, (0.13,) * 4)
    out = tmp_path / "samples"
    finished = call(sample, f"checkpoint={tmp_path / 'converted'}", "labels=[3]", "steps=2", f"out={out}")
    assert finished.status == 0, finished.err
    assert (out / "grid.png").is_file()


# --- the original repositories ---


def write(model: torch.nn.Module, file: Path, form: str, name: str = "DiT-XL/2") -> Path:
    """Save weights of a model `name` like the repositories; other entries hold wrong weights."""
    state, other = model.state_dict(), {name: torch.zeros_like(t) for name, t in model.state_dict().items()}
    if form == "safetensors":
        safetensors.torch.save_file(state, file := file.with_suffix(".safetensors"))
        return file
    arguments = argparse.Namespace(model=name)
    contents = {
        "plain": state,
        "ema": {"model": other, "ema": state, "opt": {}, "args": arguments},
        "model": {"model": state, "ema": other, "opt": {}, "args": arguments},
        "state_dict": {"state_dict": state, "epoch": 3},
        "ddp": {f"module.{name}": tensor for name, tensor in state.items()},
    }
    torch.save(contents[form], file)
    return file


@pytest.mark.parametrize("form", ["plain", "ema", "model", "ddp", "safetensors"])
def test_original_dit(tmp_path, form):
    model = randomised(DiT())
    weights = "model" if form == "model" else "ema"
    options = ("format=dit", "num_heads=4", f"weights={weights}")
    trained, _ = converted(write(model, tmp_path / "dit.pt", form), *options)
    expected = model(torch.from_numpy(latents()), torch.from_numpy(1000 * TIMES), torch.from_numpy(LABELS))
    assert_equal(trained, latents(), LABELS, expected)
    assert trained.prediction == "noise" and trained.manifest.latent_shape == (4, 8, 8)


def test_heads_of_the_papers_widths_are_known(tmp_path):
    model = randomised(DiT(depth=1, dim=384, heads=6))
    trained, _ = converted(write(model, tmp_path / "dit.pt", "plain"), "format=dit")
    expected = model(torch.from_numpy(latents()), torch.from_numpy(1000 * TIMES), torch.from_numpy(LABELS))
    assert_equal(trained, latents(), LABELS, expected)


def test_bfloat16_file(tmp_path):
    model = randomised(DiT()).bfloat16()
    trained, _ = converted(write(model, tmp_path / "dit.pt", "plain"), "format=dit", "num_heads=4")
    rounded = {name: tensor.float() for name, tensor in model.state_dict().items() if name != "pos_embed"}
    reference = DiT().eval()  # positions are computed, not rounded
    reference.load_state_dict(rounded, strict=False)
    expected = reference(torch.from_numpy(latents()), torch.from_numpy(1000 * TIMES), torch.from_numpy(LABELS))
    assert_equal(trained, latents(), LABELS, expected)


@pytest.mark.parametrize(("form", "options"), [("plain", ["format=sit"]), ("ema", [])], ids=["given", "in the file"])
def test_sit_has_reversed_time_and_the_opposite_sign(tmp_path, form, options):
    model = randomised(DiT())
    trained, _ = converted(write(model, tmp_path / "sit.pt", form, "SiT-XL/2"), "num_heads=4", *options)
    expected = -model(torch.from_numpy(latents()), torch.from_numpy(1 - TIMES), torch.from_numpy(LABELS))
    assert_equal(trained, latents(), LABELS, expected)
    assert trained.prediction == "velocity"


@pytest.mark.parametrize(("scale", "sizes"), [(0.5, False), (1.0, False), (2.0, True)])
def test_original_pixart(tmp_path, scale, sizes):
    model = randomised(PixArt(scale=scale, sizes=sizes))
    trained, out = converted(write(model, tmp_path / "pixart.pth", "state_dict"), "num_heads=4")
    features, mask, pixels = texts()
    dropped = np.asarray([False, False, True])
    expected = model(
        *map(torch.from_numpy, (latents(), 1000 * TIMES, features, mask, dropped)),
        torch.from_numpy(pixels) if sizes else None,
    )
    assert_equal(trained, latents(), TextCondition(features, mask, dropped, pixels), expected)
    assert (trained.config.model.null_tokens, trained.config.model.interpolation_scale) == (7, scale)
    assert "holds no ema weights; its 'state_dict' is used" in out


def test_imported_noise_model_samples_and_starts_a_run(tiny_data, tmp_path):
    """On latents of the embedded VAE, with its configuration."""
    file = write(randomised(DiT(dim=32, heads=2, channels=16, classes=4)), tmp_path / "dit.pt", "plain")
    converted(file, "format=dit", "num_heads=2", "vae=openmoji")
    out, checkpoint = tmp_path / "samples", tmp_path / "converted"
    finished = call(sample, f"checkpoint={checkpoint}", "labels=[1,2]", "steps=2", "guidance=2", f"out={out}")
    assert finished.status == 0, finished.err
    assert len(list(out.glob("*.png"))) == 3
    options = ("train.num_steps=1", "model.qk_norm=false", "optim.warmup_steps=0", f"train.init_from={checkpoint}")
    finished = train_here(tiny_data, tmp_path / "run", *options)
    assert finished.status == 0, finished.err
    assert "predicts the noise, this run trains the velocity: the objective changes" in finished.out
