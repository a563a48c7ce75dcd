"""VAEs of other families, from images to samples by configuration only: Stable Diffusion 1.x, SDXL, SD3, Flux."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image
from runs import call, train_here

from flowdit.data.manifest import Manifest
from flowdit.inference.images import load_matching_vae, make_decoder
from flowdit.json_input import parse
from flowdit.models.vae import load_vae
from flowdit.prepare import main as prepare
from flowdit.sample import main as sample
from flowdit.sharding import make_local_mesh

pytest.importorskip("torch", reason="needs torch")

import diffusers
import torch

# channels, quant convolutions, scale, shift
KINDS = {
    "sd1": (4, True, 0.18215, None),
    "sdxl": (4, True, 0.13025, None),
    "sd3": (16, False, 1.5305, 0.0609),
    "flux": (16, False, 0.3611, 0.1159),
}
NUM_IMAGES = 20


def build_vae(kind: str) -> diffusers.AutoencoderKL:
    channels, quant, scale, shift = KINDS[kind]
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        latent_channels=channels,
        use_quant_conv=quant,
        use_post_quant_conv=quant,
        scaling_factor=scale,
        shift_factor=shift,
    ).eval()


def save_vae(kind: str, folder: Path) -> Path:
    """As published: the first in a pipeline's sub-folder with old attention names, the last in shards."""
    vae = build_vae(kind)
    if kind != "sd1":
        vae.save_pretrained(folder, max_shard_size="30KB" if kind == "flux" else "10GB")
        return folder
    vae.save_pretrained(folder / "vae")
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    tensors = safetensors.numpy.load_file(file)
    for new, before in old.items():
        tensors = {name.replace(new, before): tensor for name, tensor in tensors.items()}
    safetensors.numpy.save_file(tensors, file)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(NUM_IMAGES):
        target = folder / ("cat" if i % 2 else "dog") / f"{i}.png"
        target.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(target)
    return folder


@pytest.fixture(scope="module")
def prepared(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """VAE folder and data set of each kind."""
    root, found = tmp_path_factory.mktemp("kinds"), {}
    for kind in KINDS:
        vae, data = save_vae(kind, root / f"{kind}_vae"), root / f"{kind}_data"
        finished = call(
            prepare,
            f"source={images}",
            f"out={data}",
            f"vae={vae}",
            "image_size=32",
            f"vae_check={2 * (kind == 'sd3')}",
            "held_out_fraction=0.2",
            "license=CC0",
            "attribution=none",
        )
        assert finished.status == 0, finished.err
        found[kind] = vae, data
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_data_record_their_vae(prepared, kind):
    vae, data = prepared[kind]
    channels, _, scale, shift = KINDS[kind]
    manifest = Manifest.read(data)
    assert manifest.latent_shape == (channels, 4, 4)
    assert (manifest.vae.scale, manifest.vae.shift, manifest.vae.stride) == (scale, shift or 0.0, 8)
    assert load_matching_vae(str(vae), manifest).fingerprint == manifest.vae.fingerprint


@pytest.mark.parametrize("kind", KINDS)
def test_decodes_as_diffusers_pipelines_do(prepared, kind):
    vae, _ = prepared[kind]
    channels, _, scale, shift = KINDS[kind]
    latents = np.random.default_rng(1).standard_normal((2, channels, 4, 4), np.float32)
    with torch.no_grad():
        raw = torch.from_numpy(latents) / scale + (shift or 0.0)
        expected = ((build_vae(kind).decode(raw).sample.clamp(-1, 1) + 1) * 127.5).numpy().transpose(0, 2, 3, 1)
    got = make_decoder(load_vae(vae), [shift or 0.0], [scale], make_local_mesh())(latents, 2)
    assert np.abs(got - expected).max() < 0.51  # rounded to bytes


def test_trains_previews_and_samples_by_configuration_alone(prepared, tmp_path):
    """Other tests use the embedded VAE, which is like SD3's; here one of four channels."""
    _, data = prepared["sd1"]
    run, out = tmp_path / "run", tmp_path / "out"
    settings = ("train.num_steps=2", "train.save_every=2", "train.sample_every=2", "train.latent_mean=data")
    finished = train_here(data, run, *settings, "train.latent_scale=data", "optim.warmup_steps=1")
    assert finished.status == 0, finished.err
    preview = Image.open(next((run / "samples").glob("*.png")))
    assert np.asarray(preview).std() > 1
    finished = call(sample, f"checkpoint={run / '2'}", "labels=[cat]", f"out={out}", "steps=2")
    assert finished.status == 0, finished.err
    assert Image.open(out / "0000_cat.png").size == (32, 32)


def test_vae_of_another_layout_is_refused(prepared, tmp_path):
    sdxl = prepared["sdxl"][0]
    data = prepared["sd1"][1]
    sd3 = prepared["sd3"][0]
    manifest = Manifest.read(data)
    with pytest.raises(ValueError, match=r"^vae: must make latents of 4 channels.*scale 0.18215, .* scale 0.13025$"):
        load_matching_vae(str(sdxl), manifest)
    with pytest.raises(ValueError, match=r"^vae: must make latents of 4 channels.* makes 16 channels"):
        load_matching_vae(str(sd3), manifest)


def test_another_network_of_the_same_layout_is_refused(prepared, tmp_path):
    _, data = prepared["sd3"]
    other = build_vae("sd3")
    with torch.no_grad():
        other.decoder.conv_out.bias += 1
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"^vae: must be the one that made the latents \(fingerprint "):
        load_matching_vae(str(tmp_path / "other"), Manifest.read(data))


def test_a_model_whose_vae_is_unknown_takes_one_of_its_layout(prepared):
    vae, data = prepared["sdxl"]
    raw = json.loads((data / "dataset.json").read_text())
    raw["vae"] |= {"fingerprint": "", "name": ""}
    manifest = parse(Manifest, raw | {"shards": []})
    assert load_matching_vae(str(vae), manifest).config.latent_channels == 4
    with pytest.raises(ValueError, match=r"^vae: must be given, the checkpoint has none .*4 channels"):
        load_matching_vae("", manifest)
    with pytest.raises(ValueError, match=r"^vae: must make latents of 4 channels"):
        load_matching_vae(str(prepared["flux"][0]), manifest)
