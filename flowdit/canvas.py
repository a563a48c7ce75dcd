"""Drawing charts with Pillow, at twice the size that they are shown at, for sharp text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SCALE = 2
INK = "#24292f"
MUTED = "#6e7781"
GRID = "#eaeef2"
LIMIT = "#cf222e"

Number = int | float


class Canvas:
    """A white image. Coordinates are in units of the shown size, from the top left."""

    def __init__(self, width: Number, height: Number):
        self._image = Image.new("RGB", (round(width * SCALE), round(height * SCALE)), "white")
        self._draw = ImageDraw.Draw(self._image)

    def box(self, left: Number, top: Number, right: Number, bottom: Number, colour: str) -> None:
        """A filled rectangle; one narrower than half a unit is left out."""
        if right - left >= 0.5:
            self._draw.rectangle([round(value * SCALE) for value in (left, top, right, bottom)], colour)

    def line(self, points: Sequence[tuple[Number, Number]], colour: str, width: Number = 1.5) -> None:
        """A line through `points`."""
        scaled = [(x * SCALE, y * SCALE) for x, y in points]
        self._draw.line(scaled, colour, round(width * SCALE), joint="curve")

    def dot(self, x: Number, y: Number, radius: Number, colour: str, outline: str | None = None) -> None:
        """A filled circle."""
        box = [(x - radius) * SCALE, (y - radius) * SCALE, (x + radius) * SCALE, (y + radius) * SCALE]
        self._draw.ellipse(box, colour, outline, width=SCALE)

    def text(self, x: Number, y: Number, text: str, colour: str, *, anchor: str, size: int) -> None:
        """Text at a point of it that Pillow's `anchor` names."""
        font = ImageFont.load_default(size * SCALE)
        self._draw.text((x * SCALE, y * SCALE), text, colour, font, anchor=anchor)

    def save(self, path: Path) -> None:
        """Save as a PNG."""
        self._image.save(path, "PNG")
