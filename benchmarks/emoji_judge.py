"""Style, subject and kernel distance of images that were drawn for pictures of `emoji_styles`, and those of real ones."""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int, UInt8

from benchmarks.emoji_network import STYLE_WIDTH, load_emoji_features
from flowdit.data.emoji_styles import STYLES, Picture, load_sheet
from flowdit.features import FeatureNetwork, FeatureWeights, load_features
from flowdit.hashing import fingerprint
from flowdit.scores.comparison import cache_folder
from flowdit.scores.discriminant import discriminant, whitening
from flowdit.scores.extraction import Extraction
from flowdit.scores.feature_set import FeatureSet, feature_set
from flowdit.scores.metrics import score
from flowdit.sharding import make_local_mesh

Images = UInt8[np.ndarray, "n height width 3"]
Features = Float32[np.ndarray, "n width"]
Numbers = Int[np.ndarray, " n"]
NEIGHBOURS = 5
BATCH = 32
STYLE_SHRINKAGE = 0.003
"""Of the covariance within styles, which are few and have a thousand pictures each."""


class Share(NamedTuple):
    """A value and its standard error."""

    value: float
    error: float


class Row(NamedTuple):
    """A row of the table; None where it does not apply. `near` is for any of the `NEIGHBOURS` nearest."""

    images: str
    number: int
    style: Share | None = None
    nearest: Share | None = None
    near: Share | None = None
    kid: Share | None = None

    def cells(self) -> list[str]:
        """The row as it is printed."""
        shares = [_shown(share, 2) for share in (self.style, self.nearest, self.near)]
        return [self.images, str(self.number), *shares, _shown(self.kid, 4)]


class Real(NamedTuple):
    """All real pictures with their features of style and subject, in the order of `pictures`."""

    pictures: Sequence[Picture]
    sheets: Mapping[str, Images]
    features: Features
    cache: Path

    def images(self, pictures: Sequence[Picture]) -> Images:
        """The pixels of some of them."""
        return np.stack([self.sheets[picture.style][picture.tile] for picture in pictures])

    def features_of(self, pictures: Sequence[Picture]) -> Features:
        """The features of some of them."""
        numbers = {picture.key: number for number, picture in enumerate(self.pictures)}
        return self.features[[numbers[picture.key] for picture in pictures]]

    def as_set(self, pictures: Sequence[Picture]) -> FeatureSet:
        """Some of them as kernel distances are measured from."""
        return feature_set(_cached({"some": self.images(pictures)}, distance_network(), self.cache)["some"])


def load_real(pictures: Sequence[Picture], cache: str | None) -> Real:
    """The pictures with their features, which are computed once and cached style by style."""
    folder, sheets = cache_folder(cache), {style: load_sheet(style) for style in STYLES}
    known = _cached(sheets, judging_network(), folder)
    found = np.stack([known[each.style][each.tile] for each in pictures])
    return Real(pictures, sheets, found, folder)


def _cached(parts: Mapping[str, Images], network: FeatureNetwork, cache: Path) -> dict[str, Features]:
    """The features of images by name, computed once."""
    extraction = Extraction([network], make_local_mesh())

    def features(images: Images) -> Features:
        return np.asarray(extraction.of_images(images, BATCH)[network.name].features)

    def file(images: Images) -> Path:
        return cache / f"emoji-{fingerprint([network.identity.encode(), np.ascontiguousarray(images).tobytes()])}.npy"

    return {name: kept(file(images), functools.partial(features, images)) for name, images in parts.items()}


def kept(file: Path, make: Callable[[], np.ndarray]) -> np.ndarray:
    """The array in a file, which is made and written if it is not there; a killed process leaves none half written."""
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(f".{os.getpid()}.unfinished")
        with unfinished.open("wb") as stream:
            np.save(stream, make())
        unfinished.replace(file)
    return np.load(file, allow_pickle=False)


def judging_network() -> FeatureNetwork:
    """The network by whose features style and subject are told."""
    return load_emoji_features()


def distance_network() -> FeatureNetwork:
    """The network of kernel distances, as of `flowdit.evaluate`."""
    return load_features("efficientnet", FeatureWeights())


