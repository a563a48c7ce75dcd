"""Sizes that contradict the file: one short line at once, however large the claimed size."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from interop.foreign_folders import WEIGHTS, copied, refused, short, unreadable, with_json, with_tensors

from flowdit.interop import read_source

pytest.importorskip("torch", reason="needs torch")

import torch

pytestmark = pytest.mark.usefixtures("quick")

BILLION = 10**9
NUM_HEADS = {"format": "dit", "num_heads": 2}


@pytest.mark.parametrize("count", [100_000, BILLION])
@pytest.mark.parametrize("name", ["dit", "pixart"])
def test_missing_blocks(stock, tmp_path, name, count):
    folder = copied(stock, name, tmp_path)
    with_json(folder / "config.json", num_layers=count)
    line = short(refused(folder))
    assert line.endswith(f"config.json: num_layers: must be 2, the number of blocks in its tensors, got {count}")


@pytest.mark.parametrize(
    "field", ["num_attention_heads", "attention_head_dim", "in_channels", "patch_size", "sample_size"]
)
def test_other_sizes(stock, tmp_path, field):
    folder = copied(stock, "dit", tmp_path)
    with_json(folder / "config.json", **{field: 10**12})
    line = short(unreadable(folder))
    assert "config.json: " in line and field in line


def test_list_in_place_of_a_number(stock, tmp_path):
    folder = copied(stock, "dit", tmp_path)
    with_json(folder / "config.json", num_layers=[2] * 1_000_000)
    assert "num_layers: must be a valid integer, got [2, 2, 2" in short(unreadable(folder))


def test_json_nested_without_end(stock, tmp_path):
    folder = copied(stock, "dit", tmp_path)
    (folder / "config.json").write_text("[" * 100_000)
    assert "config.json: is not JSON: " in short(unreadable(folder))


def test_number_of_a_block_in_the_name_of_a_tensor(stock, tmp_path):
    state = torch.load(stock / "dit.pt")
    tensors = {name: tensor.numpy() for name, tensor in state.items()}
    tensors[f"blocks.{BILLION}.attn.qkv.weight"] = tensors["blocks.0.attn.qkv.weight"]
    safetensors.numpy.save_file(tensors, tmp_path / "dit.safetensors")
    line = short(unreadable(tmp_path / "dit.safetensors", **NUM_HEADS))
    assert line.endswith("dit.safetensors must hold tensors of blocks.2, none found")


def test_names_are_listed_up_to_five(stock, tmp_path):
    def change(tensors):
        tensors |= {f"extra.{i:03d}": np.zeros(1, np.float32) for i in range(489)}

    line = short(unreadable(with_tensors(copied(stock, "dit", tmp_path), change)))
    extra = ", ".join(f"extra.{i:03d}" for i in range(5))
    assert line.endswith(f"but 489 unexpected: {extra} ... and 484 more")


def test_long_name_with_line_breaks(stock, tmp_path):
    def change(tensors):
        tensors["two\nlines \x1b[31m" + "x" * 100_000] = np.zeros(1, np.float32)

    line = short(unreadable(with_tensors(copied(stock, "dit", tmp_path), change)))
    assert r"1 unexpected: 'two\nlines \x1b[31mxxx" in line


# --- torch's files ---


def write(path: Path, tensors: dict) -> Path:
    torch.save(tensors, path)
    return path


def test_tensor_longer_than_its_storage(stock, tmp_path):
    state = torch.load(stock / "dit.pt")
    state["blocks.0.mlp.fc1.weight"] = torch.zeros(1).as_strided((10**7, 10**7), (0, 0))
    line = short(unreadable(write(tmp_path / "dit.pt", state), **NUM_HEADS))
    assert line.endswith("dit.pt: 'blocks.0.mlp.fc1.weight' must not be longer than its storage")


def test_tensors_that_share_memory(stock, tmp_path):
    state = torch.load(stock / "dit.pt")
    state["blocks.1.mlp.fc1.weight"] = state["blocks.0.mlp.fc1.weight"]
    line = short(unreadable(write(tmp_path / "dit.pt", state), **NUM_HEADS))
    assert line.endswith("dit.pt must hold each tensor once, several of them share memory")


def test_compressed_entry(stock, tmp_path):
    """Gigabytes of zeros take a megabyte when compressed."""
    with zipfile.ZipFile(stock / "dit.pt") as archive, zipfile.ZipFile(tmp_path / "dit.pt", "w") as packed:
        for entry in archive.infolist():
            packed.writestr(entry.filename, archive.read(entry), zipfile.ZIP_DEFLATED)
    assert short(unreadable(tmp_path / "dit.pt", **NUM_HEADS)).endswith("must hold tensors only: a compressed entry")


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(2, 2).to_sparse(), "must hold dense CPU tensors, 'x' is not one"),
        (torch.zeros(2).to(torch.float8_e4m3fn), "'x' must have a numpy dtype, got torch.float8_e4m3fn"),
    ],
    ids=["sparse", "float8"],
)
def test_tensors_of_another_kind(tmp_path, tensor, message):
    assert short(unreadable(write(tmp_path / "dit.pt", {"x": tensor}), **NUM_HEADS)).endswith(message)


def test_table_of_positions_of_another_shape(stock, tmp_path):
    state = torch.load(stock / "dit.pt")
    state["pos_embed"] = torch.zeros(32)
    message = "pos_embed must have shape [1, tokens, 32], got [32]"
    assert unreadable(write(tmp_path / "dit.pt", state), **NUM_HEADS).endswith(message)


def test_good_files_are_read(stock):
    """Without the changes of the other tests the files are valid."""
    for path in (stock / "dit", stock / "pixart"):
        read_source(str(path))
    assert (stock / "dit" / WEIGHTS).is_file()
