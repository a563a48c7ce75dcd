"""What `benchmarks.text_model` asks a model for: pictures of `emoji_styles` chosen by a hash of their names, and free prompts."""

import collections
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from flowdit.data import openmoji
from flowdit.data.emoji_styles import MIN_TRAINED_STYLES, Picture, captions
from flowdit.hashing import fingerprint

IMAGES = 4
"""Drawn for each prompt of a grid."""
PROMPTS = 24
"""Of a grid, equally many in each style."""
FREE = (
    *("a blue apple", "a blue banana", "a purple cat", "a red car", "a yellow flower, noto style"),
    *("a black star, twemoji style", "a pink house, fluent style", "a pink book, openmoji style"),
    *("three cats", "two apples", "four stars", "two red hearts", "three yellow flowers, twemoji style"),
    *("five balloons, fluent style", "a red heart on a yellow circle", "a cat with a hat"),
    *("a star and a moon", "an apple and a banana, noto style", "a dog in a car, twemoji style"),
    *("a fish in a glass, openmoji style", "a crying sun", "a happy cloud, noto v1 style"),
    *("a face with blue glasses, emojione style", "a tree with red flowers, fxemoji style"),
)
"""Colours, counts and combinations that hardly any picture has, with a style or without."""


class Prompts(NamedTuple):
    """Prompts with the picture that each describes; `pictures` is empty for free prompts."""

    prompts: list[str]
    pictures: list[Picture]


def trained(pictures: Iterable[Picture], styles: Sequence[str]) -> list[Picture]:
    """Training pictures in the styles that a model knows, of subjects that are trained in three other styles.

    So are the subjects of held-out pairs, and the judge finds them by those styles. A model of `openmoji` alone may be
    one of the embedded set: its pictures are trained in both splits.
    """
    kept = [picture for picture in pictures if not picture.held_out]
    counts = collections.Counter(picture.subject["hexcode"] for picture in kept)
    kept = [each for each in kept if each.style in styles and counts[each.subject["hexcode"]] > MIN_TRAINED_STYLES]
    if list(styles) != ["openmoji"]:
        return kept
    embedded = openmoji.load()
    known = {name for name, is_held_out in zip(embedded.names, embedded.held_out, strict=True) if not is_held_out}
    return [picture for picture in kept if picture.subject["hexcode"] in known]


def described(pictures: Sequence[Picture], names_style: bool) -> Prompts:
    """The prompts of pictures: name and style, or the name alone."""
    return Prompts([prompt(picture, names_style) for picture in pictures], list(pictures))


def prompt(picture: Picture, names_style: bool) -> str:
    """The short caption of a picture, with or without the style."""
    return captions(picture)[0] if names_style else openmoji.captions(picture.subject)[0]


def by_hash(pictures: Iterable[Picture]) -> list[Picture]:
    """The pictures in an order that depends on their names alone and is not that of the split."""
    return sorted(pictures, key=lambda picture: fingerprint(f"shown {picture.key}"))


def of_every_style(pictures: Iterable[Picture], styles: Sequence[str]) -> list[Picture]:
    """The first `PROMPTS` pictures by hash, of different subjects and equally many of each style, sorted by style."""
    chosen: list[Picture] = []
    left, subjects = dict.fromkeys(styles, PROMPTS // len(styles)), set()
    for picture in by_hash(pictures):
        if left.get(picture.style) and picture.subject["hexcode"] not in subjects:
            chosen.append(picture)
            subjects.add(picture.subject["hexcode"])
            left[picture.style] -= 1
    return sorted(chosen, key=lambda picture: styles.index(picture.style))


def companions(pairs: Sequence[Picture], pictures: Iterable[Picture]) -> list[Picture]:
    """For each held-out pair the first training picture by hash of its subject."""
    first: dict[str, Picture] = {}
    for picture in by_hash(picture for picture in pictures if not picture.held_out):
        first.setdefault(picture.subject["hexcode"], picture)
    return [first[pair.subject["hexcode"]] for pair in pairs]
