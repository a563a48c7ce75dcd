"""Stage 2 as a run: exact resume, features online and cached, the start from a class model, memory, layouts."""

import dataclasses
import signal
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.text_folders import write_t5gemma
from runs import (
    NUM_STEPS,
    assert_same_checkpoint,
    metrics,
    steps_of,
    stored_arrays,
    stored_json,
    train_text_here,
    write_tiny_data,
)
from training.test_resume import stop_after

from flowdit.conditioning.text import Text, Training
from flowdit.data.loader import DataConfig, open_source
from flowdit.data.manifest import Manifest
from flowdit.data.mixture import Part
from flowdit.data.records import RecordError
from flowdit.data.schema import SizeField, record_schema
from flowdit.data.text_features import write_cache
from flowdit.diffusion.objective import FlowMatching
from flowdit.models.config import PixArtConfig
from flowdit.models.pixart import build_pixart
from flowdit.models.text_encoder import TextConfig, encode_tokens, load_text_encoder
from flowdit.optim import OptimConfig, make_optimizer
from flowdit.sharding import MeshConfig, init_sharded, make_mesh, shard_batch
from flowdit.tracking import Progress
from flowdit.training.step import init_state, make_train_step

LATENT = (4, 8, 8)
WIDTH = 6
LENGTH = 5
MODEL = PixArtConfig(depth=2, hidden_dim=24, num_heads=2)
OBJECTIVE = FlowMatching(Text(), 0.3, (0.1,) * 4, (0.9,) * 4)


def test_resume_is_exact(tiny_data, whole_text_run, tmp_path):
    run = tmp_path / "run"
    seen = []
    add = Progress.add

    def add_and_stop(self, values):
        add(self, values)
        seen.append(values)
        if len(seen) == 3:
            while not (run / "2").exists():  # it is saved in the background
                time.sleep(0.01)
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "add", add_and_stop)
        # Like a kill: only step 2 is saved.
        assert train_text_here(tiny_data, run).status == 128 + signal.SIGINT
    assert steps_of(run) == [2]
    finished = train_text_here(tiny_data, run, "train.is_restore=true")
    assert f"resumed from {run / '2'}" in finished.out
    assert_same_checkpoint(run / str(NUM_STEPS), whole_text_run / str(NUM_STEPS))
    assert metrics(run, "train/loss") == metrics(whole_text_run, "train/loss")


def test_resume_is_exact_with_tag_dropout(tmp_path):
    captions = lambda i: {"short_caption": f"pear {i}, red, ripe", "long_caption": f"pear {i}, red, ripe, food, fruit"}
    data = write_tiny_data(tmp_path / "data", extra=captions)
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert train_text_here(data, whole, "data.tag_dropout=0.5").status == 0
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 3)
        train_text_here(data, run, "data.tag_dropout=0.5")
    assert steps_of(run)[-1] == 3
    assert train_text_here(data, run, "data.tag_dropout=0.5", "train.is_restore=true").status == 0
    assert_same_checkpoint(run / str(NUM_STEPS), whole / str(NUM_STEPS))
    assert metrics(run, "train/loss") == metrics(whole, "train/loss")


def test_tags_are_left_out_in_training_and_not_in_validation(tiny_data):
    encoder, mesh = load_text_encoder(TextConfig("wordllama", 32, "float32")), make_mesh(MeshConfig())
    text = Text(training=Training(encoder, DataConfig(path=str(tiny_data), tag_dropout=1.0), mesh, 4))
    part = Part(DataConfig(path=str(tiny_data)).folders[0], Manifest.read(tiny_data))
    records = [{"short_caption": caption, "long_caption": ""} for caption in ("pear", "pear, red, ripe")]
    counts = {s: text.reader(s, part).read([0, 1], records, np.full(2, 0.3)) for s in ("train", "validation")}
    train, validation = (counts[split]["text_mask"].sum(1) for split in ("train", "validation"))
    assert train[0] == train[1] == validation[0] < validation[1]


def write_features(data, folder):
    """The cache of the tiny data set's captions, made by the preset's encoder."""
    encoder = load_text_encoder(TextConfig("wordllama", 32, "float32"))
    write_cache(folder, data, Manifest.read(data), encoder)
    return folder


def test_cached_features_give_the_losses_of_online_ones(tiny_data, whole_text_run, tmp_path):
    cache = write_features(tiny_data, tmp_path / "features")
    finished = train_text_here(tiny_data, tmp_path / "run", f"data.text_cache={cache}")
    assert (finished.status, finished.err) == (0, "")
    assert "from " + str(cache) in finished.out
    online, cached = metrics(whole_text_run, "train/loss"), metrics(tmp_path / "run", "train/loss")
    np.testing.assert_allclose(list(cached.values()), list(online.values()), rtol=1e-6)


