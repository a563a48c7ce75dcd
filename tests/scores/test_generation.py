"""Drawing and extracting: the same features for any batch, kill or mesh; what is asked for depends on seed and number."""

import dataclasses
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flowdit
from flowdit.features.base import Extracted, FeatureNetwork
from flowdit.inference.sampler import Sampler
from flowdit.scores.conditions import ask_for_classes, ask_for_prompts, draw_labels
from flowdit.scores.extraction import Extraction
from flowdit.scores.generation import PartFiles, draw_features, generate, joined
from flowdit.sharding import MeshConfig, make_mesh

COUNT = 10
FREQUENCIES = np.asarray([1, 0, 3, 0])


class Means(eqx.Module):
    """Mean colours of an image and of its upper half."""

    def __call__(self, images) -> Extracted:
        pixels = images.astype(jnp.float32)
        upper = pixels[:, : images.shape[1] // 2]
        features = jnp.concatenate([pixels.mean(axis=(1, 2)), upper.mean(axis=(1, 2))], axis=1)
        return Extracted(features, features[:, :2])


class WithoutLogits(Means):
    """The same without a classifier."""

    def __call__(self, images) -> Extracted:
        return super().__call__(images)._replace(logits=None)


MEANS = FeatureNetwork("means", Means(), 6, "means, float32", 2)


@pytest.fixture(scope="module")
def sampler(whole_run) -> Sampler:
    return flowdit.load(str(whole_run / "6"))


@functools.cache
def drawing(sampler: Sampler):
    """The draw, what sees the latents, the requests and the batch size."""
    solver = sampler.sampler_config({"solver": "euler", "steps": 2})
    trained = sampler.trained
    see = Extraction([MEANS], sampler.mesh).from_latents(sampler.vae, trained.mean, trained.scale, keep_images=True)
    requests = sampler.requests(1, {"labels": [i % 4 for i in range(COUNT)]})
    return sampler.drawing(solver, 3), see, requests, sampler.batch_shape(COUNT, 4)


def test_features_are_those_of_the_sampled_images(sampler):
    part = joined_batches(draw_features(*drawing(sampler)))
    solver = sampler.sampler_config({"solver": "euler", "steps": 2})
    requests = sampler.requests(1, {"labels": [i % 4 for i in range(COUNT)]})
    images = np.concatenate([drawn.images for drawn in sampler.batches(requests, solver, seed=3, batch_size=4)])
    assert np.abs(part.images.astype(int) - images).max() <= 1
    expected = images.astype(np.float32).mean(axis=(1, 2))
    features, logits = part.features["means"]
    np.testing.assert_allclose(features[:, :3], expected, atol=0.05)
    assert features.shape == (COUNT, 6) and logits.shape == (COUNT, 2)
    assert part.evaluations.tolist() == [2] * COUNT and part.numbers == range(COUNT)


def joined_batches(batches):
    batches = list(batches)
    images = [batch.images for batch in batches if batch.images is not None]
    return joined(batches)._replace(images=np.concatenate(images) if images else None)


def test_a_killed_run_goes_on_and_ends_with_the_same_bits(sampler, tmp_path, monkeypatch):
    monkeypatch.setattr("flowdit.scores.generation.PART_IMAGES", 4)
    *arguments, size = drawing(sampler)
    whole = PartFiles(tmp_path / "whole", ["means"], COUNT, size)
    assert [len(part.numbers) for part in generate(*arguments, whole, size)] == [4, 4, 2]
    cut = PartFiles(tmp_path / "cut", ["means"], COUNT, size)
    batches = generate(*arguments, cut, size)
    next(batches), next(batches)  # the second batch is not stored yet
    batches.close()
    assert cut.num_images() == 4
    assert [part.numbers.start for part in generate(*arguments, cut, size)] == [4, 8]
    same(whole.read(), cut.read())
    assert [*generate(*arguments, cut, size)] == []
    cut.remove()
    assert not (tmp_path / "cut").exists()


def test_a_damaged_part_is_drawn_again(sampler, tmp_path, monkeypatch, messages):
    monkeypatch.setattr("flowdit.scores.generation.PART_IMAGES", 4)
    *arguments, size = drawing(sampler)
    files = PartFiles(tmp_path / "parts", ["means"], COUNT, size)
    list(generate(*arguments, files, size))
    before = files.read()
    file = sorted((tmp_path / "parts").iterdir())[1]
    file.write_bytes(file.read_bytes()[:-7])
    assert [part.numbers.start for part in generate(*arguments, files, size)] == [4, 8]  # and those after it
    assert any(f"{file} is damaged: its images are drawn again" in line for line in messages())
    same(before, files.read())


def same(a, b) -> None:
    assert jax.tree.all(jax.tree.map(np.array_equal, (a.features, a.evaluations), (b.features, b.evaluations)))


def test_devices_and_batches_change_features_by_rounding_only(sampler):
    four = joined_batches(draw_features(*drawing(sampler)))
    one = Sampler(sampler.trained, make_mesh(MeshConfig(), jax.devices()[:1]))
    *arguments, size = drawing(one)
    assert (size, drawing(sampler)[-1]) == (4, 4)
    alone = joined_batches(draw_features(*arguments, 1))
    for a, b in zip(jax.tree.leaves(four.features), jax.tree.leaves(alone.features), strict=True):
        np.testing.assert_allclose(a, b, atol=0.05)  # pixels are rounded to whole numbers


def test_features_of_given_images(sampler):
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8)
    features = Extraction([MEANS], sampler.mesh).of_images(images, 8)["means"].features
    np.testing.assert_allclose(features[:, :3], images.astype(np.float32).mean(axis=(1, 2)), rtol=1e-5)
    assert features.shape == (5, 6)


