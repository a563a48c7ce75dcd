"""The VAE against diffusers on the same files, and what it does with files that are not its own."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowdit.models.vae import EMBEDDED, WEIGHTS_STEM, AutoencoderKL, load_vae

pytest.importorskip("torch", reason="needs torch")

import diffusers
import safetensors.torch
import torch

TOLERANCE = 1e-4
WEIGHTS = f"{WEIGHTS_STEM}.safetensors"
SD3 = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
}
SD1 = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 16}


def build_reference(seed=0, **settings):
    """A random diffusers network in which every part matters: norms that are not 1 and 0, attention that is not flat."""
    torch.manual_seed(seed)
    levels = len(settings["block_out_channels"])
    down, up = ("DownEncoderBlock2D",) * levels, ("UpDecoderBlock2D",) * levels
    reference = diffusers.AutoencoderKL(down_block_types=down, up_block_types=up, **settings).eval()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "to_q" in name or "to_k" in name:
                parameter.mul_(3)
    return reference


@pytest.fixture
def small_folder(tmp_path):
    """A network of Stable Diffusion 1.x's form, as diffusers saves it."""
    build_reference(**SD1).save_pretrained(tmp_path / "small")
    return tmp_path / "small"


def rewrite_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def rewrite_tensors(folder, change):
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    safetensors.torch.save_file(change(tensors), folder / WEIGHTS)


encode = jax.jit(AutoencoderKL.encode)
decode = jax.jit(AutoencoderKL.decode)


def assert_parity(vae, reference, image):
    """Encode and decode one (3, height, width) image with both and compare mean, standard deviation and image."""
    with torch.no_grad():
        posterior = reference.encode(torch.tensor(np.asarray(image))[None]).latent_dist
        decoded = reference.decode(posterior.mean).sample[0].numpy()
    mean, std = posterior.mean[0].numpy(), posterior.std[0].numpy()
    ours = encode(vae, image)
    assert np.abs(ours.mean - mean).max() <= TOLERANCE
    assert np.abs(ours.std - std).max() <= TOLERANCE
    assert np.abs(decode(vae, mean) - decoded).max() <= TOLERANCE


def random_image(height, width):
    return jax.random.uniform(jax.random.key(0), (3, height, width), minval=-1, maxval=1)


@pytest.mark.slow
def test_full_sd3_configuration_matches_diffusers(tmp_path):
    reference = build_reference(**SD3)
    reference.save_pretrained(tmp_path)
    vae = load_vae(tmp_path)
    assert_parity(vae, reference, random_image(48, 32))
    assert vae.config.stride == 8
    assert (vae.config.scaling_factor, vae.config.shift_factor) == (1.5305, 0.0609)


def test_quant_convolutions_match_diffusers(small_folder):
    reference = diffusers.AutoencoderKL.from_pretrained(small_folder).eval()
    assert_parity(load_vae(small_folder), reference, random_image(32, 48))


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_network_matches_diffusers(name):
    reference = diffusers.AutoencoderKL.from_pretrained(EMBEDDED[name]).float().eval()
    assert_parity(load_vae(name), reference, random_image(64, 64))


def test_log_variance_is_clamped_as_in_diffusers(small_folder):
    def overflow(tensors):
        tensors["quant_conv.bias"][4:6] = torch.tensor([1000.0, -1000.0])
        return tensors

    rewrite_tensors(small_folder, overflow)
    std = encode(load_vae(small_folder), random_image(16, 16)).std
    np.testing.assert_allclose(std[0], np.exp(10.0), rtol=1e-5)
    np.testing.assert_allclose(std[1], np.exp(-15.0), rtol=1e-5)


def test_old_attention_names_load_the_same_network(small_folder):
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(tensors):
        for new, old in old_names.items():
            tensors = {key.replace(f".{new}.", f".{old}."): tensor for key, tensor in tensors.items()}
        return tensors

    before = load_vae(small_folder)
    rewrite_tensors(small_folder, rename)
    assert jax.tree.all(jax.tree.map(np.array_equal, before.encoder, load_vae(small_folder).encoder))


def test_sharded_weights_load_the_same_network(small_folder, tmp_path):
    diffusers.AutoencoderKL.from_pretrained(small_folder).save_pretrained(tmp_path / "sharded", max_shard_size="500KB")
    assert len(list((tmp_path / "sharded").glob("*-of-*.safetensors"))) > 1
    whole, sharded = load_vae(small_folder), load_vae(tmp_path / "sharded")
    assert jax.tree.all(jax.tree.map(np.array_equal, whole.decoder, sharded.decoder))


def test_bfloat16_file_and_bfloat16_computation(small_folder):
    exact = encode(load_vae(small_folder), random_image(16, 16))
    rewrite_tensors(small_folder, lambda tensors: {key: tensor.bfloat16() for key, tensor in tensors.items()})
    vae = load_vae(small_folder, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(vae)} == {jnp.dtype(jnp.bfloat16)}
    rough = encode(vae, random_image(16, 16))
    assert rough.mean.dtype == rough.std.dtype == jax.eval_shape(decode, vae, rough.mean).dtype == jnp.float32
    assert np.abs(rough.mean - exact.mean).mean() < 0.05 * np.abs(exact.mean).mean()


def test_pipeline_folder_is_searched_for_its_vae(small_folder):
    pipeline = small_folder.parent / "pipeline"
    pipeline.mkdir()
    small_folder.rename(pipeline / "vae")
    assert load_vae(str(pipeline)).fingerprint == load_vae(pipeline / "vae").fingerprint


