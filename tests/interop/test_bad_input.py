"""Damaged, unsupported and dangerous input: one clear line, nothing written, nothing run."""

import argparse
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from interop.foreign_folders import TIME_WEIGHT, copied, refused, with_json, with_tensors
from runs import call, error_line

from flowdit.convert import main as convert

pytest.importorskip("torch", reason="needs torch")

import diffusers
import torch
from original_models import DiT, randomised


def test_missing_and_extra_tensors_are_all_listed(stock, tmp_path):
    def change(tensors):
        del tensors["proj_out_1.bias"], tensors["transformer_blocks.1.attn1.to_k.weight"]
        tensors["transformer_blocks.0.attn1.norm_q.weight"] = tensors["extra"] = np.zeros(4, np.float32)

    line = refused(with_tensors(copied(stock, "dit", tmp_path), change))
    assert "2 missing: proj_out_1.bias, transformer_blocks.1.attn1.to_k.weight; " in line
    assert "2 unexpected: extra, transformer_blocks.0.attn1.norm_q.weight" in line


def test_tensors_of_another_shape(stock, tmp_path):
    def change(tensors):
        tensors["proj_out_1.bias"] = np.zeros(7, np.float32)
        tensors["transformer_blocks.1.ff.net.2.weight"] = np.zeros((32, 64), np.float32)

    line = refused(with_tensors(copied(stock, "dit", tmp_path), change))
    assert "2 different: proj_out_1.bias [7] for [96], " in line
    assert "transformer_blocks.1.ff.net.2.weight [32, 64] for [48, 192]" in line


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"_class_name": "UNet2DConditionModel"},
            "must be one of DiTTransformer2DModel, .* got 'UNet2DConditionModel'",
        ),
        ({"sample_size": 7}, "config.json: sample_size: must be divisible by patch_size=2, got 7"),
    ],
)
def test_another_architecture(stock, tmp_path, changes, message):
    folder = copied(stock, "dit", tmp_path)
    with_json(folder / "config.json", **changes)
    assert re.search(message, refused(folder))


def test_file_of_another_network(tmp_path):
    torch.save({"conv_in.weight": torch.zeros(3), "mid_block.bias": torch.zeros(3)}, tmp_path / "unet.pt")
    assert "must be a checkpoint of DiT, SiT or PixArt, it holds conv_in.weight" in refused(tmp_path / "unet.pt")


def test_embedders_that_differ_between_blocks(stock, tmp_path):
    def change(tensors):
        tensors[TIME_WEIGHT.format(1)] += 1

    line = refused(with_tensors(copied(stock, "dit", tmp_path), change))
    assert f"{TIME_WEIGHT.format(1)} must equal {TIME_WEIGHT.format(0)}" in line


def test_mixed_dtypes(stock, tmp_path):
    def change(tensors):
        tensors["proj_out_1.bias"] = tensors["proj_out_1.bias"].astype(np.float16)

    line = refused(with_tensors(copied(stock, "dit", tmp_path), change))
    assert "must hold tensors of one float dtype, got 1 float16 (proj_out_1.bias); " in line


def test_half_written_folder(stock, tmp_path):
    folder = copied(stock, "sharded", tmp_path)
    shard = sorted(folder.glob("*-of-*.safetensors"))[0]
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    assert shard.name in refused(folder) and "not a readable safetensors file" in refused(folder)
    shard.unlink()
    assert f"weight_map must name files in its folder, not '{shard.name}'" in refused(folder)
    (folder / "diffusion_pytorch_model.safetensors.index.json").unlink()
    assert "must hold diffusion_pytorch_model.safetensors" in refused(folder)


def test_truncated_torch_file(stock, tmp_path):
    content = (stock / "dit.pt").read_bytes()
    (tmp_path / "dit.pt").write_bytes(content[: len(content) // 2])
    assert "dit.pt must hold tensors only: " in refused(tmp_path / "dit.pt", "format=dit")


class Dangerous:
    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_that_imports_runs_nothing(tmp_path, zipped):
    touched, file = tmp_path / "touched", tmp_path / "dit.pt"
    torch.save({"ema": Dangerous(touched)}, file, _use_new_zipfile_serialization=zipped)
    line = refused(file, "format=dit")
    assert "dit.pt must hold tensors only: " in line and "system" in line
    assert not touched.exists()


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ({"model": "SiT-B/2", "path_type": "GVP"}, (), "must be a SiT trained with path_type=Linear, got 'GVP'"),
        (
            {"model": "SiT-B/2", "prediction": "score"},
            (),
            "must be a SiT trained with prediction=velocity, got 'score'",
        ),
        ({"model": "DiT-B/2"}, ("format=sit",), "which was trained as DiT-B/2, got sit"),
    ],
)
def test_training_arguments_of_a_checkpoint(tmp_path, arguments, options, message):
    state = randomised(DiT(dim=32, heads=2)).state_dict()
    torch.save({"ema": state, "args": argparse.Namespace(**arguments)}, file := tmp_path / "trained.pt")
    assert refused(file, "num_heads=2", *options).endswith(message)


def test_target_that_exists(stock, tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "mine").write_text("kept")
    line = error_line(call(convert, f"source={stock / 'dit'}", f"target={target}"))
    assert line == f"error: target: must not exist, got '{target}'"
    assert (target / "mine").read_text() == "kept"


def test_missing_information_must_be_given(stock, tmp_path):
    source = Path(shutil.copy(stock / "dit.pt", tmp_path))
    assert "format: must be dit or sit for " in refused(source)
    assert "num_heads: must be given and divide the width 32" in refused(source, "format=dit")
    assert "format: must be one of dit, sit, pixart, got 'unet'" in refused(source, "format=unet")


def test_prediction_must_be_known(tmp_path):
    model = diffusers.DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=16, num_layers=1, sample_size=8)
    model.save_pretrained(tmp_path / "pipeline" / "transformer")
    assert "prediction: must be given, as " in refused(tmp_path / "pipeline" / "transformer")
    diffusers.DDIMScheduler(beta_schedule="linear", beta_end=0.02, prediction_type="v_prediction").save_pretrained(
        tmp_path / "pipeline" / "scheduler"
    )
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    assert "prediction_type: must be 'epsilon', got 'v_prediction'" in refused(tmp_path / "pipeline")
    diffusers.DDIMScheduler(beta_schedule="scaled_linear").save_pretrained(tmp_path / "pipeline" / "scheduler")
    assert "beta_schedule: must be 'linear', got 'scaled_linear'" in refused(tmp_path / "pipeline")


def test_positions_that_are_learned(tmp_path):
    state = randomised(DiT(dim=32, heads=2)).state_dict()
    torch.save(state | {"pos_embed": state["pos_embed"] + 1}, tmp_path / "dit.pt")
    assert "pos_embed must be the fixed sin-cos table" in refused(tmp_path / "dit.pt", "format=dit", "num_heads=2")


def test_class_names_of_the_wrong_number(stock, tmp_path):
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    folder = copied(stock, "dit", tmp_path)
    line = refused(folder, f"classes={tmp_path / 'names.txt'}")
    assert "classes: must name the 3 classes of the model, all different, " in line and line.endswith("has 2")


def test_vae_of_another_layout(stock, tmp_path):
    line = refused(copied(stock, "dit", tmp_path), "vae=openmoji")
    assert "vae: must make latents of 4 channels, openmoji makes 16" in line