class Judge:
    """Tells the style and the subject of an image by the features of the training pictures of all styles.

    It is not fitted to the pictures `asked`, so that they can be judged as images of a model are.
    """

    def __init__(self, real: Real, asked: Sequence[Picture], seed: int = 0):
        self.real, self._seed = real, seed
        subjects = sorted({picture.subject["hexcode"] for picture in real.pictures})
        self._subjects = {subject: number for number, subject in enumerate(subjects)}
        trained, left_out = [each for each in real.pictures if not each.held_out], {each.key for each in asked}
        features = real.features_of(trained)
        self._styles, self._shown = self._style_numbers(trained), self._subject_numbers(trained)
        fitted = np.array([picture.key not in left_out for picture in trained])
        style = features[fitted, :STYLE_WIDTH]
        self._tell_style = discriminant(style, self._styles[fitted], len(STYLES), STYLE_SHRINKAGE)
        self._whiten = whitening(features[fitted, STYLE_WIDTH:], self._shown[fitted])
        self._extraction = Extraction([judging_network(), distance_network()], make_local_mesh())
        self._gallery = _unit(self._whiten(features[:, STYLE_WIDTH:]))

    def row(
        self, name: str, images: Images, asked: Sequence[Picture], others: Sequence[Picture] = (), repeats: int = 1
    ) -> Row:
        """The row of images for the pictures `asked`, `repeats` one after the other for each.

        The kernel distance is that from `others`, real pictures that are not asked for; without them there is none.
        """
        found = self._extraction.of_images(images, BATCH)
        features = np.asarray(found["emoji"].features)
        styles = np.repeat(self._style_numbers(asked), repeats)
        hits = self._neighbours(features, styles) == np.repeat(self._subject_numbers(asked), repeats)[:, None]
        outcomes = (self._tell_style(features[:, :STYLE_WIDTH]) == styles, hits[:, 0], hits.any(axis=1))
        row = Row(name, len(styles), *[_share(outcome, repeats) for outcome in outcomes])
        if not others:
            return row
        drawn = feature_set(np.asarray(found["efficientnet"].features))
        (kid,) = score(["kid"], drawn, self.real.as_set(others), self._seed)
        return row._replace(kid=Share(kid.value, kid.error or 0.0))

    def chance(self, name: str, pictures: Sequence[Picture]) -> Row:
        """The shares that are expected if each real picture is given for another one of them."""
        features, count = self.real.features_of(pictures), len(pictures)
        styles, subjects = self._style_numbers(pictures), self._subject_numbers(pictures)
        told = np.equal(self._tell_style(features[:, :STYLE_WIDTH])[:, None], styles)
        hits = np.empty((count, count, NEIGHBOURS), bool)
        for style in np.unique(styles):
            found = self._neighbours(features, np.full(count, style))
            hits[:, styles == style] = found[:, None] == subjects[None, styles == style, None]
        is_other = ~np.eye(count, dtype=bool)
        shares = [np.mean(outcome, where=is_other) for outcome in (told, hits[:, :, 0], hits.any(axis=2))]
        return Row(name, count, *[Share(float(value), 0.0) for value in shares])

    def _neighbours(self, features: Features, styles: Numbers) -> Int[np.ndarray, "n neighbours"]:
        """The subjects of the nearest training pictures of other styles than the given ones, by the cosine."""
        likeness = _unit(self._whiten(features[:, STYLE_WIDTH:])) @ self._gallery.T
        likeness[styles[:, None] == self._styles] = -np.inf
        return self._shown[np.argsort(-likeness, axis=1, kind="stable")[:, :NEIGHBOURS]]

    def _style_numbers(self, pictures: Sequence[Picture]) -> Numbers:
        return np.array([STYLES.index(picture.style) for picture in pictures], np.int64)

    def _subject_numbers(self, pictures: Sequence[Picture]) -> Numbers:
        return np.array([self._subjects[picture.subject["hexcode"]] for picture in pictures], np.int64)


def _unit(features: Features) -> Features:
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def _share(is_right: Bool[np.ndarray, " n"], repeats: int) -> Share:
    """The share of images, with its standard error over prompts."""
    values = is_right.reshape(-1, repeats).mean(axis=1)
    return Share(float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values))))


def _shown(share: Share | None, digits: int) -> str:
    """A value with its error; a dash for none."""
    if share is None:
        return "-"
    return f"{share.value:.{digits}f}" + (f" ± {share.error:.{digits}f}" if share.error else "")
