"""Prompt following on features that show their words, and on those that do not."""

import numpy as np
import pytest

from flowdit.scores import prompts
from flowdit.scores.prompts import (
    Captioned,
    clip_score,
    following_of_real,
    possible_kinds,
    prompt_following,
    ranked_words,
)

WIDTH = 32
COLOURS = ("red", "green", "blue")
THINGS = ("cat", "house")
DIRECTIONS = np.random.default_rng(9).normal(size=(5, WIDTH))
"""Of features of the words, in this order."""


def images(count: int, seed: int, follows: float = 1.0) -> Captioned:
    """Features of red, green and blue cats and houses; a share of them is not of the colour of the caption."""
    random = np.random.default_rng(seed)
    colours, things = random.integers(3, size=count), random.integers(2, size=count)
    shown = np.where(random.random(count) < follows, colours, (colours + 1) % 3)
    features = 3 * DIRECTIONS[shown] + 3 * DIRECTIONS[3 + things] + random.normal(size=(count, WIDTH))
    captions = [f"A {COLOURS[c]} {THINGS[t]}." for c, t in zip(colours, things, strict=True)]
    return Captioned(features.astype(np.float32), captions)


def encode_texts(texts):
    """A stand-in for CLIP's text encoder: the sum of its words' directions."""
    words = dict(zip(COLOURS + THINGS, DIRECTIONS, strict=True))
    return np.stack([sum(words[word] for word in words if word in text) for text in texts]).astype(np.float32)


@pytest.mark.parametrize("encoder", [None, encode_texts])
def test_the_share_of_images_that_show_their_word(encoder):
    generated, real = images(300, seed=1, follows=0.7), images(400, seed=0)
    kinds, missing = possible_kinds(generated.captions, real.captions)
    colour, thing = prompt_following(generated, real, encoder)
    assert (colour.kind, sorted(colour.words), colour.images) == ("colour", sorted(COLOURS), 300)
    assert (thing.kind, sorted(thing.words)) == ("object", sorted(THINGS))
    assert colour.value == pytest.approx(0.7, abs=0.1)
    assert colour.error == pytest.approx(np.sqrt(colour.value * (1 - colour.value) / 300))
    assert thing.value > 0.95
    assert min(score.value for score in following_of_real(real, kinds, encoder)) > 0.95
    assert colour.chance == pytest.approx(1 / 3, abs=0.03)
    assert thing.chance == pytest.approx(1 / 2, abs=0.03)
    assert missing == {"count": "fewer than 2 words of it have 10 captions of the reference with no other one"}


def test_with_a_text_encoder_a_part_of_many_images_is_ranked(monkeypatch):
    monkeypatch.setattr(prompts, "MAX_RANKED", 50)
    texts = []

    def counted(some):
        texts.extend(some)
        return encode_texts(some)

    colour, _ = prompt_following(images(300, seed=1), images(400, seed=0), counted)
    assert colour.images == 50
    assert len(texts) == 6 * (3 + 2)  # six different captions with three colours, then with two objects


def test_features_without_the_words_score_chance_and_so_does_the_ceiling():
    """Real images are ranked by a discriminant that has not seen them; with fewer images than features it would be right."""
    real, generated = images(90, seed=0), images(400, seed=1)
    noise = np.random.default_rng(2).normal(size=(490, 256)).astype(np.float32)
    real = real._replace(features=noise[:90])
    for score in prompt_following(generated._replace(features=noise[90:]), real):
        assert abs(score.value - score.chance) < 4 * score.error
    kinds, _ = possible_kinds(generated.captions, real.captions)
    assert max(score.value for score in following_of_real(real, kinds)) < 0.75


def test_too_few_prompts_are_left_out_with_the_reason():
    few = images(9, seed=1)
    kinds, missing = possible_kinds(few.captions, images(100, seed=0).captions)
    assert kinds == {}
    assert missing["colour"] == "9 images have a prompt with exactly one of its words, 10 are needed"


def test_words_are_counted_where_they_are_alone():
    captions = [*["a red cat"] * 12, *["gray dogs, two of them"] * 10, *["red and blue"] * 30, *["three red birds"] * 9]
    assert ranked_words(captions, "colour") == ("red", "grey")
    assert ranked_words(captions, "count") == ("two",)
    assert set(ranked_words(captions, "object")) == {"cat", "dogs"}


def test_clip_score_of_known_angles():
    pairs = np.array([[1, 0], [1, 1], [0, 3], [-2, 0]], np.float32)
    texts = np.array([[2, 0], [1, 0], [1, 0], [1, 0]], np.float32)
    values = np.array([100, 100 / np.sqrt(2), 0, 0])
    found = clip_score(pairs, texts)
    assert found.value == pytest.approx(values.mean())
    assert found.error == pytest.approx(values.std(ddof=1) / 2)
