"""`flowdit.load` and `Sampler`: loading, compiling and reading; an image depends only on seed and index."""

import builtins
import io
import logging
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from damage import flip_bit
from runs import REPOSITORY

import flowdit
from flowdit.checkpoint.files import CheckpointError
from flowdit.inference.sampler import Sampler, batch_shape
from flowdit.interop.conversion import ConvertConfig, convert
from flowdit.sharding import MeshConfig, make_mesh

QUICK = {"solver": "euler", "steps": 2}


@pytest.fixture(scope="module")
def sampler(whole_run) -> Sampler:
    return flowdit.load(str(whole_run / "6"))


def drawn(sampler: Sampler, **settings) -> np.ndarray:
    return np.concatenate(list(sampler.draw(**QUICK | settings)))


def latents(sampler: Sampler, labels: list[int], numbers=None, batch_size: int = 8, **solver) -> np.ndarray:
    config = sampler.sampler_config(QUICK | solver)
    batches = sampler.batches(sampler.requests(1, {"labels": labels}), config, 0, batch_size, numbers)
    return np.concatenate([batch.latents for batch in batches])


def test_importing_flowdit_does_not_import_jax():
    code = "import sys, flowdit; print('jax' in sys.modules, flowdit.__version__, 'load' in flowdit.__all__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert done.stdout.split() == ["False", flowdit.__version__, "True"]


def test_images_come_in_order_batch_by_batch(sampler):
    batches = list(sampler.draw(labels=["sun"] * 3 + ["cat"] * 7, batch_size=4, **QUICK))
    assert [images.shape for images in batches] == [(4, 64, 64, 3), (4, 64, 64, 3), (2, 64, 64, 3)]
    assert {images.dtype for images in batches} == {np.dtype(np.uint8)}
    one_each = drawn(sampler, labels=["sun", "cat"], num_images=2)
    assert len(one_each) == 4 and not np.array_equal(one_each[0], one_each[1])
    assert len(drawn(sampler, steps=1)) == 2  # the previews of the run


def test_a_draw_of_many_images_is_lazy(sampler, monkeypatch):
    calls, decode = [], sampler.decode
    monkeypatch.setitem(
        sampler.__dict__, "decode", lambda latents, size: calls.append(len(latents)) or decode(latents, size)
    )
    images = sampler.draw(labels=[0], num_images=50_000, batch_size=4, **QUICK)
    assert calls == []
    assert len(next(images)) == 4 and calls == [4]


def test_a_second_draw_compiles_nothing_and_reads_nothing(whole_text_run, monkeypatch, caplog):
    sampler = flowdit.load(str(whole_text_run / "6"))
    first = drawn(sampler, prompts=["red apple", "sun"], negative_prompt="dog")
    read = []
    for module in (builtins, io):
        real = module.open
        monkeypatch.setattr(module, "open", lambda file, *a, real=real, **k: read.append(file) or real(file, *a, **k))
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        second = drawn(sampler, prompts=["sun", "a blue heart and " * 9], negative_prompt="cat", seed=1)
    assert [record.message for record in caplog.records if "ompil" in record.message] == []
    assert read == []
    assert not np.array_equal(first, second)


def test_noise_is_a_function_of_seed_and_number(sampler):
    everything = latents(sampler, [0] * 8)
    few = latents(sampler, [0] * 8, numbers=[6, 1])
    np.testing.assert_allclose(few, everything[[6, 1]], atol=1e-4)
    np.testing.assert_array_equal(few, latents(sampler, [0] * 8, numbers=[6, 1, 3])[:2])  # the same batch shape
    one_device = Sampler(
        sampler.trained, jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), ("data", "fsdp", "tensor"))
    )
    np.testing.assert_allclose(latents(one_device, [0] * 8), everything, atol=1e-4)
    spread = Sampler(sampler.trained, make_mesh(MeshConfig(data=2, fsdp=2)))
    np.testing.assert_allclose(latents(spread, [0] * 8), everything, atol=1e-4)


