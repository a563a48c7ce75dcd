"""Frozen networks whose files claim sizes that their tensors do not have: one short line, before anything is built."""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from text_folders import write_t5gemma

from flowdit.fields import listed, shown
from flowdit.models.t5gemma import load_t5gemma
from flowdit.models.vae import WEIGHTS_STEM, load_vae

BILLION = 10**9
BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> Path:
    pytest.importorskip("torch", reason="needs torch")
    import diffusers

    folder = tmp_path_factory.mktemp("networks") / "vae"
    diffusers.AutoencoderKL(**BLOCKS, block_out_channels=(8, 8), norm_num_groups=4).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def t5gemma(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("networks") / "t5gemma"
    write_t5gemma(folder, prefix="")
    return folder


def refusal(load) -> str:
    """The line of an error that is raised at once."""
    start = time.monotonic()
    with pytest.raises(ValueError) as caught:
        load()
    assert time.monotonic() - start < 5
    line = str(caught.value)
    assert len(line) < 1_000 and "\n" not in line
    return line


def with_fields(folder: Path, **changes) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers_per_block": BILLION}, "layers_per_block: must be 1, as in its tensors, got 1000000000"),
        ({"layers_per_block": 2}, "layers_per_block: must be 1, as in its tensors, got 2"),
        (
            {"block_out_channels": [8] * 20_000, "down_block_types": ["DownEncoderBlock2D"] * 20_000},
            "block_out_channels: must be a list of 2, as in its tensors, got [8, 8, 8",
        ),
        ({"block_out_channels": [8, 10**12]}, "block_out_channels: must be at most 8, the largest size of a tensor"),
        ({"latent_channels": 10**30}, "latent_channels: must be at most 8, the largest size of a tensor"),
        ({"scaling_factor": 10**400}, "scaling_factor: must be a finite number, got 1000"),
        ({"down_block_types": ["x"] * 100_000}, "down_block_types[0]: must be 'DownEncoderBlock2D', got 'x'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_vae(vae, tmp_path, changes, message):
    folder = with_fields(Path(shutil.copytree(vae, tmp_path / "vae")), **changes)
    assert refusal(lambda: load_vae(folder)).startswith(f"{folder / 'config.json'}: {message}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_hidden_layers": BILLION, "layer_types": None},
            "num_hidden_layers: must be at most 3, the number of layers in its tensors, got 1000000000",
        ),
        ({"hidden_size": 10**12}, "hidden_size: must be at most 320, the largest size of a tensor, got 1000000000000"),
        ({"head_dim": 10**30}, "head_dim: must be at most 320, the largest size of a tensor, got 1000"),
        ({"sliding_window": 10**30}, "sliding_window: must be less than 2147483648, got 1000"),
        ({"query_pre_attn_scalar": 10**400}, "query_pre_attn_scalar: must be a finite number, got 1000"),
        ({"layer_types": ["full_attention"] * 100_000}, "layer_types: must be a list of 3, got ['full_attention', "),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_text_encoder(t5gemma, tmp_path, changes, message):
    folder = with_fields(Path(shutil.copytree(t5gemma, tmp_path / "t5gemma")), **changes)
    assert refusal(lambda: load_t5gemma(folder, "float32")).startswith(f"{folder}: {message}")


@pytest.mark.parametrize(
    ("name", "stem", "load"),
    [("vae", WEIGHTS_STEM, load_vae), ("t5gemma", "model", lambda folder: load_t5gemma(folder, "float32"))],
    ids=["vae", "t5gemma"],
)
def test_names_are_listed_up_to_five_and_nan_is_refused(request, tmp_path, name, stem, load):
    folder = Path(shutil.copytree(request.getfixturevalue(name), tmp_path / name))
    file = folder / f"{stem}.safetensors"
    tensors = safetensors.numpy.load_file(file)
    extra = {f"norm.extra.{i:03d}": np.zeros(1, np.float32) for i in range(489)}
    safetensors.numpy.save_file(tensors | extra, file)
    first = ", ".join(list(extra)[:5])
    assert refusal(lambda: load(folder)).endswith(f"but 489 unexpected: {first} ... and 484 more")
    key = sorted(tensors)[0]
    safetensors.numpy.save_file(tensors | {key: np.full_like(tensors[key], np.nan)}, file)
    message = f"{file}: tensors must hold finite numbers, but NaN or infinity is in {key}"
    assert refusal(lambda: load(folder)) == message


def test_what_error_messages_show():
    assert listed(["a", "b"]) == "a, b"
    assert listed([str(i) for i in range(489)]) == "0, 1, 2, 3, 4 ... and 484 more"
    assert listed(["a\nb", "x" * 1_000]) == rf"'a\nb', {'x' * 117}..."
    assert shown("a") == "'a'" and len(shown([1] * 10_000)) == 80
