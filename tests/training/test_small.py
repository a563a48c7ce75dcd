"""`experiment=small` and `fast`: settings that follow from data and devices, and runs with them."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from hydra import initialize_config_module
from runs import call, write_tiny_data

from flowdit.config import Config, register_schemas
from flowdit.data.loader import DataConfig
from flowdit.data.manifest import Bucket, Manifest, Shard, VaeInfo
from flowdit.fields import FieldError
from flowdit.hardware import Machine, this_machine
from flowdit.models.config import DiTConfig, PixArtConfig
from flowdit.models.dit import build_dit
from flowdit.sized import choose_sizes, typed_keys
from flowdit.train import stage1, stage2
from flowdit.training.estimate import Condition, duration, network_size, step_memory
from flowdit.training.small import choose

CPU = Machine("2 CPU cores", is_accelerator=False, num_devices=1, memory=16e9, flops=40e9)
GPU = Machine("1 x GPU", is_accelerator=True, num_devices=1, memory=24e9, flops=30e12)
EIGHT_GPUS = Machine("8 x GPU", is_accelerator=True, num_devices=8, memory=80e9, flops=1e15)
EMBEDDED = (16, 8, 8)
SD3_256 = (16, 32, 32)


def data_set(
    train: int, latent_shape=EMBEDDED, classes: int = 8, held_out: int = 10, captions: bool = True
) -> Manifest:
    counts = {"train": train, "validation": held_out}
    shards = [Shard(f"{split}.array_record", split, n, 1, "") for split, n in counts.items() if n]  # type: ignore[arg-type]
    return Manifest(
        latent_shape=latent_shape,
        latent_dtype="float16",
        has_latent_std=False,
        vae=VaeInfo("openmoji", "", 0.0, 1.0, stride=8),
        image_size=8 * latent_shape[1],
        channel_mean=(0.0,) * latent_shape[0],
        channel_std=(1.0,) * latent_shape[0],
        class_names=tuple(f"class {i}" for i in range(classes)),
        has_captions=captions,
        shards=tuple(shards),
        license="",
        attribution="",
    )


CASES = [
    *((data_set(images), CPU) for images in (1, 3, 40, 400, 12_000)),
    (data_set(2_000, SD3_256, classes=100), CPU),
    (data_set(400, (16, 9, 9), classes=1), CPU),
    (data_set(50, (4, 4, 6)), CPU),
    (data_set(300), GPU),
    (data_set(12_000, SD3_256, classes=3), GPU),
    (data_set(40_000, (16, 128, 128)), EIGHT_GPUS),
    (data_set(3), EIGHT_GPUS),
]


@pytest.mark.parametrize(("manifest", "machine"), CASES)
def test_choices_are_valid_for_any_data(manifest, machine):
    values = choose(manifest, machine, "ccdit", Condition(), {}).values
    images, devices = manifest.num_records("train"), machine.num_devices
    batch, steps, accum = (values[f"train.{name}"] for name in ("batch_size", "num_steps", "gradient_accum"))
    model = DiTConfig(**{key[6:]: value for key, value in values.items() if key.startswith("model.")})

    model.check(manifest.latent_shape)
    assert batch % (accum * devices) == 0
    assert batch <= max(images, devices)
    assert 600 <= steps <= 40_000
    assert batch * steps <= max(200 * images, 1_000 * batch)  # not many more passes than a model can use
    assert 0 <= values["optim.warmup_steps"] < steps
    assert 0 < values["optim.learning_rate"] < 0.01
    for name in ("save_every", "validate_every", "sample_every", "log_every"):
        assert 1 <= values[f"train.{name}"] <= steps
    labels = values.get("train.sample_labels", [])
    assert len(labels) <= 16 and set(labels) <= set(range(manifest.num_classes))


@pytest.mark.parametrize(
    ("images", "machine", "at_most_minutes"), [(12_000, CPU, 8), (400, CPU, 5), (12_000, GPU, 60), (50_000, GPU, 120)]
)
def test_a_run_ends_in_sensible_time(images, machine, at_most_minutes):
    values = choose(data_set(images), machine, "ccdit", Condition(), {}).values
    model = DiTConfig(**{key[6:]: value for key, value in values.items() if key.startswith("model.")})
    flops = network_size(model, EMBEDDED, Condition(8)).image_flops
    assert flops * values["train.batch_size"] * values["train.num_steps"] / machine.flops < 60 * at_most_minutes


def test_a_typed_value_is_kept_and_others_follow():
    sizes = choose(data_set(12_000), CPU, "ccdit", Condition(), {"model.hidden_dim": 256, "train.num_steps": 100})
    assert not {"model.hidden_dim", "train.num_steps"} & sizes.values.keys()
    assert sizes.values["optim.learning_rate"] == 0.003  # half of that for width 128
    assert sizes.values["train.save_every"] == 12
    assert sizes.values["optim.warmup_steps"] == 5
    assert not any("num_steps" in line for line in sizes.lines())
    assert (
        choose(data_set(400), CPU, "ccdit", Condition(), {"train.gradient_accum": 3}).values["train.batch_size"] == 66
    )


def test_muon_has_smaller_batches_and_twice_the_steps_on_a_cpu():
    adamw, muon = (
        choose(data_set(12_000), CPU, "ccdit", Condition(), {}, optimizer=name).values for name in ("adamw", "muon")
    )
    assert (adamw["train.batch_size"], adamw["train.num_steps"], adamw["optim.learning_rate"]) == (64, 1_800, 6e-3)
    assert (muon["train.batch_size"], muon["train.num_steps"], muon["optim.learning_rate"]) == (32, 3_600, 6e-3)
    few = choose(data_set(40), CPU, "ccdit", Condition(), {}, optimizer="muon").values
    assert (few["train.batch_size"], few["optim.learning_rate"]) == (8, 3e-3)  # the root of a quarter
    gpu = [choose(data_set(12_000), GPU, "ccdit", Condition(), {}, optimizer=name).values for name in ("adamw", "muon")]
    assert gpu[0] == gpu[1]


@pytest.mark.parametrize(
    ("latent_shape", "preset", "chosen"), [(EMBEDDED, 2.5, None), (SD3_256, 1.0, 2.0), (SD3_256, 2.5, 2.5)]
)
def test_the_time_shift_is_that_of_the_preset_or_a_larger_one_for_the_latents(latent_shape, preset, chosen):
    values = choose(data_set(400, latent_shape), GPU, "ccdit", Condition(), {}, time_shift=preset).values
    assert values.get("train.time_shift") == chosen
    assert values.get("train.sampler.time_shift") == (2.0 if latent_shape == SD3_256 else None)


def test_a_larger_patch_is_taken_where_the_memory_is_small():
    patch = {}
    for memory in (80e9, 4e9):
        machine = GPU._replace(memory=memory)
        patch[memory] = choose(data_set(5_000, SD3_256), machine, "ccdit", Condition(), {}).values["model.patch_size"]
    assert patch[80e9] == 2
    assert patch[4e9] == 4


def typed_labels(manifest: Manifest) -> dict:
    return choose(manifest, CPU, "ccdit", Condition(), {"conditioning": "labels"}).values


def test_the_patch_divides_the_latents_of_all_buckets():
    manifest = data_set(400)
    shard = dataclasses.replace(manifest.shards[0], buckets=(200, 200))
    buckets = (Bucket(64, 64), Bucket(8 * 7, 8 * 9))
    manifest = dataclasses.replace(manifest, shards=(shard,), buckets=buckets)
    assert choose(manifest, CPU, "ccdit", Condition(), {}).values["model.patch_size"] == 1


def test_the_condition_follows_the_data():
    without = data_set(400, classes=0, captions=False)
    assert choose(without, CPU, "ccdit", Condition(), {}).values["conditioning"] == "none"
    assert not {"conditioning", "train.sample_labels"} & typed_labels(without).keys()
    assert "conditioning" not in choose(data_set(400), CPU, "ccdit", Condition(), {}).values
    captioned = choose(data_set(400, classes=0), CPU, "ccdit", Condition(), {}).lines()
    assert any("conditioning=none" in line and "small_text" in line for line in captioned)
    unconditional = choose(data_set(400), CPU, "ccdit", Condition(), {"conditioning": "none"}).values
    assert "train.sample_labels" not in unconditional


def test_previews_show_each_class_equally_or_no_captions_where_none_are_held_out():
    labels = choose(data_set(400, classes=3), CPU, "ccdit", Condition(), {}).values["train.sample_labels"]
    assert labels == [0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2]
    text = Condition(text_tokens=32, text_width=256)
    assert choose(data_set(400), CPU, "pixart", text, {}).values["train.sample_every"] == 120
    assert choose(data_set(400, held_out=0), CPU, "pixart", text, {}).values["train.sample_every"] == 0


def test_a_typed_value_that_does_not_fit_is_named():
    with pytest.raises(FieldError, match="model.patch_size: must divide"):
        choose(data_set(400), CPU, "ccdit", Condition(), {"model.patch_size": 3})


def test_every_choice_has_a_reason_and_few_images_a_warning():
    sizes = choose(data_set(3), CPU, "ccdit", Condition(), {})
    assert all(choice.reason for choice in sizes.choices)
    assert "3 training images are few" in sizes.lines()[-1]
    assert "few" not in choose(data_set(400), CPU, "ccdit", Condition(), {}).lines()[-1]


def test_the_flops_of_a_network_are_those_of_its_products():
    config = DiTConfig(depth=2, hidden_dim=32, num_heads=2)
    flops = network_size(config, EMBEDDED, Condition(num_classes=4)).image_flops
    # 12 x 32^2 multiply-adds for each block and each of 16 tokens, besides attention, modulation and both ends.
    assert 1 < flops / (3 * 2 * 2 * 16 * 12 * 32**2) < 1.5
    text = network_size(PixArtConfig(depth=2, hidden_dim=32, num_heads=2), EMBEDDED, Condition(0, 32, 256))
    assert text.image_flops > flops


def test_the_memory_of_a_step_is_near_what_xla_plans():
    """Of the loss and its gradient; XLA's figure is without the base of a process, optimizer and state."""
    config = DiTConfig(depth=4, hidden_dim=64, num_heads=4)
    network = build_dit(config, 16, 4, key=jax.random.key(0))
    x = jnp.zeros((64, *EMBEDDED))
    t, label = jnp.zeros(64), jnp.zeros(64, jnp.int32)

    def loss(network):
        return jnp.mean(jax.vmap(network)(x, t, label) ** 2)

    planned = jax.jit(jax.grad(loss)).lower(network).compile().memory_analysis().temp_size_in_bytes
    shape = {"latent_shape": EMBEDDED, "condition": Condition(4), "parameters": 0, "dtype": "float32"}
    ours = step_memory(config, images=64, **shape) - step_memory(config, images=0, **shape)
    assert planned / 3 < ours < 3 * planned


