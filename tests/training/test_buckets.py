"""Training on buckets and mixtures: shapes, exact resume, other layouts, changed data, and settings that do not fit."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from runs import (
    FAST,
    REPOSITORY,
    SIDES,
    assert_same_checkpoint,
    error_line,
    finish,
    metrics,
    start,
    stored_arrays,
    stored_json,
    train_here,
    train_text_here,
    write_tiny_data,
)

from flowdit.data.manifest import Manifest

STEPS = ("train.num_steps=8", "optim.warmup_steps=2", "train.save_every=5")
MIX = "data.mix=[{{path: {}, weight: 0.3}}]"


@pytest.fixture(scope="module")
def bucketed(tmp_path_factory) -> Path:
    """Two buckets of 24 training records."""
    return write_tiny_data(tmp_path_factory.mktemp("buckets") / "first", sides=SIDES[:2])


@pytest.fixture(scope="module")
def second(tmp_path_factory) -> Path:
    """Two buckets, of which one is new to `bucketed`."""
    return write_tiny_data(tmp_path_factory.mktemp("buckets") / "second", sides=((4, 16), (8, 8)), seed=1)


@pytest.fixture(scope="module")
def mixed(bucketed, second) -> tuple[str, ...]:
    return (*STEPS, "data.weight=0.7", MIX.format(second))


@pytest.fixture(scope="module")
def whole(bucketed, mixed, tmp_path_factory):
    """An uninterrupted run on the mixture, its output, and its folder."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    finished = train_here(bucketed, run, *mixed, "train.validate_every=4", "train.sample_every=8")
    assert (finished.status, finished.err) == (0, "")
    return finished, run


def test_each_shape_is_compiled_once_ahead_and_reported(whole):
    finished, _ = whole
    compiled = re.findall(r"compiled the step for (\S+) px, (\d) of 3, in \d+\.\d s", finished.out)
    assert compiled == [("64x64", "1"), ("48x80", "2"), ("32x128", "3")]
    assert finished.out.index("compiled the step for 32x128") < finished.out.index("step 1/8")
    assert "data: 96 records, latents 16x8x8 and 2 other shapes, 4 classes" in finished.out


def test_losses_are_finite_and_all_buckets_are_validated(whole):
    _, run = whole
    assert sorted(metrics(run, "validation/loss")) == [4, 8]
    assert all(np.isfinite(loss) for loss in metrics(run, "train/loss").values())
    assert (run / "samples" / "00000008.png").is_file()


def test_a_run_goes_on_exactly_in_the_middle_of_an_epoch(whole, bucketed, mixed, tmp_path):
    _, run = whole
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("8"))
    finished = train_here(bucketed, tmp_path / "run", *mixed, "train.is_restore=true")
    assert (finished.status, finished.err) == (0, "")
    assert f"resumed from {tmp_path / 'run' / '5'}" in finished.out
    assert_same_checkpoint(run / "8", tmp_path / "run" / "8")
    assert stored_json(run / "8", "dataset")["next_batch"] == 8


def test_other_weights_and_changed_data_are_refused_in_one_line(whole, bucketed, second, mixed, tmp_path):
    _, run = whole
    resume = ("train.is_restore=true", *STEPS)
    other = train_here(bucketed, run, *resume, "data.weight=0.5", MIX.format(second))
    assert "data.mix: the weights of the data sets must be [0.7, 0.3] as in the checkpoint" in error_line(other)
    alone = train_here(bucketed, run, *resume, "data.mix=[]")
    assert "data.path: the data set must be the one of the checkpoint, got another" in error_line(alone)
    changed = write_tiny_data(tmp_path / "changed", sides=((4, 16), (8, 8)), seed=2)
    finished = train_here(bucketed, run, *resume, "data.weight=0.7", MIX.format(changed))
    assert re.search(r"got another .*shards \(3 of 6\)", error_line(finished))
    # Weights in the same ratio are the same.
    finished = train_here(bucketed, run, *resume, "data.weight=7", f"data.mix=[{{path: {second}, weight: 3}}]")
    assert finished.status == 0, finished.err


@pytest.mark.slow
def test_four_devices_and_two_processes_train_the_same(whole, bucketed, mixed, tmp_path):
    """On the mixture of buckets: one device, a mesh of four, and two processes with two devices each."""
    from test_processes import run_pair, settings

    _, run = whole
    single = finish(
        start(
            str(REPOSITORY / "train_stage1.py"),
            "experiment=tiny",
            *FAST,
            *mixed,
            f"data.path={bucketed}",
            f"train.checkpoint_dir={tmp_path / 'single'}",
            devices=1,
        )
    )
    assert single.status == 0, single.err
    runs = tmp_path / "pairs"
    runs.mkdir()
    pair = run_pair(settings(1, bucketed, runs / "pair", *mixed, "mesh.fsdp=2"), restore=runs)
    assert all(finished.status == 0 for finished in pair), pair[0].err
    for other in (tmp_path / "single", runs / "pair"):
        assert stored_json(other / "8", "dataset") == stored_json(run / "8", "dataset")
        arrays, others = stored_arrays(run / "8"), stored_arrays(other / "8")
        for name, value in arrays.items():
            np.testing.assert_allclose(value, others[name], atol=2e-5, err_msg=name)


