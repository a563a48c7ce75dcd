"""`train.init_from` between models of one kind: copied parts, freshly initialised parts, and refusals."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from damage import damage_weights
from hydra import compose, initialize_config_module
from runs import CLASS_NAMES, metrics, train_here

from flowdit import load
from flowdit.checkpoint.meta import RunMeta, read_meta
from flowdit.checkpoint.names import named_arrays
from flowdit.checkpoint.writer import save_weights
from flowdit.config import Config, register_schemas, resolve
from flowdit.data.manifest import Manifest
from flowdit.models.config import MODELS, DiTConfig, PixArtConfig
from flowdit.models.reparameterise import check_compatible
from flowdit.training.setup import Run, start_run

CLASS, TEXT = ("config", "experiment=tiny"), ("config_stage2", "experiment=tiny_text")
LATENT = (4, 8, 8)
SHIFT = 0.1
"""Added to every array of the start, compared with a fresh model of the same seed, as some arrays begin at zero."""


def begin(data: Path, run: Path, command: tuple[str, str], *overrides: str) -> Run:
    """The parts of a run before its first step."""
    register_schemas()
    name, *settings = *command, f"data.path={data}", f"train.checkpoint_dir={run}", "train.sample_every=0", *overrides
    with initialize_config_module("flowdit.configs", version_base="1.3"):
        config = resolve(compose(name, settings), Config)
    config.check()
    return start_run(config)


def save_start(folder: Path, run: Run) -> Path:
    """A checkpoint of the weights of the run's model, `SHIFT` away from it."""
    shifted = jax.tree.map(lambda x: x + SHIFT, run.state.ema)
    save_weights(folder, shifted, dataclasses.replace(run.meta, step=7), "float32")
    return folder


def retold(start: Path, folder: Path, **changes: Any) -> Path:
    """A checkpoint with the weights of `start` and other metadata."""
    save_weights(folder, load(str(start)).trained.model, RunMeta.parse(read_meta(start).dump() | changes), "float32")
    return folder