def test_accumulation_and_mesh_give_the_same_losses(tiny_data, whole_text_run, tmp_path):
    finished = train_text_here(
        tiny_data, tmp_path / "run", "train.gradient_accum=4", "mesh.fsdp=2", "mesh.tensor=2", "train.num_steps=5"
    )
    assert finished.status == 0, finished.err
    losses, expected = (list(metrics(run, "train/loss").values())[:5] for run in (tmp_path / "run", whole_text_run))
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_t5gemma_in_the_loop_is_laid_out_on_the_mesh(tmp_path):
    config = TextConfig(str(write_t5gemma(tmp_path)), 16, "float32")
    mesh, alone = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2)), load_text_encoder(config)
    spread = load_text_encoder(config, mesh)
    for weight in (spread.network.layers.self_attn.q_proj.weight, spread.network.layers.mlp.down_proj.weight):
        assert weight.addressable_shards[0].data.size == weight.size // 4
    tokens = alone.tokenize(["red apple", "", "a red pear, ripe and red", "sun"] * 2)
    batch = {"text_ids": tokens.ids, "text_mask": tokens.mask, "label": np.arange(8)}
    tokens_on_mesh = shard_batch(mesh, batch)
    text = Text(training=Training(spread, DataConfig(), mesh, 4))
    encoded = text.encode(tokens_on_mesh)
    assert encoded.keys() == {"text_features", "text_mask", "label"}
    expected = np.asarray(encode_tokens(alone.network, tokens.ids, tokens.mask))
    features = np.asarray(encoded["text_features"])
    np.testing.assert_allclose(features[tokens.mask], expected[tokens.mask], atol=1e-5)


def test_start_from_a_class_model(tiny_data, whole_run, tmp_path):
    shared_map, class_condition = "mean", "null_class"  # the defaults are those of test_start_is_taken_once
    run, start = tmp_path / "run", whole_run / str(NUM_STEPS)
    settings = (
        f"train.init_from={start}",
        f"train.init_shared_map={shared_map}",
        f"train.init_class={class_condition}",
    )
    frozen = ("optim.learning_rate=1e-12", "train.num_steps=5", "train.ema_decay=0")
    finished = train_text_here(tiny_data, run, *settings, *frozen)
    assert (finished.status, finished.err) == (0, "")
    drift = metrics(run, "init/drift_t0.5000")
    assert 0 <= drift[0] < 1e-5
    assert metrics(run, "init/drift_t0.9375")[0] > 1e-4
    assert f"started from {start}; relative drift of the velocity by t: 0.0625: " in finished.out
    theirs, ours = stored_arrays(start), stored_arrays(run / "5")
    for name in ("patch_embed.weight", "blocks.attention.qkv.weight", "blocks.mlp.up.bias", "final_linear.weight"):
        np.testing.assert_allclose(ours[f"model_ema.{name}"], theirs[f"model_ema.{name}"], atol=1e-10)


@pytest.mark.slow
def test_start_is_taken_once(tiny_data, whole_run, tmp_path):
    """A resumed run has its own weights: the class model need not exist any more."""
    run = tmp_path / "run"
    assert train_text_here(tiny_data, run, f"train.init_from={whole_run / '6'}", "train.num_steps=5").status == 0
    finished = train_text_here(tiny_data, run, "train.init_from=gone", "train.is_restore=true")
    assert finished.status == 0, finished.err
    assert f"changed since the checkpoint: train.init_from: {whole_run / '6'} -> gone" in finished.out
    assert steps_of(run)[-1] == NUM_STEPS


def test_a_checkpoint_records_its_text_encoder(whole_text_run):
    text = stored_json(whole_text_run / "6", "meta")["text"]
    assert (text["name"], text["dtype"], text["max_length"], text["width"]) == ("wordllama", "float32", 32, 256)
    assert len(text["fingerprint"]) == 16


def test_micro_conditioning_reaches_the_model():
    """The loss passes the data's size to the model, and the velocity depends on it."""
    config = dataclasses.replace(MODEL, micro_conditioning=True, depth=1)
    model = build_pixart(config, LATENT[0], WIDTH, key=jax.random.key(0))
    model = jax.tree.map(lambda x: x + 0.1, model)  # the final layer starts at zero, which would hide the difference
    example = jax.tree.map(lambda x: jnp.asarray(x[0]), batch_of(1))
    objective = dataclasses.replace(OBJECTIVE, conditioning=Text(size=(64, 64)))
    velocities = []
    for size, fields in (((64, 64), {}), ((64, 128), {"image_size": jnp.asarray([64, 128])})):
        drawn = objective.draw(example | fields, jax.random.key(0), 0)
        np.testing.assert_array_equal(drawn.condition.size, size)
        velocities.append(eqx.filter_jit(model)(drawn.noise, drawn.t, drawn.condition))
    assert not np.allclose(*velocities, atol=1e-4)