def test_adaptive_steps_do_not_depend_on_other_images(sampler):
    settings = {"solver": "tsit5", "steps": 200, "rtol": 1e-2, "guidance": 1.0}
    together = latents(sampler, [0, 1, 2, 3, 0, 1, 2, 3], **settings)
    with_others = latents(sampler, [0, 3, 3, 3, 3, 3, 3, 3], **settings)
    np.testing.assert_array_equal(together[0], with_others[0])


def test_too_few_adaptive_steps_are_one_line_on_several_devices(sampler):
    with pytest.raises(ValueError, match=r"^steps: must be more for rtol=1e-06, got 2$"):
        latents(sampler, [0], solver="heun", rtol=1e-6)


def test_batch_shapes_are_few_and_multiples_of_the_devices():
    assert [batch_shape(count, 64, 1) for count in (1, 3, 33, 64, 50_000)] == [1, 4, 64, 64, 64]
    assert [batch_shape(count, 6, 4) for count in (1, 5, 100)] == [4, 8, 8]


def test_a_run_folder_is_its_newest_intact_checkpoint(whole_run, tmp_path):
    run = shutil.copytree(whole_run, tmp_path / "run")
    assert flowdit.load(str(run)).trained.step == 6
    flip_bit(run / "6" / "meta" / "metadata")
    assert flowdit.load(str(run)).trained.step == 4
    for step in (2, 4):
        shutil.rmtree(run / str(step))
    with pytest.raises(CheckpointError, match="no checkpoint can be read: .*content differs from its checksum"):
        flowdit.load(str(run))


@pytest.mark.parametrize("to", ["safetensors", "checkpoint"])
def test_other_formats_draw_the_same(sampler, whole_run, tmp_path, to):
    target = tmp_path / ("model.safetensors" if to == "safetensors" else "model")
    convert(ConvertConfig(source=str(whole_run / "6"), target=str(target), to=to))
    np.testing.assert_array_equal(drawn(flowdit.load(str(target)), labels=[1]), drawn(sampler, labels=[1]))


def test_the_pretrained_class_model_still_draws():
    images = drawn(flowdit.load(str(REPOSITORY / "pretrained" / "openmoji")), labels=["heart"], guidance=1.0)
    assert images.shape == (1, 64, 64, 3) and images.std() > 10


def test_the_pretrained_text_model_draws_what_it_is_asked_for():
    prompts = ["red heart, twemoji style", "blue heart, twemoji style"]
    images = drawn(flowdit.load(str(REPOSITORY / "pretrained" / "emoji_text")), prompts=prompts, steps=10)
    red, blue = images[:, 16:48, 16:48].astype(float).mean((1, 2))
    assert red[0] > 1.5 * red[2] and blue[2] > 1.5 * blue[0]


def test_the_pretrained_text_model_is_small():
    folder = REPOSITORY / "pretrained" / "emoji_text"
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 25e6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"labels": ["cow"]}, r"^labels: must be in \[0, 4\) or a class name \(cat, dog, heart, sun\), got 'cow'$"),
        ({"prompts": ["sun"]}, "^prompts: not supported by this model, which takes labels$"),
        ({"step": 5}, "^step: no such setting, must be one of labels, prompts, "),
        ({"steps": 0}, "^steps: must be at least 1, got 0$"),
        ({"seed": -1}, r"^seed: must be in \[0, 2\*\*32\), got -1$"),
        ({"batch_size": 0}, "^batch_size: must be at least 1, got 0$"),
        ({"num_images": 0}, "^num_images: must be at least 1, got 0$"),
    ],
)
def test_bad_setting(sampler, settings, message):
    with pytest.raises(ValueError, match=message):
        sampler.draw(**settings)


def test_another_vae_or_encoder_is_refused(whole_run, tmp_path):
    with pytest.raises(
        ValueError, match="^text_encoder: must not be given, as this model has no text encoder, got 'x'$"
    ):
        flowdit.load(str(whole_run / "6"), text_encoder="x")
    elsewhere = flowdit.load(str(whole_run / "6"), vae=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="^vae: must be 'openmoji', 'emoji', an existing folder or "):
        drawn(elsewhere, labels=[0])