def test_a_bucket_smaller_than_a_batch_is_an_error(bucketed, tmp_path):
    finished = train_here(bucketed, tmp_path / "run", "train.batch_size=32")
    rule = "train.batch_size: must be at most the 24 records of the bucket of 64x64 px and 1 more"
    assert rule in error_line(finished) and "got 32" in error_line(finished)


@pytest.mark.slow
def test_small_buckets_are_filled_from_several_epochs_if_asked(bucketed, tmp_path):
    settings = ("train.num_steps=2", "optim.warmup_steps=0", "train.batch_size=32")
    finished = train_here(bucketed, tmp_path / "run", *settings, "data.merge_small_buckets=true")
    assert finished.status == 0, finished.err


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ("[{path: nowhere}]", "data.mix[0].path: nowhere: no such folder"),
        ("[{path: DATA, weight: 0}]", "data.mix[0]: weight: must be greater than 0, got 0"),
        ("[{path: DATA, weight: .nan}]", "data.mix[0]: weight: must be a"),
        ("[{path: DATA, wait: 1}]", "data.mix[0]: wait: is not a known field"),
        ("[{weight: 1}]", "data.mix[0]: path: is missing"),
        ("[DATA]", "data.mix[0]: must be a"),
        ("[{path: FIRST}]", "data.mix[0].path: must be given once in data.path and data.mix"),
        ("[{path: DATA, text_cache: x}]", "data.mix[0].text_cache: must be given for all data sets"),
        (
            "[{path: DATA, weight: 1e-9}]",
            "data.mix[0].weight: must give the data set a record of each of its 2 buckets",
        ),
    ],
)
def test_a_mixture_that_breaks_a_rule_is_named(bucketed, second, tmp_path, mix, message):
    mix = mix.replace("DATA", str(second)).replace("FIRST", str(bucketed))
    line = error_line(train_here(bucketed, tmp_path / "run", f"data.mix={mix}"))
    assert line.startswith(f"error: {message}"), line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["vae"].update(fingerprint="f0"), "must have the VAE's fingerprint {} as {} has, {} has f0"),
        (lambda d: d["vae"].update(scale=2.0), "must have the VAE's scale"),
        (lambda d: d.update(latent_dtype="float32"), "must have latent_dtype float16 as {} has, {} has float32"),
        (lambda d: d.update(has_latent_std=True), "must have has_latent_std False"),
        (lambda d: d["class_names"].reverse(), "must have the same class names"),
    ],
)
def test_data_sets_that_do_not_fit_one_another_are_both_named(bucketed, second, tmp_path, change, message):
    other = shutil.copytree(second, tmp_path / "other")
    data = json.loads((other / "dataset.json").read_text())
    change(data)
    (other / "dataset.json").write_text(json.dumps(data))
    line = error_line(train_here(bucketed, tmp_path / "run", f"data.mix=[{{path: {other}}}]"))
    fingerprint = (
        data["vae"]["fingerprint"]
        if "{}" not in message
        else json.loads((second / "dataset.json").read_text())["vae"]["fingerprint"]
    )
    parts = [fingerprint, bucketed, other] if "fingerprint" in message else [bucketed, other]
    assert line.startswith("error: data.mix[0].path: " + message.format(*parts)), line
    assert str(bucketed) in line and str(other) in line


@pytest.mark.slow
def test_captions_are_encoded_online_and_each_record_has_its_own_size(tmp_path, tiny_data):
    """A text model with micro-conditioning, on a mixture with a data set without buckets."""
    sizes = write_tiny_data(tmp_path / "sizes", lambda i: {"image_size": (500 + i, 700)}, sides=SIDES)
    finished = train_text_here(
        sizes,
        tmp_path / "run",
        f"data.mix=[{{path: {tiny_data}}}]",
        "train.num_steps=3",
        "optim.warmup_steps=0",
        "train.batch_size=8",
        "model.hidden_dim=96",
        "model.micro_conditioning=true",
        "train.validate_every=3",
        "train.sample_every=3",
        "train.sample_prompts=null",
    )
    assert (finished.status, finished.err) == (0, "")
    assert "compiled the step for 80x48 px, 3 of 3" in finished.out


@pytest.mark.slow
def test_a_run_starts_from_one_at_another_resolution(whole_text_run, bucketed, tmp_path):
    """From a run on squares of one size: the buckets' latents have other sides."""
    finished = train_text_here(
        bucketed,
        tmp_path / "run",
        f"train.init_from={whole_text_run}",
        "train.num_steps=2",
        "train.batch_size=8",
        "optim.warmup_steps=0",
    )
    assert (finished.status, finished.err) == (0, "")
    assert f"started from {whole_text_run}" in finished.out


def test_data_sets_that_are_no_mixture(bucketed, tmp_path):
    again = train_here(bucketed, tmp_path / "run", *STEPS, f"data.mix=[{{path: {bucketed}/.}}]")
    assert error_line(again).startswith("error: data.mix[0].path: must be another data set than ")
    empty = write_tiny_data(tmp_path / "empty", sides=SIDES[:2], seed=3)
    manifest = Manifest.read(empty)
    dataclasses.replace(manifest, shards=manifest.shards_of("validation")).write(empty)
    none = train_here(bucketed, tmp_path / "run", *STEPS, f"data.mix=[{{path: {empty}}}]")
    assert error_line(none) == f"error: data.mix[0].path: {empty}: the data set has no records in split 'train'"
