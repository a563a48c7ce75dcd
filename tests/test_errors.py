"""A user's mistake gives one line with field, rule and value, and loses nothing."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from damage import SHARD, agree, change_manifest, damage_weights, refused, write_payloads, write_record
from runs import LATENT_SHAPE, call, error_line, train_here

from flowdit import sample

SETTINGS = [
    # Refused by Hydra: key, reason and value of its long message.
    ("train.num_steps=1.5", "train.num_steps=1.5", "'1.5' of type 'float' could not be converted to Integer"),
    ("train.num_steps=abc", "train.num_steps=abc", "'abc' of type 'str' could not be converted to Integer"),
    ("train.num_steps=null", "train.num_steps=null", "is not Optional"),
    # Refused before Hydra reads it.
    (
        "train.num_stepz=1",
        "train.num_stepz: no such setting; did you mean train.num_steps? (train has num_steps, batch_",
    ),
    ("learning_rate=1", "learning_rate: no such setting; did you mean optim.learning_rate? (there are seed, "),
    ("trian.batch_size=1", "trian.batch_size: no such setting; did you mean train.batch_size?"),
    ("train.num_steps", "train.num_steps: settings are given as key=value"),
    ("--train.num_steps=4", "--train.num_steps=4: no such option; settings are given as key=value"),
    ("train.batch_size=8,16", "train.batch_size: must be one value, got 8,16"),
    ("train.sample_labels=cat,dog", "must be one value, got cat,dog; a list is written in brackets, [cat,dog]"),
    ("train.sample_prompts=[a (b]", "quote a text with a comma, colon, bracket or quote", "got '[a (b]'"),
    ("train.sample_labels=[a", "train.sample_labels=[a", "no viable alternative"),
    ("train.num_steps=${nothing}", "train.num_steps", "Interpolation key 'nothing' not found"),
    ("optim.betas=[0.9,x]", "optim.betas=[0.9,x]", "'x' of type 'str'"),
    ("experiment=nope", "'experiment/nope'", "imagenet256_xl2 openmoji", "tiny"),
    ("model/size=xxl", "'model/size/xxl'", "b l s xl"),
    ("optim=sgd", "'optim/sgd'", "adamw"),
    # Additions that would be silently dropped.
    ("+new.key=1", "new: no such field"),
    ("+train.extra=1", "train.extra: no such field"),
    ("++model.width=1", "model.width: no such field"),
    # Values out of range.
    ("seed=-1", "seed: must be in [0, 2**32), got -1"),
    ("train.num_steps=0", "train.num_steps: must be at least 1, got 0"),
    ("train.save_every=-1", "train.save_every: must be 0 (never) or more, got -1"),
    ("train.keep_every=0", "train.keep_every: must be null or at least 1, got 0"),
    ("train.ema_decay=1", "train.ema_decay: must be in [0, 1), got 1.0"),
    ("train.drop_rate=2", "train.drop_rate: must be in [0, 1], got 2.0"),
    ("train.compute_dtype=float16", "train.compute_dtype: must be one of bfloat16, float32, got 'float16'"),
    ("train.time_distribution=cosine", "train.time_distribution: must be one of", "got 'cosine'"),
    ("train.sampler.solver=rk4", "train.sampler.solver: must be one of euler", "got 'rk4'"),
    ("optim.learning_rate=0", "optim.learning_rate: must be positive, got 0"),
    ("optim.eps=0", "optim.eps: must be positive, got 0"),
    ("optim.weight_decay=-1", "optim.weight_decay: must be 0 or more, got -1"),
    ("optim.final_factor=2", "optim.final_factor: must be in [0, 1], got 2"),
    ("optim.schedule=linear", "optim.schedule: must be one of constant, cosine, wsd, got 'linear'"),
    ("optim.warmup_steps=6", "optim.warmup_steps: must be in [0, train.num_steps=6), got 6"),
    ("optim.name=sgd", "optim.name: must be one of adamw, muon, got 'sgd'"),
    ("optim={schedule: wsd, decay_steps: 7}", "optim.decay_steps: must be at most", "= 2, got 7"),
    ("optim.decay_steps=2", "optim.decay_steps: has no effect without schedule=wsd, got 2"),
    ("optim.muon_momentum=0.9", "optim.muon_momentum: has no effect without name=muon, got 0.9"),
    ("optim.muon_modulation=false", "optim.muon_modulation: has no effect without name=muon, got False"),
    (
        "train={time_distribution: uniform, time_std: 2}",
        "train.time_std: has no effect without time_distribution=logit_normal, got 2.0",
    ),
    ("optim.muon_momentum=1", "optim.muon_momentum: must be in [0, 1), got 1.0"),
    ("model.name=pixart", "model.name: must be ccdit with conditioning=labels, got pixart"),
    ("train.init_from=x", "train.init_from: x: must be a checkpoint (<run>/<step>), there is no such folder"),
    ("train.sample_prompts=[x]", "train.sample_prompts: must be null with conditioning=labels"),
    ("wandb.mode=of", "wandb.mode: must be one of online, offline, disabled, got 'of'"),
    ("data.num_threads=0", "data.num_threads: must be at least 1, got 0"),
    ("data.max_bad_records=-1", "data.max_bad_records: must be 0 (none) or more, got -1"),
    # Inconsistent settings.
    ("train.batch_size=6", "train.batch_size: ", "divisible", "4 devices", "6 / 1 = 6"),
    ("train.gradient_accum=3", "train.gradient_accum: must divide train.batch_size=8, got 3"),
    ("train.gradient_accum=4", "train.batch_size: ", "8 / 4 = 2"),
    ("mesh.fsdp=3", "mesh: ", "4 devices", "fsdp=3"),
    ("mesh.tensor=0", "mesh.tensor: must be at least 1, got 0"),
    ("model.num_heads=3", "model.hidden_dim: must be divisible by num_heads=3, got 32"),
    ("model.patch_size=3", "model.patch_size: ", "8", "3"),
    ("train.latent_mean=[0,0]", "train.latent_mean: ", "16 channels, got 2"),
    ("train.latent_mean=none", "train.latent_mean: ", "got none"),
    ("train.latent_scale=[1]", "train.latent_scale: ", "16 channels, got 1"),
    ("train.latent_scale=100", "train.latent_scale: ", "deviation in [0.5, 2]", "100"),
    ("train.latent_scale=0", "train.latent_scale: must not be 0"),
    ("train.sample_labels=[4]", "train.sample_labels: must be in [0, 4)", "got 4"),
    ("train.sample_labels=[mouse]", "train.sample_labels: ", "cat, dog, heart, sun", "got 'mouse'"),
    ("train.sample_labels=[]", "train.sample_labels: ", "got []"),
]


@pytest.mark.parametrize(("override", "expected"), [(o, e) for o, *e in SETTINGS], ids=[o for o, *_ in SETTINGS])
def test_bad_setting(tiny_data, tmp_path, override, expected):
    line = refused(lambda: train_here(tiny_data, tmp_path / "run", override), tiny_data)
    assert [part for part in expected if part not in line] == [], line
    assert not (tmp_path / "run").exists()


def test_missing_data_path(tmp_path):
    from flowdit.train import stage1

    assert error_line(call(stage1)) == "error: data.path: must be given, as in data.path=..."
    assert list(tmp_path.iterdir()) == []


def truncate(folder: Path) -> None:
    content = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(content[: len(content) // 2])


def truncate_and_agree(folder: Path) -> None:
    truncate(folder)
    agree(folder)


def replace_by_foreign_file(folder: Path) -> None:
    (folder / SHARD).write_bytes(np.random.default_rng(0).bytes(100_000))
    agree(folder)


class Payload:
    """Its pickle runs a command when loaded."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


