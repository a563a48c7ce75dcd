"""Scores of images drawn from prompts: the CLIP score, and how often an image shows the word that its prompt asks for.

CLIP score: 100 times the cosine between an image and its prompt, where negative 0 (Hessel et al., arXiv:2104.08718,
without their factor 2.5, as in torchmetrics).

Prompt following is counted by kind of word: colours, counts, and objects, which are the other frequent words of the
captions. Of a caption that has exactly one word of a kind, the words of this kind are ranked for the image, and the
score is the share of images whose own word is first. They are ranked by a linear discriminant (Fisher 1936) of the
image's features, fitted to the captioned real images, which needs no other weights; or, given CLIP's text encoder, by
the likeness to the caption with its word replaced by each of the others.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from flowdit.scores.discriminant import Features, discriminant
from flowdit.scores.metrics import Score

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "violet", "pink", "brown", "black", "white", "grey")
COUNTS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
"""Without "one", which is rarely a count."""
KINDS = ("colour", "count", "object")
MIN_PER_WORD = 10
"""Captioned real images that a word needs."""
MIN_PROMPTS = 10
"""Generated images that a kind needs."""
MAX_OBJECTS = 20
"""Only the most frequent: the more words there are, the fewer captions have exactly one."""
FOLDS = 5
MAX_RANKED = 2_000
"""Images that are ranked with CLIP's text encoder, which reads every prompt once for each word."""
STOP_WORDS = """
a about above across against all among an and another are around as at background be behind below beside between big by
close different down each facing for from front has have having her his image in inside into is it its large left many
near next no not of off on one onto or other out outside over photo picture right several showing shown side small some
standing that the their them there these this through to top under up view very was which while who with
"""
"""Words that name no object."""

EncodeTexts = Callable[[Sequence[str]], Features]


class WordScore(NamedTuple):
    """Prompt following of one kind of word.

    Attributes:
        kind: one of `KINDS`.
        value: share of the `images` whose own word is ranked first.
        error: standard error of the share, over images.
        chance: the share that is expected if the same images are paired with the prompts at random.
        images: generated images that are ranked: those whose prompt has exactly one word of the kind.
        words: that are ranked.
    """

    kind: str
    value: float
    error: float
    chance: float
    images: int
    words: tuple[str, ...]


class Captioned(NamedTuple):
    """Features of images and the caption of each."""

    features: Features
    captions: Sequence[str]


def clip_score(images: Features, texts: Features) -> Score:
    """The mean of 100 cosines of at least two images and their texts, negative ones as 0, with its standard error."""
    products = (images * texts).sum(axis=1, dtype=np.float64)
    norms = np.linalg.norm(images.astype(np.float64), axis=1) * np.linalg.norm(texts.astype(np.float64), axis=1)
    values = 100 * np.maximum(products / norms, 0.0)
    return Score("clip_score", float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values))))


def possible_kinds(
    prompts: Sequence[str], captions: Sequence[str]
) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """The kinds of word that the images of `prompts` can be scored by, with their words, and why there are no others.

    `captions` are those of the real images.
    """
    kinds: dict[str, tuple[str, ...]] = {}
    missing: dict[str, str] = {}
    for kind in KINDS:
        words = ranked_words(captions, kind)
        count = int((_words_asked(prompts, words) >= 0).sum())
        if len(words) < 2:
            missing[kind] = f"fewer than 2 words of it have {MIN_PER_WORD} captions of the reference with no other one"
        elif count < MIN_PROMPTS:
            missing[kind] = f"{count} images have a prompt with exactly one of its words, {MIN_PROMPTS} are needed"
        else:
            kinds[kind] = words
    return kinds, missing


def prompt_following(generated: Captioned, real: Captioned, encode_texts: EncodeTexts | None = None) -> list[WordScore]:
    """The score of each of `possible_kinds`.

    With `encode_texts`, all features are of CLIP, and at most `MAX_RANKED` images of a kind, evenly spread, are ranked.
    """
    scores: list[WordScore] = []
    for kind, words in possible_kinds(generated.captions, real.captions)[0].items():
        some = _with_one_word(generated, words, encode_texts)
        if encode_texts is None:
            known = _with_one_word(real, words, None)
            first = discriminant(known.features, known.asked, len(words))(some.features)
        else:
            first = _nearest_text(some, words, encode_texts)
        scores.append(_score(kind, words, some, first))
    return scores


