"""The emoji in eight drawing styles of the repository as a source."""

import collections
import functools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from flowdit.data import emoji_styles
from flowdit.data.captions import captions_key
from flowdit.data.emoji_styles import STYLES, Picture
from flowdit.data.openmoji import MIN_IMAGES
from flowdit.data.origin import HELD_OUT
from flowdit.data.rejected import Rejected
from flowdit.data.source_listing import Listing
from flowdit.data.sources.base import Row, Unit
from flowdit.data.sources.config import SourceConfig
from flowdit.data.sources.units import shuffled_units
from flowdit.errors import first_line
from flowdit.fields import FieldError, require, require_choice
from flowdit.hashing import file_sha256

FILES = ("table.json", "near_duplicates.json", *(f"{style}.webp" for style in STYLES))
CLASSES = ("subgroup", "style", "both")
"""Values of `label_column`."""
KEPT = ("style", "subject", HELD_OUT)


@dataclass
class EmojiStylesSource:
    """The pictures with their captions, of classes with at least `MIN_IMAGES`; which of them are held out is fixed.

    Records keep the columns `style`, `subject` (the hexcode) and `held_out` (empty, `pair` or `subject`), by which the
    manifest counts the validation split.
    """

    folder: Path
    pictures: Sequence[Picture]
    classes: str
    records_per_shard: int | None
    class_names: tuple[str, ...] | None
    key: str
    captions_key: str | None
    name: str = "emoji_styles"
    has_captions: bool = True
    license: str = emoji_styles.LICENSE
    attribution: str = emoji_styles.ATTRIBUTION
    listing: Listing | None = None
    kept_columns: tuple[str, ...] = KEPT

    def units(self) -> Sequence[Unit]:
        held_out = np.array([bool(picture.held_out) for picture in self.pictures])
        return list(shuffled_units(held_out, 0.0, self.records_per_shard))

    def read(self, unit: Unit, rows: Collection[int] | None = None) -> Iterator[tuple[int, Row | Rejected]]:
        for number, index in enumerate(unit.part.tolist()):
            if rows is None or number in rows:
                picture = self.pictures[index]
                yield (
                    number,
                    Row(
                        picture.key,
                        _sheet(picture.style, self.folder)[picture.tile],
                        _label(picture, self.classes),
                        emoji_styles.captions(picture),
                        dict(zip(KEPT, (picture.style, picture.subject["hexcode"], picture.held_out), strict=True)),
                    ),
                )


@functools.lru_cache(len(STYLES))
def _sheet(style: str, folder: Path) -> UInt8[np.ndarray, "tiles 64 64 3"]:
    return emoji_styles.load_sheet(style, folder)


def _label(picture: Picture, classes: str) -> str:
    names = {"subgroup": picture.subject["subgroup"], "style": picture.style}
    return ", ".join(names.values()) if classes == "both" else names[classes]


def open_emoji_styles(path: str, config: SourceConfig, numbers: Collection[str]) -> EmojiStylesSource:
    """The pictures of the repository, or with the files in `path`; `label_column` chooses the classes.

    Raises `FieldError` for settings of other sources, and where the files are missing.
    """
    own = "must be empty for source=emoji_styles, which has its own"
    require("captions", config.captions, not config.captions, own)
    for name in ("split", "image_column", "caption_column", "long_caption_column", "key_column"):
        value = getattr(config, name)
        require(name, value, not value, own)
    rule = f"must be columns of emoji_styles ({', '.join(KEPT)}), which are always kept"
    require("keep_columns", config.keep_columns, set(config.keep_columns) <= set(KEPT), rule)
    require("filter.min_columns", list(numbers), not numbers, "must be empty for source=emoji_styles")
    classes = config.label_column or CLASSES[0]
    require_choice("label_column", classes, CLASSES)
    folder = Path(path) if path else emoji_styles.FOLDER
    try:
        key = " ".join(file_sha256(folder / name) for name in FILES)
        pictures = emoji_styles.load_pictures(folder)
    except OSError as problem:
        where = "are in assets/emoji_styles of the repository, not in the installed package"
        rule = f"the files of emoji_styles {where}: clone it and give their folder, source=emoji_styles:FOLDER"
        raise FieldError("source", f"{rule}; {folder} has no {Path(str(problem.filename)).name}") from None
    except (ValueError, LookupError, TypeError, AttributeError) as problem:
        raise FieldError("source", f"{folder} has damaged files: {first_line(problem)}") from None
    counts = collections.Counter(_label(picture, classes) for picture in pictures)
    class_names = tuple(sorted(name for name, count in counts.items() if count >= MIN_IMAGES))
    kept = [picture for picture in pictures if counts[_label(picture, classes)] >= MIN_IMAGES]
    return EmojiStylesSource(
        folder=folder,
        pictures=kept,
        classes=classes,
        records_per_shard=config.records_per_shard,
        class_names=class_names,
        key=key,
        captions_key=captions_key(map(emoji_styles.captions, kept)),
    )
