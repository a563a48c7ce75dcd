"""A user's mistake in stage 2 gives one line with field, rule and value, and loses nothing."""

import json
import shutil
from pathlib import Path

import pytest
from damage import SHARD, change_manifest, damage_weights, refused, write_record
from models.text_folders import write_t5gemma
from runs import call, train_here, train_text_here

from flowdit import sample


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("text.max_length=0", "text.max_length: must be at least 1, got 0"),
        ("text.dtype=float16", "text.dtype: must be one of bfloat16, float32, got 'float16'"),
        ("text.encoder=''", "text.encoder: must be"),
        ("data.long_caption_prob=1.5", "data.long_caption_prob: must be in [0, 1], got 1.5"),
        ("model.name=ccdit", "model.name: must be pixart with conditioning=text, got ccdit"),
        ("model.micro_conditioning=true", "model.hidden_dim: must be divisible by 3"),
        ("train.sample_labels=[1]", "train.sample_labels: must be null with conditioning=text"),
        ("train.init_time=2", "train.init_time: must be in [0, 1], got 2.0"),
        ("train.init_shared_map=last", "train.init_shared_map: must be one of block0, mean, got 'last'"),
        ("train.init_class=zero", "train.init_class: must be one of dropped, null_class, got 'zero'"),
        (
            "train.init_from=nowhere",
            "train.init_from: nowhere: must be a checkpoint (<run>/<step>), there is no such folder",
        ),
        ("data.text_cache=nowhere", "nowhere"),
    ],
)
def test_bad_setting(tiny_data, tmp_path, override, expected):
    line = refused(lambda: train_text_here(tiny_data, tmp_path / "run", override), tiny_data)
    assert expected in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"short_caption": None}, "short_caption: is missing"),
        ({"long_caption": 5}, "long_caption: must be a string, got int"),
        ({"short_caption": b"sun"}, "short_caption: must be a string, got bytes"),
    ],
    ids=["missing", "a number", "bytes"],
)
def test_bad_caption(tiny_data, tmp_path, changes, expected):
    data = shutil.copytree(tiny_data, tmp_path / "data")
    write_record(data, **changes)
    line = refused(lambda: train_text_here(data, tmp_path / "run"), data)
    assert line.startswith(f"error: {data / SHARD}: record 5: {expected}"), line


def test_data_without_captions_or_classes(tiny_data, tmp_path):
    data = shutil.copytree(tiny_data, tmp_path / "data")
    change_manifest(data, has_captions=False)
    line = refused(lambda: train_text_here(data, tmp_path / "run"), data)
    needs = f"error: data.path: {data} has no captions, which conditioning=text needs"
    assert line == f"{needs}: prepare the images with captions=... into another folder"
    change_manifest(data, has_captions=True, class_names=[])
    line = refused(lambda: train_here(data, tmp_path / "run"), data)
    assert line.startswith(f"error: data.path: {data} has no classes, which conditioning=labels needs; ")


def test_encoder_folder_without_tokenizer(tiny_data, tmp_path):
    folder = write_t5gemma(tmp_path / "t5gemma")
    (folder / "tokenizer.json").unlink()
    line = refused(lambda: train_text_here(tiny_data, tmp_path / "run", f"text.encoder={folder}"), folder)
    assert line.startswith(f"error: text.encoder: {folder}: must hold tokenizer.json")


def test_encoder_of_another_architecture(tiny_data, tmp_path):
    folder = write_t5gemma(tmp_path / "t5gemma")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    line = refused(lambda: train_text_here(tiny_data, tmp_path / "run", f"text.encoder={folder}"), folder)
    assert line.startswith("error: text.encoder: ")
    assert "bert" in line
    assert "t5gemma" in line


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.depth=3", "model.depth: must be 2 as in train.init_from, got 3"),
        ("model.hidden_dim=48", "model.hidden_dim: must be 32 as in train.init_from, got 48"),
        ("model.patch_size=4", "model.patch_size: must be 2 as in train.init_from, got 4"),
        ("model.qk_norm=false", "model.qk_norm: must be True as in train.init_from, got False"),
    ],
)
def test_start_from_a_class_model_of_another_shape(tiny_data, whole_run, tmp_path, override, expected):
    settings = (f"train.init_from={whole_run / '6'}", override)
    line = refused(lambda: train_text_here(tiny_data, tmp_path / "run", *settings), whole_run)
    assert line == f"error: {expected}"