def test_durations_are_words():
    assert [duration(s) for s in (20.0, 386.0, 9e3, 2e5)] == ["20 seconds", "6.4 minutes", "2.5 hours", "2.3 days"]


def test_this_machine_has_positive_figures():
    machine = this_machine()
    assert (machine.is_accelerator, machine.num_devices) == (False, jax.device_count())
    assert machine.memory > 1e8 and machine.flops > 1e9


def test_typed_keys_are_those_of_sections_sizes_and_values():
    typed = ["experiment=small", "model/size=b", "train={num_steps: 4}", "data.path=x", "optim.eps=1e-6"]
    sizes = ["model.depth", "model.hidden_dim", "model.num_heads"]
    register_schemas()
    with initialize_config_module("flowdit.configs", version_base="1.3"):
        assert typed_keys(typed) == [*sizes, "train.num_steps", "optim.eps"]
        assert {"optim.learning_rate", "optim.warmup_steps"} <= set(typed_keys(["optim=adamw_pixart"]))


NO_IMAGES = ("train.validate_every=0", "train.sample_every=0")
TINY = ("model.depth=2", "model.hidden_dim=32", "model.num_heads=2")


@pytest.mark.parametrize(
    ("main", "preset"),
    [
        pytest.param(stage1, "fast", id="stage 1"),
        pytest.param(stage2, "small_text", id="stage 2", marks=pytest.mark.slow),
    ],
)
def test_a_run_and_its_resume(main, preset, tiny_data, tmp_path):
    run = [f"data.path={tiny_data}", f"train.checkpoint_dir={tmp_path / 'run'}"]
    finished = call(main, f"experiment={preset}", *run, *TINY, *NO_IMAGES, "train.num_steps=4")
    assert (finished.status, finished.err) == (0, "")
    assert "settings for 48 training images, latents 16x8x8" in finished.out
    assert "train.batch_size=8" in finished.out  # a power of two up to a quarter of the images
    assert "expected: about" in finished.out
    first = stored_config(tmp_path / "run" / "4")
    assert (first["train"]["batch_size"], first["train"]["save_every"], first["model"]["patch_size"]) == (8, 1, 2)

    resumed = call(main, "train.is_restore=true", run[1], "train.num_steps=5")
    assert (resumed.status, resumed.err) == (0, "")
    assert "settings for" not in resumed.out
    second = stored_config(tmp_path / "run" / "5")
    assert second["train"] == first["train"] | {"num_steps": 5, "is_restore": True}
    assert (second["model"], second["optim"]) == (first["model"], first["optim"])