class BadData(NamedTuple):
    damage: Callable[[Path], Any]
    expected: tuple[str, ...]


FILES = {
    "no such folder": BadData(shutil.rmtree, ("no such folder",)),
    "no manifest": BadData(lambda d: (d / "dataset.json").unlink(), ("no dataset.json in it",)),
    "manifest is not JSON": BadData(lambda d: (d / "dataset.json").write_text("{"), ("dataset.json: is not JSON",)),
    "manifest of another version": BadData(
        lambda d: change_manifest(d, schema_version=9), ("schema_version: must be 1",)
    ),
    "missing shard": BadData(lambda d: (d / SHARD).unlink(), (SHARD, "is missing")),
    "empty shard": BadData(lambda d: (d / SHARD).write_bytes(b""), (SHARD, "bytes, has 0")),
    "truncated shard": BadData(truncate, (SHARD, "must have", "bytes")),
    "truncated shard that the manifest agrees to": BadData(
        truncate_and_agree, (SHARD, "must be a complete ArrayRecord file")
    ),
    "foreign file": BadData(replace_by_foreign_file, (SHARD, "must be a complete ArrayRecord file")),
    "another number of records": BadData(lambda d: agree(d, records=7), (SHARD, "must hold 7 records", "got 24")),
    "images without a size": BadData(
        lambda d: change_manifest(d, image_size=-1), ("dataset.json: image_size: must be vae.stride times", "got -1")
    ),
    "latents of another dtype than the records": BadData(
        lambda d: change_manifest(d, latent_dtype="float32"),
        (".array_record: record ", "latent: must be a float32 array as in latent_dtype", "got an array of float16"),
    ),
    "latents far from unit variance": BadData(
        lambda d: change_manifest(d, channel_std=[40.0] * 16), ("train.latent_scale: ", "deviation in [0.5, 2]")
    ),
}


