"""The preprocessing of a Hugging Face folder, read from its `preprocessor_config.json` and run inside a jitted function."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8
from pydantic import Field
from pydantic.dataclasses import dataclass

from flowdit.features.resize import resize
from flowdit.fields import content_of, require
from flowdit.json_input import STRICT_PART, Positive, parse
from flowdit.models import pretrained

FILE = "preprocessor_config.json"
BICUBIC = 3
"""Pillow's number of the filter."""

Side = Annotated[int, Field(ge=1, le=2048)]
PerChannel = Annotated[tuple[float, ...], Field(min_length=3, max_length=3)]


@dataclass(frozen=True, config=STRICT_PART)
class Size:
    """The target of a resize or a crop: both sides, or only the shorter one."""

    height: Side | None = None
    width: Side | None = None
    shortest_edge: Side | None = None

    @property
    def sides(self) -> tuple[int, int] | None:
        """Height and width, None if only the shorter side is given."""
        return None if self.height is None or self.width is None else (self.height, self.width)


@dataclass(frozen=True, config=STRICT_PART)
class Preprocessing:
    """Bicubic resize, centre crop, and normalisation, with the names of `preprocessor_config.json`.

    A size that is a number is the shorter side, a crop that is a number is square.
    """

    size: Size | Side
    image_mean: PerChannel
    image_std: Annotated[tuple[Positive, ...], Field(min_length=3, max_length=3)]
    crop_size: Size | Side | None = None
    do_center_crop: bool = True
    resample: Literal[3] = BICUBIC
    rescale_factor: Positive = 1 / 255
    do_resize: Literal[True] = True
    do_rescale: Literal[True] = True
    do_normalize: Literal[True] = True

    def check(self) -> None:
        """Raise `FieldError` unless every image ends with the same sides."""
        size = self._size
        is_whole = size.sides is not None or size.shortest_edge is not None
        require("size", self.size, is_whole, "must have height and width, or shortest_edge")
        if not self.do_center_crop:
            require("size", self.size, size.sides is not None, "must have height and width without a crop")
            return
        crop = self._crop
        require("crop_size", self.crop_size, crop is not None, "must have height and width")
        smallest = size.sides or (size.shortest_edge, size.shortest_edge)
        is_inside = crop is not None and all(a <= b for a, b in zip(crop, smallest, strict=True))  # type: ignore[operator]
        require("crop_size", self.crop_size, is_inside, f"must be at most the size {smallest}")

    @property
    def _size(self) -> Size:
        return Size(shortest_edge=self.size) if isinstance(self.size, int) else self.size

    @property
    def _crop(self) -> tuple[int, int] | None:
        if isinstance(self.crop_size, int):
            return self.crop_size, self.crop_size
        return self.crop_size.sides if self.crop_size else None

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width of the result."""
        sides = self._crop if self.do_center_crop else self._size.sides
        assert sides is not None  # by `check`
        return sides

    def describe(self) -> str:
        """Resize and crop in a few words, for the identity of a feature network."""
        size = "x".join(map(str, self._size.sides or (self._size.shortest_edge,)))
        return f"bicubic {size}" + (f" crop {'x'.join(map(str, self.sides))}" if self.do_center_crop else "")

    def __call__(self, images: UInt8[Array, "n height width 3"]) -> Float[Array, "n new_height new_width 3"]:
        """The network's input."""
        height, width = images.shape[1:3]
        if (sides := self._size.sides) is None:
            shorter, target = min(height, width), self._size.shortest_edge
            assert target is not None  # by `check`
            sides = tuple(target if side == shorter else int(target * side / shorter) for side in (height, width))
        pixels = resize(images, *sides)
        top, left = ((side - kept) // 2 for side, kept in zip(sides, self.sides, strict=True))
        return self._normalised(pixels[:, top : top + self.sides[0], left : left + self.sides[1]])

    def whole(self, images: UInt8[Array, "n height width 3"]) -> Float[Array, "n new_height new_width 3"]:
        """The network's input that shows all of an image: resized to its sides, without a crop."""
        return self._normalised(resize(images, *self.sides))

    def _normalised(self, pixels: Float[Array, "n height width 3"]) -> Float[Array, "n height width 3"]:
        mean, std = (jnp.asarray(values, jnp.float32)[None, None, None] for values in (self.image_mean, self.image_std))
        return (pixels * self.rescale_factor - mean) / std


def read_preprocessing(folder: Path) -> Preprocessing:
    """Read the file of a folder. Raises `ValueError` naming it if it is missing, invalid, or asks for anything else."""
    file = folder / FILE
    raw: Mapping[str, Any] = pretrained.read_json(file)
    names = [field.name for field in dataclasses.fields(Preprocessing)]
    with content_of(file):
        preprocessing = parse(Preprocessing, {name: raw[name] for name in names if raw.get(name) is not None})
        preprocessing.check()
    return preprocessing
