"""The embedded data set: OpenMoji 17.0 at 64x64 ("the open-source emoji and icon project", CC BY-SA 4.0)."""

import collections
import json
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int, UInt8
from PIL import Image

FOLDER = Path(__file__).resolve().parents[1] / "assets" / "openmoji"
LICENSE = "CC BY-SA 4.0"
ATTRIBUTION = (
    "OpenMoji 17.0, the open-source emoji and icon project (openmoji.org); rasterised to 64x64, variants left out"
)
TILE, COLUMNS = 64, 49
MIN_IMAGES = 8
"""Minimum number of images of a class: fewer are too few to learn from and to hold one out."""
COLOURS = [
    "red",
    "orange",
    "yellow",
    "green",
    "blue",
    "purple",
    "violet",
    "pink",
    "brown",
    "black",
    "white",
    "gray",
    "grey",
]
MATERIALS = ["gold", "silver", "bronze", "wood", "metal", "iron", "glass", "stone", "brick", "paper", "wool", "ice"]
LOOKS = {*COLOURS, *MATERIALS, "rainbow", "light", "dark"}
"""Visible properties, which come first among the tags."""


class OpenMoji(NamedTuple):
    """Images with classes, (short, long) captions and names, their code points. About 1 in 20 is held out, as for the embedded VAE."""

    tiles: UInt8[np.ndarray, " images 64 64 3"]
    labels: Int[np.ndarray, " images"]
    held_out: Bool[np.ndarray, " images"]
    class_names: tuple[str, ...]
    captions: list[tuple[str, str]]
    names: list[str]


def load() -> OpenMoji:
    """Load the images of all subgroups with at least `MIN_IMAGES`; subgroups of the same name are one class."""
    table = json.loads((FOLDER / "table.json").read_text(encoding="utf-8"))
    counts = collections.Counter(row["subgroup"] for row in table)
    class_names = tuple(sorted(name for name, count in counts.items() if count >= MIN_IMAGES))
    kept = [i for i, row in enumerate(table) if row["subgroup"] in class_names]
    return OpenMoji(
        tiles=_tiles()[kept],
        labels=np.array([class_names.index(table[i]["subgroup"]) for i in kept]),
        held_out=np.array([is_held_out(table[i]) for i in kept]),
        class_names=class_names,
        captions=[captions(table[i]) for i in kept],
        names=[table[i]["hexcode"] for i in kept],
    )


def captions(row: Mapping[str, Any]) -> tuple[str, str]:
    """The short caption, the name of the image, and the long caption.

    The long one adds the subgroup and the tags that contain new words, colours and materials first: "pear", "pear, food
    fruit, green".
    """
    short = re.sub("^flag: ", "flag of ", row["annotation"])
    kind = row["subgroup"].removesuffix("-other").replace("-", " ")
    tags = sorted(row["tags"], key=lambda tag: tag.lower() not in LOOKS)
    parts, seen = [short], _words(short)
    for part in (kind, *tags):
        is_country_code = row["group"] == "flags" and re.fullmatch("[A-Z]{2}", part)
        if not is_country_code and not _words(part) <= seen:
            parts.append(part)
            seen |= _words(part)
    return short, ", ".join(parts)


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def is_held_out(row: dict[str, Any]) -> bool:
    """Whether an image is held out: whole families are, so that no near-copy is in the training split."""
    return zlib.crc32(image_family(row["hexcode"]).encode()) % 20 == 0


def image_family(hexcode: str) -> str:
    """The family of an image: variants share their first code point; each flag is its own family."""
    return hexcode if hexcode.startswith("1F1") else hexcode.split("-")[0]


def _tiles() -> np.ndarray:
    sheet = np.asarray(Image.open(FOLDER / "sheet.webp").convert("RGB"))
    rows = sheet.reshape(-1, TILE, COLUMNS, TILE, 3)
    return rows.swapaxes(1, 2).reshape(-1, TILE, TILE, 3)