def stored_config(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "meta" / "metadata").read_text())["config"]


@pytest.mark.parametrize(
    ("main", "overrides", "problem"),
    [
        (stage1, ("experiment=small",), "data.path: must be given"),
        (
            stage1,
            ("experiment=small", "data.path={data}", "train.batch_size=0"),
            "train.batch_size: must be at least 1",
        ),
        (stage1, ("experiment=small", "data.path={data}", "model.patch_size=3"), "model.patch_size: must divide"),
        (stage1, ("experiment=small", "data.path={plain}", "conditioning=labels"), "has no classes"),
        (stage2, ("experiment=small_text", "data.path={plain}"), "has no captions, which this preset needs"),
        (stage1, ("experiment=small_text", "data.path={data}"), "other stage, of python train_stage2.py"),
        (stage2, ("experiment=small", "data.path={data}"), "other stage, of python train_stage1.py"),
    ],
)
def test_bad_input_is_one_line(main, overrides, problem, tiny_data, plain_data):
    places = {"data": tiny_data, "plain": plain_data}
    finished = call(main, *(override.format(**places) for override in overrides))
    assert finished.status == 2
    assert finished.err.startswith("error: ") and finished.err.count("\n") == 1
    assert problem in finished.err


def test_several_processes_are_refused(tiny_data, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    config = Config(data=DataConfig(path=str(tiny_data)))
    with pytest.raises(FieldError, match="mesh.multi_process: must be false with this preset, .* got 2 processes"):
        choose_sizes(config, [])


@pytest.fixture(scope="module")
def plain_data(tmp_path_factory):
    """Data without classes and captions: the fields of the records are ignored."""
    folder = write_tiny_data(tmp_path_factory.mktemp("plain") / "data")
    manifest = Manifest.read(folder)
    dataclasses.replace(manifest, class_names=(), has_captions=False).write(folder)
    return folder


def test_images_without_classes_train_an_unconditional_model(plain_data, tmp_path):
    finished = call(
        stage1,
        "experiment=small",
        f"data.path={plain_data}",
        f"train.checkpoint_dir={tmp_path / 'run'}",
        *TINY,
        *NO_IMAGES,
        "train.num_steps=1",
    )
    assert (finished.status, finished.err) == (0, "")
    assert "conditioning=none: the images have no classes" in finished.out
