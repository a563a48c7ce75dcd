"""Captioned grids of images, as PNG files."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from etils import epath
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont


def save_grid(
    path: epath.PathLike,
    images: UInt8[np.ndarray, "n height width 3"],
    captions: Sequence[str],
    columns: int,
    gap: int = 4,
) -> None:
    """Save a PNG of a grid in row-major order, each image with its caption below. Small images are enlarged."""
    zoom = max(1, 128 // images.shape[2])
    height, width = images.shape[1] * zoom, images.shape[2] * zoom
    font = ImageFont.load_default(11)
    texts = [wrap_caption(caption, font.getlength, width) for caption in captions]
    cell_height, cell_width = height + 2 + 14 * max(text.count("\n") + 1 for text in texts) + gap, width + gap
    rows, columns = -(-len(images) // columns), min(columns, len(images))
    canvas = Image.new("RGB", (columns * cell_width + gap, rows * cell_height + gap), "white")
    draw = ImageDraw.Draw(canvas)
    for i, (image, text) in enumerate(zip(images, texts, strict=True)):
        left, top = gap + i % columns * cell_width, gap + i // columns * cell_height
        canvas.paste(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS), (left, top))
        draw.text((left + width // 2, top + height + 1), text, "#444", font, anchor="ma", align="center", spacing=2)
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        canvas.save(file, "PNG")  # type: ignore[arg-type]


def wrap_caption(caption: str, length: Callable[[str], float], width: int, max_lines: int = 3) -> str:
    """Wrap `caption` to at most `max_lines` lines of at most `width`; longer text ends in an ellipsis."""
    lines, words = [""], caption.split()
    for word in words:
        longer = f"{lines[-1]} {word}".strip()
        if length(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > max_lines:
        lines = [*lines[: max_lines - 1], " ".join(lines[max_lines - 1 :])]
    return "\n".join(_shortened(line, length, width) for line in lines)


def _shortened(text: str, length: Callable[[str], float], width: int) -> str:
    if length(text) <= width:
        return text
    while text and length(text + "…") > width:
        text = text[:-1]
    return text + "…"