def following_of_real(
    real: Captioned, kinds: Mapping[str, tuple[str, ...]], encode_texts: EncodeTexts | None = None
) -> list[WordScore]:
    """The same of real images, the ceiling. They are ranked in five folds, each by the discriminant of the others."""
    scores: list[WordScore] = []
    for kind, words in kinds.items():
        some = _with_one_word(real, words, encode_texts)
        is_fitted = encode_texts is None
        first = _cross_validated(some, len(words)) if is_fitted else _nearest_text(some, words, encode_texts)
        scores.append(_score(kind, words, some, first))
    return scores


class _Asked(NamedTuple):
    """Images with the word that each asks for, by its number."""

    features: Features
    captions: Sequence[str]
    asked: Int[np.ndarray, " n"]


def _with_one_word(some: Captioned, words: Sequence[str], encode_texts: EncodeTexts | None) -> _Asked:
    asked = _words_asked(some.captions, words)
    rows = np.flatnonzero(asked >= 0)
    if encode_texts is not None and len(rows) > MAX_RANKED:
        rows = rows[np.arange(MAX_RANKED) * len(rows) // MAX_RANKED]
    return _Asked(some.features[rows], [some.captions[row] for row in rows.tolist()], asked[rows])


def _score(kind: str, words: tuple[str, ...], some: _Asked, first: Int[np.ndarray, " n"]) -> WordScore:
    count = len(some.asked)
    value = float((first == some.asked).mean())
    shares = (np.bincount(numbers, minlength=len(words)) / count for numbers in (first, some.asked))
    return WordScore(
        kind=kind,
        value=value,
        error=float(np.sqrt(value * (1 - value) / count)),
        chance=float(np.multiply(*shares).sum()),
        images=count,
        words=words,
    )


def ranked_words(captions: Sequence[str], kind: str) -> tuple[str, ...]:
    """The words of a kind that `MIN_PER_WORD` captions have, and no other one of them."""
    found = Counter(word for caption in captions for word in set(_words(caption)))
    if kind == "object":
        others = {*COLOURS, *COUNTS, *STOP_WORDS.split()}
        frequent = [word for word, _ in sorted(found.items(), key=lambda item: (-item[1], item[0]))]
        # A word of nearly all captions, such as "drawing", says what kind of images they are.
        words = [word for word in frequent if word not in others and found[word] <= 0.8 * len(captions)][:MAX_OBJECTS]
    else:
        words = [word for word in {"colour": COLOURS, "count": COUNTS}[kind] if found[word]]
    while words:  # without one word, captions that also have it count for another
        asked = _words_asked(captions, words)
        counts = np.bincount(asked[asked >= 0], minlength=len(words))
        if counts.min() >= MIN_PER_WORD:
            break
        words.pop(int(counts.argmin()))
    return tuple(words)


def _words(caption: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", _plain(caption))


def _plain(caption: str) -> str:
    return caption.lower().replace("gray", "grey")


def _words_asked(captions: Sequence[str], words: Sequence[str]) -> Int[np.ndarray, " n"]:
    """The number of the only one of `words` in each caption; -1 if there is none or more than one."""
    numbers = {word: number for number, word in enumerate(words)}
    found = [{numbers[word] for word in _words(caption) if word in numbers} for caption in captions]
    return np.array([some.pop() if len(some) == 1 else -1 for some in found], np.int64)


def _cross_validated(real: _Asked, count: int) -> Int[np.ndarray, " n"]:
    """The word that is ranked first for each real image by the discriminant of the other folds.

    The images of each word are spread evenly over the folds.
    """
    folds = np.empty(len(real.asked), np.int64)
    folds[np.argsort(real.asked, kind="stable")] = np.arange(len(folds)) % FOLDS
    first = np.empty_like(folds)
    for fold in range(FOLDS):
        others = folds != fold
        first[~others] = discriminant(real.features[others], real.asked[others], count)(real.features[~others])
    return first


def _nearest_text(some: _Asked, words: Sequence[str], encode_texts: EncodeTexts) -> Int[np.ndarray, " n"]:
    """The word whose place in the caption gives the text most like the image."""
    variants = {
        caption: [re.sub(rf"\b{words[number]}\b", word, _plain(caption)) for word in words]
        for caption, number in zip(some.captions, some.asked, strict=True)
    }
    texts = encode_texts([text for caption in variants for text in variants[caption]])
    texts = (texts / np.linalg.norm(texts, axis=1, keepdims=True)).reshape(len(variants), len(words), -1)
    rows = {caption: row for row, caption in enumerate(variants)}
    own = texts[[rows[caption] for caption in some.captions]]
    return np.einsum("nwd,nd->nw", own, some.features).argmax(axis=1)