def test_start_of_a_class_model_from_a_text_model(tiny_data, whole_text_run, tmp_path):
    start = f"train.init_from={whole_text_run / '6'}"
    line = refused(lambda: train_here(tiny_data, tmp_path / "run", start), whole_text_run)
    assert line == "error: train.init_from: must be a ccdit where a ccdit is trained, got pixart"
    assert not (tmp_path / "run").exists()


def test_start_from_a_damaged_checkpoint(tiny_data, whole_run, tmp_path):
    start = shutil.copytree(whole_run / "6", tmp_path / "6")
    file = damage_weights(start)
    line = refused(lambda: train_text_here(tiny_data, tmp_path / "run", f"train.init_from={start}"), start)
    assert line == f"error: train.init_from: {file}: content differs from its checksum"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("text.max_length=16", "text.encoder: must be that of the checkpoint to resume"),
        ("text.dtype=bfloat16", "text.encoder: must be that of the checkpoint to resume"),
        ("data.long_caption_prob=0", "data.long_caption_prob: must be 0.5 as in the checkpoint to resume, got 0"),
        ("data.tag_dropout=0.5", "data.tag_dropout: must be 0.0 as in the checkpoint to resume, got 0.5"),
    ],
)
def test_resume_with_other_text(tiny_data, whole_text_run, override, expected):
    settings = ("train.is_restore=true", "train.num_steps=6", override)
    line = refused(lambda: train_text_here(tiny_data, whole_text_run, *settings), whole_text_run)
    assert line.startswith(f"error: {expected}")


def sample_here(checkpoint: Path, *overrides: str):
    return call(sample.main, f"checkpoint={checkpoint}", "steps=1", "solver=euler", *overrides)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("labels=[1]", "labels: not supported by this model, which takes prompts and negative_prompt"),
        ("prompts=[]", "prompts: must hold at least one prompt"),
        ("prompts_file=nowhere", "prompts_file: nowhere cannot be read"),
        ("prompts_file=empty", "prompts_file: must hold at least one prompt"),
        ("text_encoder=nowhere", "text_encoder: must be an existing folder or"),
    ],
)
def test_bad_sampling(whole_text_run, tmp_path, override, expected):
    (tmp_path / "empty").write_text("\n \n")
    line = refused(lambda: sample_here(whole_text_run / "6", override), whole_text_run)
    assert line.startswith("error: " + expected.format(run=whole_text_run / "6"))


def test_sampling_with_another_encoder(whole_text_run, tmp_path):
    folder = write_t5gemma(tmp_path / "t5gemma")
    line = refused(lambda: sample_here(whole_text_run / "6", f"text_encoder={folder}", "prompts=[sun]"), whole_text_run)
    assert line.startswith("error: text_encoder: must make features of width 256, ") and line.endswith("makes 48")


@pytest.mark.parametrize("field", ["prompts=[sun]", "prompt=sun", "negative_prompt=sun"])
def test_prompts_for_a_class_model(whole_run, field):
    line = refused(lambda: sample_here(whole_run / "6", field), whole_run)
    assert line == f"error: {field.split('=')[0]}: not supported by this model, which takes labels"


def test_a_prompt_that_is_too_long_is_cut_and_named(whole_text_run, tmp_path):
    settings = (f"prompts=[{'red apple ' * 20}, sun]", f"out={tmp_path / 'out'}")
    finished = sample_here(whole_text_run / "6", *settings)
    assert finished.status == 0, finished.err
    warnings = [line for line in finished.out.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1
    assert "longer than 32 tokens" in warnings[0]
    assert "red apple" in warnings[0]
