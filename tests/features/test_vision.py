"""CLIP and DINOv2 compared with transformers on the same files and images, and errors for other files."""

import json

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from vision_folders import WORDS, write_clip, write_dinov2

from flowdit.features import FEATURES, FeatureWeights, load_features
from flowdit.features.clip import load_clip
from flowdit.fields import FieldError

extract = eqx.filter_jit(lambda model, images: model(images).features)
REGISTERS = {"model_type": "dinov2_with_registers", "num_register_tokens": 4}
SQUARE = {"size": {"height": 28, "width": 42}, "do_center_crop": False}


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("torch", reason="needs torch")
    return pytest.importorskip("transformers", reason="needs transformers")


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip") / "model")


def random_images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (2, 40, 56, 3), np.uint8)


def pixels(folder, images):
    """The images as transformers prepares them."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return CLIPImageProcessorPil.from_pretrained(folder)(images=list(images), return_tensors="pt")["pixel_values"]


def dinov2_reference(transformers, folder, images):
    import torch

    with torch.no_grad():
        out = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()(pixels(folder, images))
    return out.last_hidden_state[:, 0].numpy()


@pytest.mark.parametrize(
    ("config", "preprocessing"),
    [
        ({}, {}),
        ({"image_size": 28}, {}),
        ({"use_swiglu_ffn": True, "layer_norm_eps": 1e-3}, SQUARE),
        (REGISTERS, {}),
        (REGISTERS | {"image_size": 63}, SQUARE),
    ],
    ids=["positions of 5x5 to 4x4", "positions as stored", "giant", "registers", "registers, fewer positions"],
)
def test_dinov2_matches_transformers(transformers, tmp_path, config, preprocessing):
    folder, images = write_dinov2(tmp_path / "model", preprocessing, **config), random_images()
    network = load_features("dinov2", FeatureWeights(dinov2=str(folder)))
    expected, ours = dinov2_reference(transformers, folder, images), extract(network.model, jnp.asarray(images))
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    assert (network.width, network.num_classes) == (expected.shape[1], 0)
    assert np.abs(expected[0] - expected[1]).mean() > 0.1  # otherwise the bound would mean little


@pytest.mark.parametrize("kind", ["dinov2", "registers", "clip"])
def test_maps_are_the_patch_tokens_of_whole_images(transformers, tmp_path, kind):
    """As those of transformers for images that its preprocessing does not crop."""
    import torch

    square = {"size": {"height": 28, "width": 28}, "do_center_crop": False}
    if kind == "clip":
        folder, grid = write_clip(tmp_path / "model", size={"height": 32, "width": 32}, do_center_crop=False), (4, 4)
        network = load_features("clip", FeatureWeights(clip=str(folder)))
        model = transformers.CLIPVisionModel.from_pretrained(folder, local_files_only=True)
    else:
        folder, grid = write_dinov2(tmp_path / "model", square, **(REGISTERS if kind == "registers" else {})), (4, 4)
        network = load_features("dinov2", FeatureWeights(dinov2=str(folder)))
        model = transformers.AutoModel.from_pretrained(folder, local_files_only=True)
    images = random_images()
    with torch.no_grad():
        tokens = model.eval()(pixels(folder, images)).last_hidden_state.numpy()
    expected = tokens[:, -grid[0] * grid[1] :].reshape(len(images), *grid, -1)
    maps = eqx.filter_jit(lambda model, images: model.maps(images))(network.model, jnp.asarray(images))
    np.testing.assert_allclose(maps, expected, atol=1e-4)
    assert network.map_shape == expected.shape[1:]
    variant = {"dinov2": "dinov2-32-3", "registers": "dinov2-32-3 4 registers", "clip": "clip-32-3 patch 8"}[kind]
    digest = network.identity.split(", ")[-1]
    assert network.map_identity == f"{variant} {digest}, patch tokens of whole images, float32"


def test_clip_images_match_transformers(transformers, clip_folder):
    import torch

    images, network = random_images(), load_features("clip", FeatureWeights(clip=str(clip_folder)))
    with torch.no_grad():
        model = transformers.CLIPVisionModelWithProjection.from_pretrained(clip_folder, local_files_only=True).eval()
        expected = model(pixels(clip_folder, images)).image_embeds.numpy()
    ours = extract(network.model, jnp.asarray(images))
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    assert network.width == expected.shape[1] and np.abs(expected[0] - expected[1]).mean() > 0.1


def test_clip_texts_match_transformers(transformers, clip_folder):
    """Also an empty text, one that is cut, and one that contains the end token."""
    import torch

    long = " ".join(WORDS[2:])
    texts = ["w1 w2 w3", "", long, "w5 <end> w6", *(f"w{i}" for i in range(30))]
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(clip_folder / "tokenizer.json"), pad_token="w0")
    tokens = tokenizer(texts, truncation=True, max_length=20, padding=True, return_tensors="pt")
    with torch.no_grad():
        model = transformers.CLIPTextModelWithProjection.from_pretrained(clip_folder, local_files_only=True).eval()
        expected = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).text_embeds.numpy()
    clip = load_clip(FeatureWeights(clip=str(clip_folder)))
    np.testing.assert_allclose(clip.encode_texts(texts), expected, atol=1e-4)
    np.testing.assert_allclose(clip.encode_texts(texts[:3]), expected[:3], atol=1e-4)
    assert clip.encode_texts([]).shape == (0, 24) and clip.image.width == 24


def test_the_identity_names_what_changes_a_feature(clip_folder, tmp_path):
    network = load_features("clip", FeatureWeights(clip=str(clip_folder)))
    assert network.identity.startswith("clip-32-3 patch 8 projected, bicubic 36 crop 32x32, float32, ")
    other = write_clip(tmp_path / "other", image_mean=[0.5, 0.5, 0.5])
    assert load_features("clip", FeatureWeights(clip=str(other))).identity != network.identity
    folder = write_dinov2(tmp_path / "dinov2", SQUARE, **REGISTERS)
    identity = load_features("dinov2", FeatureWeights(dinov2=str(folder))).identity
    assert identity.startswith("dinov2-32-3 4 registers class token, bicubic 28x42, float32, ")


@pytest.mark.parametrize("name", [name for name in FEATURES if name != "efficientnet"])
def test_missing_weights_say_how_to_get_them(name):
    with pytest.raises(FieldError, match=rf"weights.{name}: must be given for features={name}: \S+"):
        load_features(name, FeatureWeights())


BAD_CONFIGS = {
    "model_type": ("vit", "config.json: model_type: must be 'dinov2' or 'dinov2_with_registers', got 'vit'"),
    "num_hidden_layers": (10**9, "num_hidden_layers: must be 3, as in its tensors, got 1000000000"),
    "hidden_size": (10**9, "hidden_size: must be at most 128"),
    "num_attention_heads": (5, "hidden_size: must be a multiple of num_attention_heads=5, got 32"),
    "patch_size": (33, "patch_size: must cut an image of 32x32 into 1 to 4096 patches, got 33"),
    "hidden_act": ("relu", "hidden_act: must be 'gelu', got 'relu'"),
    "mlp_ratio": (2, "arrays must be those of the model"),
    "mlp_ratio ": (1e308, "mlp_ratio: must be less than or equal to 64"),
}
BAD_CLIP_CONFIGS = {
    "text_config.vocab_size": (10**30, "vocab_size: must be at most 62, the largest size of a tensor"),
    "text_config.max_position_embeddings": (2, "max_position_embeddings: must be greater than or equal to 3, got 2"),
    "text_config.hidden_act": ("swiglu", "hidden_act: must be 'quick_gelu' or 'gelu', got 'swiglu'"),
    "vision_config.patch_size": (10**9, "patch_size: must cut an image of 32x32 into 1 to 4096 patches"),
    "vision_config.image_size": (10**9, "patch_size: must cut an image of 1000000000x1000000000"),
    "projection_dim": (10**30, "projection_dim: must be at most 40"),
}


@pytest.mark.parametrize("field", BAD_CONFIGS)
def test_another_configuration_is_one_line(tmp_path, field):
    (value, problem), folder = BAD_CONFIGS[field], write_dinov2(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | {field.strip(): value}
    (folder / "config.json").write_text(json.dumps(config))
    check_refused("dinov2", folder, problem)


@pytest.mark.parametrize("field", BAD_CLIP_CONFIGS)
def test_another_configuration_of_clip_is_one_line(tmp_path, field):
    (value, problem), folder = BAD_CLIP_CONFIGS[field], write_clip(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    *parts, name = field.split(".")
    (config[parts[0]] if parts else config)[name] = value
    (folder / "config.json").write_text(json.dumps(config))
    check_refused("clip", folder, problem)


BAD_PREPROCESSING = {
    "size": ({"shortest_edge": 10**9}, "size.*must be less than or equal to 2048"),
    "crop_size": (40, "crop_size: must be at most the size"),
    "resample": (2, "resample: must be 3, got 2"),
    "image_std": ([1, 0, 1], "image_std"),
    "do_center_crop": (False, "size: must have height and width without a crop"),
    "do_resize": (False, "do_resize: must be True"),
}


@pytest.mark.parametrize("field", BAD_PREPROCESSING)
def test_another_preprocessing_is_one_line(tmp_path, field):
    value, problem = BAD_PREPROCESSING[field]
    check_refused("dinov2", write_dinov2(tmp_path / "model", {field: value}), f"preprocessor_config.json: {problem}")


def test_damaged_folders_are_one_line(clip_folder, tmp_path):
    check_refused("dinov2", tmp_path / "none", "must be an existing folder")
    check_refused("dinov2", clip_folder, "must hold model.safetensors|num_hidden_layers|model_type")
    folder = write_clip(tmp_path / "model", size=32, crop_size=16)
    check_refused("clip", folder, r"images must be 32x32, not \(16, 16\)")
    folder = write_clip(tmp_path / "small", size=32, crop_size=32)
    weights = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(weights)
    safetensors.numpy.save_file({k: v for k, v in tensors.items() if k != "visual_projection.weight"}, weights)
    check_refused("clip", folder, "1 missing: projection.weight")
    weights.write_bytes(weights.read_bytes()[:1000])
    check_refused("clip", folder, "not a readable safetensors file")
    (folder / "preprocessor_config.json").unlink()
    check_refused("clip", folder, "cannot be read|not a readable")


def test_a_tokenizer_without_end_token_is_one_line(tmp_path):
    folder = write_clip(tmp_path / "model")
    content = json.loads((folder / "tokenizer.json").read_text()) | {"post_processor": None}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(FieldError, match="tokenizer.json: must add a start and an end token"):
        load_clip(FeatureWeights(clip=str(folder)))


def check_refused(name: str, folder, problem: str) -> None:
    with pytest.raises(FieldError, match=f"(?s)^weights.{name}: .*{problem}") as raised:
        load_features(name, FeatureWeights(**{name: str(folder)}))
    assert "\n" not in str(raised.value)