def test_labels_have_the_frequencies_of_the_data_and_do_not_depend_on_the_count():
    many = draw_labels(FREQUENCIES, 8_000, seed=5)
    assert np.bincount(many, minlength=4)[[1, 3]].tolist() == [0, 0]
    assert abs(np.mean(many == 2) - 0.75) < 0.02
    assert np.array_equal(draw_labels(FREQUENCIES, 100, seed=5), many[:100])
    assert not np.array_equal(draw_labels(FREQUENCIES, 100, seed=6), many[:100])


@pytest.mark.parametrize(
    ("labels", "expected"),
    [("balanced", ["cat", "dog", "heart", "sun", "cat"]), (["sun", 0], ["sun", "cat", "sun", "cat", "sun"])],
)
def test_classes_of_the_images(sampler, labels, expected):
    make = sampler.trained.conditioning.requests
    asked = ask_for_classes(make, labels, 5, 4, 0, lambda: pytest.fail("not needed"))
    assert asked.requests.captions == expected
    data = ask_for_classes(make, "data", 50, 4, 0, lambda: np.asarray([0, 5, 0, 0]))
    assert set(data.requests.captions) == {"dog"} and data.identity != asked.identity


def test_prompts_of_the_images():
    @dataclasses.dataclass
    class Made:
        captions: list[str]

    make = lambda count, prompts, negative_prompt: Made(prompts)
    captions = ["a sun", "a cat", "two dogs"]
    asked = ask_for_prompts(make, "data", "", 7, 0, captions)
    assert sorted(asked.prompts[:3]) == sorted(captions) and asked.prompts[3:6] == asked.prompts[:3]
    assert ask_for_prompts(make, "data", "", 2, 0, captions).prompts == asked.prompts[:2]
    assert ask_for_prompts(make, ["x"], "", 2, 0, None).prompts == ["x", "x"]
    with pytest.raises(ValueError, match="^prompts: must be given, as the reference has no captions"):
        ask_for_prompts(make, "data", "", 2, 0, None)
