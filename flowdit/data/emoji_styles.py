"""Emoji in eight openly licensed drawing styles at 64x64: 12,026 pictures of 1,912 subjects, and which are held out.

The files are in the repository, `assets/emoji_styles`, and not in the installed package.
"""

import collections
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from flowdit.data import openmoji

FOLDER = Path(__file__).resolve().parents[2] / "assets" / "emoji_styles"
STYLES = ("openmoji", "twemoji", "noto", "fluent-emoji-flat", "fluent-emoji", "emojione", "fxemoji", "noto-v1")
STYLE_NAMES = {"fluent-emoji": "fluent", "fluent-emoji-flat": "fluent flat", "noto-v1": "noto v1"}
"""Names of styles in captions, where they are not those of the files."""
LICENSE = (
    "CC BY-SA 4.0, https://creativecommons.org/licenses/by-sa/4.0/ (style openmoji); CC BY 4.0, "
    "https://creativecommons.org/licenses/by/4.0/ (twemoji, emojione, fxemoji); Apache 2.0 (noto, noto-v1); "
    "MIT (fluent-emoji, fluent-emoji-flat); names and tags: MIT (emojibase-data) and Unicode License V3, "
    "https://www.unicode.org/license.txt (Unicode CLDR)"
)
ATTRIBUTION = (
    "OpenMoji (openmoji.org); Twemoji by Twitter, Inc and other contributors; Noto Emoji and Noto Emoji v1 by Google Inc; "
    "Fluent Emoji and Fluent Emoji Flat by Microsoft Corporation; Emoji One (EmojiTwo); Firefox OS Emoji by Mozilla "
    "Foundation; all rasterised to 64x64 on white; names and tags: emojibase-data by Miles Johnson, Unicode CLDR"
)
FLUENT = ("fluent-emoji-flat", "fluent-emoji")
"""Two styles with the same drawings, one of them shaded."""
TILE, COLUMNS = 64, 64
PAIR_FRACTION = 0.05
MIN_TRAINED_STYLES = 3
"""The subject of a held-out pair is trained in at least this many other styles."""
NUM_HELD_OUT_SUBJECTS, MIN_SUBJECT_STYLES = 60, 6

HeldOut = Literal["", "pair", "subject"]
Tile = tuple[str, str]
"""Style and hexcode of the subject."""


class Picture(NamedTuple):
    """One subject in one style. `subject` is its row of the table, `tile` its number in the style's sheet.

    `held_out` is empty for training pictures, else the part of the validation split: `pair` or `subject`.
    """

    style: str
    subject: Mapping[str, Any]
    tile: int
    held_out: HeldOut

    @property
    def key(self) -> str:
        return f"{self.style}/{self.subject['hexcode']}"


def load_pictures(folder: Path = FOLDER) -> list[Picture]:
    """All pictures, in the order of the table and then of the styles. Raises `OSError` if a file is missing."""
    table = read_json(folder / "table.json")
    held_out = split(table, read_json(folder / "near_duplicates.json"))
    return [
        Picture(style, row, row["tiles"][style], held_out[style, row["hexcode"]])
        for row in table
        for style in drawn_styles(row)
    ]


def read_json(path: Path) -> list[Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def load_sheet(style: str, folder: Path = FOLDER) -> UInt8[np.ndarray, "tiles 64 64 3"]:
    """The tiles of a style; the last ones may be unused and white."""
    sheet = np.asarray(Image.open(folder / f"{style}.webp").convert("RGB"))
    return sheet.reshape(-1, TILE, COLUMNS, TILE, 3).swapaxes(1, 2).reshape(-1, TILE, TILE, 3)


def captions(picture: Picture) -> tuple[str, str]:
    """The short and the long caption of the subject (`openmoji.captions`) with the style behind its name.

    "pear, noto style" and "pear, noto style, food fruit, green". Names lose their commas ("family: man woman girl boy"),
    as what stands behind the first one counts as tags (`flowdit.data.captions.drop_tags`).
    """
    name = picture.subject["annotation"].replace(",", "")
    short, long = openmoji.captions({**picture.subject, "annotation": name})
    with_style = f"{short}, {STYLE_NAMES.get(picture.style, picture.style)} style"
    return with_style, with_style + long.removeprefix(short)


def drawn_styles(row: Mapping[str, Any]) -> list[str]:
    """The styles in which a subject is drawn."""
    return [style for style in STYLES if row["tiles"][style] is not None]


def split(table: Sequence[Mapping[str, Any]], near_duplicates: Iterable[Sequence[str]]) -> dict[Tile, HeldOut]:
    """Which part each picture belongs to, by its names alone.

    60 subjects that are drawn in at least six styles and have neither variants nor near-duplicates are held out in all
    styles. Of the other pictures 5 % are, if their subject stays trained in at least three styles. Near-duplicates,
    given as pairs of keys, and the two Fluent pictures of a subject are on the same side.
    """
    parts: dict[Tile, HeldOut] = {(style, row["hexcode"]): "" for row in table for style in drawn_styles(row)}
    links = [(_tile(first), _tile(second)) for first, second in near_duplicates]
    subjects = _held_out_subjects(table, links)
    parts |= {tile: "subject" for tile in parts if tile[1] in subjects}
    fluent = [[(style, row["hexcode"]) for style in FLUENT] for row in table]
    links += [(flat, shaded) for flat, shaded in fluent if flat in parts and shaded in parts]
    trained = collections.Counter(tile[1] for tile in parts)
    for family in _families(parts, links):
        lost = collections.Counter(subject for _, subject in family)
        stays = all(trained[subject] - count >= MIN_TRAINED_STYLES for subject, count in lost.items())
        if stays and not subjects & lost.keys() and _uniform(min(family)) < PAIR_FRACTION:
            parts |= dict.fromkeys(family, "pair")
            trained -= lost
    return parts


def _tile(key: str) -> Tile:
    style, hexcode = key.split("/")
    return style, hexcode


def _held_out_subjects(table: Sequence[Mapping[str, Any]], links: Iterable[tuple[Tile, Tile]]) -> set[str]:
    """Variants share their first code point (man, woman, with red hair, ...)."""
    variants = collections.Counter(row["hexcode"].split("-")[0] for row in table)
    with_duplicates = {subject for (_, a), (_, b) in links if a != b for subject in (a, b)}
    fit = [
        row["hexcode"]
        for row in table
        if len(drawn_styles(row)) >= MIN_SUBJECT_STYLES
        and variants[row["hexcode"].split("-")[0]] == 1
        and row["hexcode"] not in with_duplicates
    ]
    return set(sorted(fit, key=lambda hexcode: _uniform(("", hexcode)))[:NUM_HELD_OUT_SUBJECTS])


def _families(tiles: Iterable[Tile], links: Iterable[tuple[Tile, Tile]]) -> list[list[Tile]]:
    """The connected components of `links`, single tiles among them, in the order of their first tile."""
    family = {tile: [tile] for tile in tiles}
    for first, second in links:
        if family[first] is not family[second]:
            joined = family[first] + family[second]
            family |= dict.fromkeys(joined, joined)
    return list({id(members): members for members in family.values()}.values())


def _uniform(tile: Tile) -> float:
    """A number in [0, 1) from the names."""
    return int.from_bytes(hashlib.sha256("/".join(tile).encode()).digest()[:6], "big") / 2**48