def test_fingerprint_distinguishes_networks_and_settings(small_folder):
    fingerprints = [load_vae(small_folder).fingerprint, load_vae(small_folder).fingerprint]
    rewrite_config(small_folder, scaling_factor=0.5)
    fingerprints.append(load_vae(small_folder).fingerprint)
    rewrite_tensors(small_folder, lambda tensors: {key: 2 * tensor for key, tensor in tensors.items()})
    fingerprints.append(load_vae(small_folder).fingerprint)
    assert fingerprints[0] == fingerprints[1]
    assert len(set(fingerprints)) == 3
    assert all(len(value) == 16 and int(value, 16) >= 0 for value in fingerprints)


def load_error(name):
    """The one-line error of `load_vae` for `name`."""
    with pytest.raises(ValueError) as caught:
        load_vae(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_missing_unexpected_or_misshapen_tensor_is_listed(small_folder):
    def damage(tensors):
        del tensors["encoder.conv_in.bias"], tensors["decoder.mid_block.attentions.0.to_out.0.weight"]
        tensors["loss.discriminator"] = torch.zeros(1)
        tensors["quant_conv.weight"] = torch.zeros(8, 8)
        tensors["quant_conv.bias"] = torch.zeros(8, dtype=torch.int32)
        return tensors

    rewrite_tensors(small_folder, damage)
    message = load_error(small_folder)
    assert str(small_folder) in message
    assert "2 missing: decoder.mid_block.attentions.0.to_out.0.weight, encoder.conv_in.bias" in message
    assert "1 unexpected: loss.discriminator" in message
    assert "2 different: " in message
    assert "quant_conv.weight float[8, 8] for float[8, 8, 1, 1]" in message
    assert "quant_conv.bias int32[8] for float[8]" in message


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("_class_name", "AutoencoderTiny", ": must be 'AutoencoderKL', got 'AutoencoderTiny'"),
        ("act_fn", "mish", ": must be 'silu', got 'mish'"),
        (
            "down_block_types",
            ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
            "[1]: must be 'DownEncoderBlock2D', got 'AttnDownEncoderBlock2D'",
        ),
        ("up_block_types", ["UpDecoderBlock2D"], ": must be a list of 2, got ['UpDecoderBlock2D']"),
        ("latents_mean", [0.0, 0.0], ": must be null, got [0.0, 0.0]"),
        ("block_out_channels", 32, ": must be a valid array, got 32"),
        ("block_out_channels", [], ": must have at least 1 item, got []"),
        ("block_out_channels", [32, 60], ": must be multiples of norm_num_groups="),
        ("layers_per_block", 1.5, ": must be a valid integer, got 1.5"),
        ("latent_channels", 0, ": must be greater than or equal to 1, got 0"),
        ("use_quant_conv", "yes", ": must be a valid boolean, got 'yes'"),
        ("scaling_factor", float("nan"), ": must be a finite number, got nan"),
        ("shift_factor", "0", ": must be a valid number, got '0'"),
    ],
)
def test_other_configurations_are_refused_by_field_and_value(small_folder, field, value, told):
    rewrite_config(small_folder, **{field: value})
    assert load_error(small_folder).startswith(f"{small_folder / 'config.json'}: {field}{told}")


def test_null_shift_factor_means_no_shift(small_folder):
    rewrite_config(small_folder, shift_factor=None)
    assert load_vae(small_folder).config.shift_factor == 0.0


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", None], ids=["empty", "foreign", "truncated"])
def test_damaged_weights_are_named(small_folder, content):
    weights = small_folder / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-100] if content is None else content)
    assert load_error(small_folder).startswith(f"{weights}: not a readable safetensors file")


@pytest.mark.parametrize("content", ["{", "[]", b"\xff\xfe"], ids=["truncated", "list", "binary"])
def test_damaged_config_is_named(small_folder, content):
    file = small_folder / "config.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert load_error(small_folder).startswith(f"{file}: ")


def test_folder_without_weights_or_config_is_named(small_folder):
    (small_folder / WEIGHTS).unlink()
    assert load_error(small_folder).startswith(f"{small_folder}: must hold {WEIGHTS}")
    (small_folder / "config.json").unlink()
    assert str(small_folder) in load_error(small_folder)


@pytest.mark.parametrize("name", ["../outside.safetensors", "absent.safetensors", 7, "."])
def test_index_cannot_lead_out_of_its_folder(small_folder, name):
    (small_folder / WEIGHTS).rename(small_folder.parent / "outside.safetensors")
    index = small_folder / f"{WEIGHTS}.index.json"
    index.write_text(json.dumps({"weight_map": {"encoder.conv_in.weight": name}}))
    assert load_error(small_folder) == f"{index}: weight_map must name files in its folder, not {name!r}"


def test_unreachable_name_says_what_is_accepted(monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", raise_no_network)
    message = load_error("no-such-owner/no-such-vae")
    assert message.startswith("vae: must be 'openmoji', 'emoji', an existing folder or a reachable Hugging Face hub id")
    assert "'no-such-owner/no-such-vae'" in message
    assert "no network" in message


def raise_no_network(*_, **__):
    raise ConnectionError("no network\nand a second line")


def test_hub_id_downloads_only_the_network(small_folder, monkeypatch):
    asked = {}

    def snapshot_download(name, *, allow_patterns):
        asked[name] = allow_patterns
        return str(small_folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert load_vae("owner/vae").fingerprint == load_vae(small_folder).fingerprint
    assert {"config.json", WEIGHTS, f"vae/{WEIGHTS}"} <= set(asked["owner/vae"])
    assert not any(pattern.startswith("*") for pattern in asked["owner/vae"])