@pytest.mark.parametrize("bad", FILES.values(), ids=FILES.keys())
def test_bad_data_folder(tiny_data, tmp_path, bad):
    data = shutil.copytree(tiny_data, tmp_path / "data")
    bad.damage(data)
    line = refused(lambda: train_here(data, tmp_path / "run"), data)
    assert line.startswith(("error: train.latent_scale: ", f"error: {data}", f"error: data.path: {data}"))
    assert [part for part in bad.expected if part not in line] == [], line
    assert not (tmp_path / "run").exists()


def test_data_of_another_vae(tiny_data, tmp_path):
    data = shutil.copytree(tiny_data, tmp_path / "data")
    manifest = json.loads((data / "dataset.json").read_text())
    change_manifest(data, vae=manifest["vae"] | {"fingerprint": "0" * 16})
    line = refused(lambda: train_here(data, tmp_path / "run", "train.sample_every=6"), data)
    assert line.startswith("error: vae: must be the one that made the latents (fingerprint 0000000000000000)")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"label": 4}, "label: must be in [0, 4), got 4"),
        ({"label": "cat"}, "label: must be an integer, got str"),
        ({"label": None}, "label: is missing"),
        ({"latent": np.ones((4, 8, 8), np.float16)}, "latent: must have shape (16, 8, 8), got (4, 8, 8)"),
        ({"latent": np.full(LATENT_SHAPE, np.inf, np.float16)}, "latent: must be finite"),
    ],
    ids=["label outside the classes", "label of a wrong type", "no label", "wrong channels", "infinite"],
)
def test_bad_record(tiny_data, tmp_path, changes, expected):
    data = shutil.copytree(tiny_data, tmp_path / "data")
    write_record(data, **changes)
    line = refused(lambda: train_here(data, tmp_path / "run"), data)
    assert line.startswith(f"error: {data / SHARD}: record 5: {expected}"), line


def test_record_that_would_run_a_command(tiny_data, tmp_path):
    data = shutil.copytree(tiny_data, tmp_path / "data")
    write_payloads(data, [pickle.dumps({"latent": Payload(f"touch {tmp_path / 'pwned'}"), "label": 0})] * 24)
    line = refused(lambda: train_here(data, tmp_path / "run"), data)
    assert f"{data / SHARD}: record " in line
    assert f"{os.name}.system is refused" in line
    assert not (tmp_path / "pwned").exists()


@pytest.fixture
def run(whole_run, tmp_path) -> Path:
    """A copy of a finished run."""
    return shutil.copytree(whole_run, tmp_path / "run")


def test_existing_run_is_not_overwritten(tiny_data, run):
    line = refused(lambda: train_here(tiny_data, run), run)
    assert line.startswith(
        f"error: train.checkpoint_dir: {run} already holds a run; resume it with train.is_restore=true"
    )


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.depth=3", "model.depth: must be 2 as in the checkpoint to resume, got 3"),
        ("model.qk_norm=false", "model.qk_norm: must be True as in the checkpoint to resume, got False"),
        ("seed=1", "seed: must be 0 as in the checkpoint to resume, got 1"),
        ("train.batch_size=16", "train.batch_size: must be 8 as in the checkpoint to resume, got 16"),
    ],
)
def test_resume_of_another_run(tiny_data, run, override, expected):
    line = refused(lambda: train_here(tiny_data, run, "train.is_restore=true", override), run)
    assert line == f"error: {expected}"