@pytest.mark.slow
def test_image_sizes_come_from_the_records_and_else_from_the_manifest(tmp_path):
    """Four in a row are: none, one number of a square, a pair, an array."""
    sizes = [{}, {"image_size": 512}, {"image_size": (512, 768)}, {"image_size": np.asarray([256, 1024])}]
    data = write_tiny_data(tmp_path / "data", lambda index: sizes[index % 4])
    schema = record_schema((16, 8, 8), Text(size=(64, 64)).fields())
    batch = open_source(data, Manifest.read(data), schema=schema).read_batch([0, 1, 2, 3])
    assert batch["image_size"].tolist() == [[64, 64], [512, 512], [512, 768], [256, 1024]]
    settings = ("model.micro_conditioning=true", "model.hidden_dim=48", "optim.warmup_steps=0", "train.num_steps=2")
    assert train_text_here(data, tmp_path / "sized", *settings).err == ""
    plain = write_tiny_data(tmp_path / "plain")
    assert train_text_here(plain, tmp_path / "unsized", *settings).err == ""
    # The first step's loss is that of a zero velocity, whatever the size.
    sized, unsized = (metrics(tmp_path / run, "train/loss") for run in ("sized", "unsized"))
    assert sized[1] == unsized[1] and sized[2] != unsized[2]


@pytest.mark.parametrize("size", [0, "large", (64,), (64, 64, 3), (64, 2**30), np.asarray([64.0, 64.0]), True])
def test_image_sizes_that_are_none_are_refused(size):
    with pytest.raises(RecordError, match="^must be one or two "):
        SizeField((64, 64)).check(size)


def batch_of(size: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "latent": rng.normal(size=(size, *LATENT)).astype(np.float32),
        "text_features": rng.normal(size=(size, LENGTH, WIDTH)).astype(np.float32),
        "text_mask": np.arange(LENGTH) < rng.integers(0, LENGTH + 1, size).reshape(-1, 1),
    }


def build(optimizer):
    return init_state(build_pixart(MODEL, LATENT[0], WIDTH, key=jax.random.key(0)), optimizer)


def test_golden_losses():
    """A refactor must reproduce these; a change of randomness, initialisation or mathematics must update them."""
    mesh, optimizer = make_mesh(MeshConfig()), make_optimizer(OptimConfig(learning_rate=1e-2), 100)
    state = init_sharded(mesh, lambda: build(optimizer))
    step = make_train_step(optimizer, OBJECTIVE, 0, 2, 0.9, mesh=mesh)
    losses = []
    for _ in range(3):
        state, values = step(state, shard_batch(mesh, batch_of(8)))
        losses.append(float(values["loss"]))
    np.testing.assert_allclose(losses, GOLDEN_LOSSES, rtol=1e-4)


GOLDEN_LOSSES = [1.876743, 1.759201, 1.888333]


def temporary_bytes(batch_size: int, gradient_accum: int) -> int:
    optimizer = make_optimizer(OptimConfig(), 10)
    batch = jax.tree.map(jnp.asarray, batch_of(batch_size))
    step = make_train_step(optimizer, OBJECTIVE, 0, gradient_accum)
    return step.lower(jax.eval_shape(lambda: build(optimizer)), batch).compile().memory_analysis().temp_size_in_bytes


def test_memory_does_not_grow_with_the_number_of_micro_batches():
    """Micro-batches of 8: sixteen need the memory of two, except for the batch itself, which is reordered once."""
    inputs = sum(array.nbytes for array in batch_of(8).values())
    two, sixteen = temporary_bytes(16, 2), temporary_bytes(128, 16)
    assert sixteen - two < 2 * 14 * inputs


def test_dropped_captions_only_train_the_null_caption():
    """At drop rate 1 the loss depends on the null caption and not on the captions."""
    objective = dataclasses.replace(OBJECTIVE, drop_rate=1.0)
    example = jax.tree.map(lambda x: jnp.asarray(x[0]), batch_of(1))
    drawn = objective.draw(example, jax.random.key(0), 0)
    assert bool(drawn.condition.dropped)
    np.testing.assert_array_equal(drawn.condition.mask, example["text_mask"])