@pytest.fixture(scope="module")
def class_start(tiny_data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    return save_start(folder / "7", begin(tiny_data, folder / "run", CLASS))


@pytest.fixture(scope="module")
def text_start(tiny_data, tmp_path_factory) -> Path:
    """With a width divisible by three, for micro-conditioning."""
    folder = tmp_path_factory.mktemp("start")
    return save_start(folder / "7", begin(tiny_data, folder / "run", TEXT, "model.hidden_dim=48"))


def with_classes(data: Path, folder: Path, *names: str) -> Path:
    """The data set with other class names."""
    shutil.copytree(data, folder)
    dataclasses.replace(Manifest.read(data), class_names=names).write(folder)
    return folder


def assert_copied(run: Run, start: Path, *fresh: str) -> None:
    """Check that model and EMA are the start's, except for all arrays of the `fresh` parts."""
    theirs = named_arrays(load(str(start)).trained.model)
    for model in (run.state.model, run.state.ema):
        for name, ours in named_arrays(model).items():
            if name.split(".")[0] not in fresh:
                np.testing.assert_array_equal(ours, theirs[name], err_msg=name)
            elif name in theirs:
                assert abs(float(ours.mean())) < SHIFT / 2 < abs(float(theirs[name].mean())), name


def remarks(messages: list[str], run: Run, start: Path) -> list[str]:
    """The messages about the start, without the last one, that it was made; those on kernels are about the network."""
    messages = [message for message in messages if not message.startswith("compute in ")]
    assert messages[-1] == f"started from {start}"
    assert run.figures == {}
    prefix = f"train.init_from: {start}: "
    assert all(message.startswith(prefix) for message in messages[:-1]), messages
    return [message.removeprefix(prefix) for message in messages[:-1]]


def test_class_model_from_a_class_model(tiny_data, class_start, tmp_path, messages):
    run = begin(tiny_data, tmp_path / "run", CLASS, f"train.init_from={class_start}", "seed=1")
    assert_copied(run, class_start)
    assert remarks(messages(), run, class_start) == []
    assert int(run.state.step) == 0


def test_another_number_of_classes_gives_a_fresh_class_table(tiny_data, class_start, tmp_path, messages):
    data = with_classes(tiny_data, tmp_path / "data", *CLASS_NAMES, "tree")
    run = begin(data, tmp_path / "run", CLASS, f"train.init_from={class_start}")
    assert_copied(run, class_start, "class_table")
    assert run.state.model.class_table.shape[0] == len(CLASS_NAMES) + 2
    assert remarks(messages(), run, class_start) == [
        "class_table is freshly initialised: it has 4 classes, the data have 5",
    ]


def test_other_class_names_are_reported(tiny_data, class_start, tmp_path, messages):
    data = with_classes(tiny_data, tmp_path / "data", "cat", "wolf", "heart", "moon")
    run = begin(data, tmp_path / "run", CLASS, f"train.init_from={class_start}")
    assert_copied(run, class_start)
    assert remarks(messages(), run, class_start) == [
        "2 of its 4 classes have other names: dog is now wolf, sun is now moon"
    ]


def test_another_objective_and_normalisation_are_reported(tiny_data, class_start, tmp_path, messages):
    start = retold(class_start, tmp_path / "7", prediction="noise", latent_mean=[0.5] * 16)
    run = begin(tiny_data, tmp_path / "run", CLASS, f"train.init_from={start}")
    assert remarks(messages(), run, start) == [
        "was trained on latents with another mean and scale",
        "predicts the noise, this run trains the velocity: the objective changes",
    ]
    assert run.meta.prediction == "velocity" and "prediction" not in run.meta.dump()


def test_a_start_is_laid_out_on_a_mesh(tiny_data, class_start, tmp_path):
    run = begin(tiny_data, tmp_path / "run", CLASS, f"train.init_from={class_start}", "mesh.fsdp=2", "mesh.tensor=2")
    assert_copied(run, class_start)
    weight = run.state.model.blocks.attention.qkv.weight
    assert weight.addressable_shards[0].data.size == weight.size // 4


def test_a_run_folder_is_its_newest_intact_step(tiny_data, whole_run, tmp_path, messages):
    old = shutil.copytree(whole_run, tmp_path / "runs" / "old")
    damage_weights(old / "6")
    begin(tiny_data, tmp_path / "run", CLASS, f"train.init_from={old}")
    assert f"checkpoint {old / '6'} is damaged and skipped: " in "".join(messages())
    assert f"{old / '4'}: the newest intact checkpoint of the run" in messages()
    with pytest.raises(ValueError, match=rf"^train\.init_from: .*it holds the run folders {old} \(newest step 6\)$"):
        begin(tiny_data, tmp_path / "other", CLASS, f"train.init_from={old.parent}")


def test_training_continues_from_the_start(tiny_data, whole_run, tmp_path):
    """On the same batch and noise as the first step of the original run."""
    finished = train_here(tiny_data, tmp_path / "run", f"train.init_from={whole_run / '6'}")
    assert (finished.status, finished.err) == (0, "")
    assert f"started from {whole_run / '6'}\n" in finished.out
    before, now = metrics(whole_run, "train/loss"), metrics(tmp_path / "run", "train/loss")
    assert now[1] < before[1] - 1e-3


def text_run(data: Path, folder: Path, start: Path, *overrides: str) -> Run:
    return begin(data, folder / "run", TEXT, "model.hidden_dim=48", f"train.init_from={start}", *overrides)


def test_text_model_from_a_text_model_on_a_smaller_grid(tiny_data, text_start, tmp_path, messages):
    manifest = read_meta(text_start).dump()["manifest"] | {"latent_shape": [16, 4, 4], "image_size": 32}
    start = retold(text_start, tmp_path / "7", manifest=manifest)
    run = text_run(tiny_data, tmp_path, start, "model.interpolation_scale=2", "seed=1")
    assert_copied(run, start)
    assert remarks(messages(), run, start) == []
    assert run.state.model.settings.positions.interpolation_scale == 2.0


def test_another_text_encoder_gives_fresh_caption_layers(tiny_data, text_start, tmp_path, messages):
    text = read_meta(text_start).dump()["text"]
    start = retold(text_start, tmp_path / "7", text=text | {"name": "t5", "fingerprint": "0" * 16})
    run = text_run(tiny_data, tmp_path, start)
    assert_copied(run, start, "caption_proj", "null_caption")
    encoders = f"t5 ({'0' * 16}, width 256) and wordllama ({text['fingerprint']}, width 256)"
    assert remarks(messages(), run, start) == [
        f"{part} is freshly initialised: the text encoders differ, {encoders}"
        for part in ("caption_proj", "null_caption")
    ]


def test_parts_missing_in_the_start_are_fresh_and_sizes_have_no_effect(tiny_data, text_start, tmp_path, messages):
    run = text_run(tiny_data, tmp_path, text_start, "model.null_tokens=32", "model.micro_conditioning=true")
    model = run.state.model
    assert_copied(run, text_start, "null_caption", "size_embed")
    assert model.null_caption.shape == (32, 256)
    assert not any(x.any() for x in jax.tree.leaves((model.size_embed.side.down, model.size_embed.aspect.down)))
    assert model.size_embed.side.up.weight.any()
    assert remarks(messages(), run, text_start) == [
        "null_caption is freshly initialised: model.null_tokens was 1, is 32",
        "size_embed is freshly initialised: model.micro_conditioning was false; its output starts at zero",
    ]


def test_null_caption_of_several_rows_after_a_class_model(tiny_data, class_start, tmp_path):
    run = begin(tiny_data, tmp_path / "run", TEXT, f"train.init_from={class_start}", "model.null_tokens=32")
    assert run.figures["init/drift_t0.5000"] < 1e-5


@pytest.mark.parametrize("names", [("ccdit", "ccdit"), ("pixart", "pixart"), ("ccdit", "pixart")], ids=" to ".join)
@pytest.mark.parametrize(
    ("field", "value"),
    [("depth", 2), ("time_freq_shift", 1.0), ("time_scale", 1.0), ("mlp_norm_eps", 1e-5), ("interpolation_scale", 2.0)],
)
def test_another_shape_is_refused_by_name(names, field, value):
    theirs, ours = (MODELS[name]() for name in names)
    check_compatible(theirs, ours, LATENT, LATENT)
    with pytest.raises(ValueError) as error:
        check_compatible(theirs, dataclasses.replace(ours, **{field: value}), LATENT, LATENT)
    assert str(error.value) == f"model.{field}: must be {getattr(theirs, field)} as in train.init_from, got {value}"


def test_a_size_embedding_cannot_be_left_out():
    plain = PixArtConfig()
    sized = dataclasses.replace(plain, micro_conditioning=True)
    check_compatible(plain, sized, LATENT, LATENT)
    with pytest.raises(ValueError) as error:
        check_compatible(sized, plain, LATENT, LATENT)
    assert str(error.value) == "model.micro_conditioning: must be True as in train.init_from, got False"


def test_a_class_model_cannot_start_from_a_text_model(tiny_data, text_start, tmp_path):
    message = r"^train\.init_from: must be a ccdit where a ccdit is trained, got pixart"
    with pytest.raises(ValueError, match=message):
        begin(tiny_data, tmp_path / "run", CLASS, f"train.init_from={text_start}")


def test_latents_of_other_channels_are_refused():
    for model in (DiTConfig(), PixArtConfig()):
        with pytest.raises(ValueError, match=r"^train\.init_from: its latents are 16x8x8, the data's are 4x8x8"):
            check_compatible(model, model, (16, 8, 8), LATENT)