def test_resume_with_changed_data(tiny_data, tmp_path, run):
    data = shutil.copytree(tiny_data, tmp_path / "data")
    write_record(data)
    line = refused(lambda: train_here(data, run, "train.is_restore=true"), run, data)
    assert line.startswith("error: data.path: the data set must be the one of the checkpoint")
    assert "the data changed since the checkpoint was written" in line


@pytest.mark.parametrize("exists", [False, True], ids=["no folder", "empty folder"])
def test_resume_of_nothing(tiny_data, tmp_path, exists):
    if exists:
        (tmp_path / "run").mkdir()
    line = refused(lambda: train_here(tiny_data, tmp_path / "run", "train.is_restore=true"), tmp_path)
    assert line == f"error: train.is_restore: there is no run to resume in train.checkpoint_dir={tmp_path / 'run'}"


def test_full_disk_is_reported_before_the_first_step(tiny_data, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=1000))
    line = refused(lambda: train_here(tiny_data, tmp_path / "run"), tmp_path)
    assert line.startswith("error: train.checkpoint_dir: a checkpoint needs 9 MB")


def test_disk_that_fills_up_reports_the_last_good_checkpoint(tiny_data, run, monkeypatch):
    shutil.rmtree(run / "6")
    usage = shutil.disk_usage(run)
    answers = iter([usage])  # room at the start, none at the save
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: next(answers, usage._replace(free=1000)))
    line = refused(lambda: train_here(tiny_data, run, "train.is_restore=true"), run / "2", run / "4")
    assert "0 MB free" in line
    assert line.endswith(f"last good: {run / '4'}")


def test_run_folder_below_a_file(tiny_data, tmp_path):
    (tmp_path / "file").write_text("mine")
    line = refused(lambda: train_here(tiny_data, tmp_path / "file" / "run"), tmp_path)
    assert line == f"error: train.checkpoint_dir: {tmp_path / 'file' / 'run'} cannot be written: Not a directory"


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not stop root")
def test_read_only_run_folder(tiny_data, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    line = refused(lambda: train_here(tiny_data, tmp_path / "locked" / "run"))
    assert line == f"error: train.checkpoint_dir: {tmp_path / 'locked' / 'run'} cannot be written: Permission denied"


def sample_here(checkpoint: Path, *overrides: str):
    return call(sample.main, f"checkpoint={checkpoint}", "steps=1", "solver=euler", *overrides)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("labels=[4]", "labels: must be in [0, 4) or a class name (cat, dog, heart, sun), got 4"),
        ("labels=[cats]", "labels: must be in [0, 4) or a class name (cat, dog, heart, sun), got 'cats'"),
        ("steps=0", "steps: must be at least 1, got 0"),
        ("solver=ddim", "solver: must be one of euler, heun, midpoint, dopri5, tsit5, got 'ddim'"),
        ("num_images=0", "num_images: must be at least 1, got 0"),
        ("seed=-1", "seed: must be in [0, 2**32), got -1"),
        ("+extra=1", "extra: no such field in the configuration (overrides with + are not supported)"),
        ("out=file/x", "out: file/x cannot be written: Not a directory"),
        ("vae=file", "vae"),
    ],
)
def test_bad_sampling(whole_run, tmp_path, override, expected):
    (tmp_path / "file").write_text("mine")
    line = refused(lambda: sample_here(whole_run / "6", override), whole_run, tmp_path)
    assert line.startswith(f"error: {expected}")


def test_sampling_without_a_checkpoint():
    assert error_line(call(sample.main)) == "error: checkpoint: must be given, as in checkpoint=..."


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nowhere", "there is no file or folder {path}"),
        ("metrics.jsonl", "{path} must be a folder or end in .safetensors, "),
        (
            "6/state",
            "{path}: must be a checkpoint (<run>/<step>), a run folder, or a folder of diffusers (with config.json), it holds ",
        ),
    ],
    ids=["nothing", "a file", "another folder"],
)
def test_sampling_from_something_else_than_a_checkpoint(run, name, expected):
    line = refused(lambda: sample_here(run / name), run)
    assert line.startswith("error: checkpoint: " + expected.format(path=run / name))


def test_sampling_from_a_damaged_checkpoint(run):
    file = damage_weights(run / "6")
    line = refused(lambda: sample_here(run / "6"), run)
    assert line == f"error: checkpoint: {file}: content differs from its checksum"
