"""The charts of the page: histograms of a survey."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Float

from flowdit.inspection.pictures import Picture
from flowdit.inspection.survey import EDGES, Survey
from flowdit.inspection.tokens import Tokens
from flowdit.reporting.series import Chart, Series

Numbers = Sequence[int | float] | Float[np.ndarray, " n"]
BINS = 40
FEWEST = 10
"""Bins of whole numbers."""
TAIL = 99.5
"""Percentile at which a histogram with a long tail ends; its last bar has what is beyond."""
TAIL_NOTE = "The last bar also has the records beyond it."
CAPTION_NAMES = {"short_caption": "short", "long_caption": "long"}


def histogram(name: str, values: Numbers, edges: np.ndarray, colour: int = 0) -> Series:
    """The number of values between edges, which have equal distances; those outside are in the first and last bin."""
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
    centres = (edges[:-1] + edges[1:]) / 2
    return Series(name, 0, centres.tolist(), counts.tolist(), colour=colour, bars=float(edges[1] - edges[0]))


def edges_of(values: Numbers, *, low: int | float | None = None, are_whole: bool = False) -> np.ndarray:
    """Edges of about `BINS` bins up to the percentile `TAIL`; between whole numbers a bin is a whole number wide."""
    start = float(np.min(values)) if low is None else low
    end = float(np.percentile(values, TAIL))
    if are_whole:
        start -= max(0, (FEWEST - int(end - start)) // 2) if low is None else 0  # a single value is a narrow bar
        end = max(end, start + FEWEST)
        width = max(1, math.ceil((end - start + 1) / BINS))
        return start - 0.5 + width * np.arange(math.ceil((end - start + 1) / width) + 1)
    if not end > start:
        start, end = start - 1, start + 1
    return np.linspace(start, end, BINS + 1)


def size_charts(survey: Survey) -> Iterator[Chart]:
    """Sizes and shapes of the originals, and what the crops show of them."""
    if survey.sizes:
        sizes = np.array(survey.sizes, float)
        shorter, ratios = sizes.min(1), np.log2(sizes[:, 0] / sizes[:, 1])
        edges = edges_of(shorter, are_whole=True)
        yield Chart(
            "sizes", "Shorter side of the originals", "pixels", [histogram("records", shorter, edges)], TAIL_NOTE
        )
        text = "0 is square, 1 twice as high as wide, -1 twice as wide as high."
        limit = max(1.0, math.ceil(float(np.abs(ratios).max())))
        edges = np.linspace(-limit, limit, BINS + 2)  # an odd number, so that squares are in the middle of a bin
        chart = histogram("records", ratios, edges)
        yield Chart("sizes", "Aspect ratio", "log2(height / width)", [chart], text)
    if survey.seen:
        percent = 100 * np.array(survey.seen)
        text = "What is left of the area of an original after the crop."
        edges = np.linspace(0, 100, BINS + 1)
        yield Chart("sizes", "Part that the latent shows", "%", [histogram("records", percent, edges)], text)


def caption_charts(survey: Survey, tokens: Tokens | None) -> Iterator[Chart]:
    """Lengths of captions in characters and in tokens."""
    if chart := _lengths("Length of captions", "characters", survey.lengths):
        yield chart
    if tokens is not None:
        count, most = sum(map(len, tokens.lengths.values())), tokens.manifest.max_length
        note = f"From {count:,} captions; longer ones are cut to {most} tokens."
        if chart := _lengths("Length of captions in tokens", "tokens", tokens.lengths, note):
            yield chart


def _lengths(title: str, unit: str, lengths: Mapping[str, Sequence[int]], note: str = TAIL_NOTE) -> Chart | None:
    present = {name: [length for length in values if length] for name, values in lengths.items()}
    everything = [length for values in present.values() for length in values]
    if not everything:
        return None
    edges = edges_of(everything, low=0 if unit == "characters" else 1, are_whole=True)
    series = [
        histogram(CAPTION_NAMES.get(name, name), values, edges, colour)
        for colour, (name, values) in enumerate(present.items())
        if values
    ]
    return Chart("captions", title, unit, series, note)


def class_chart(survey: Survey, num_classes: int) -> Iterator[Chart]:
    """The number of records of each class, the largest first."""
    if survey.labels and num_classes > 1:
        counts = sorted((survey.labels.get(i, 0) for i in range(num_classes)), reverse=True)
        series = Series("records", 0, list(range(1, num_classes + 1)), counts, colour=0, bars=1.0)
        yield Chart("classes", "Records of a class", "rank of the class", [series])


def channel_charts(survey: Survey) -> Iterator[Chart]:
    """The distribution of latents, as the model gets them, and of the largest value of each record."""
    centres = (EDGES[:-1] + EDGES[1:]) / 2
    share = survey.values / max(survey.values.sum(), 1) / (EDGES[1] - EDGES[0])
    normal = np.exp(-np.square(centres) / 2) / math.sqrt(2 * math.pi)
    bars = Series("latents", 0, centres.tolist(), share.tolist(), colour=0, bars=float(EDGES[1] - EDGES[0]))
    curve = Series("normal distribution", 0, centres.tolist(), normal.tolist(), colour=1)
    yield Chart("channels", "Latents after shift and scale", "value", [bars, curve], "Density over all channels.")
    text = "The largest distance of a value from the mean of its channel."
    series = histogram("records", survey.scores, edges_of(survey.scores))
    yield Chart("channels", "Largest value of a record", "standard deviations", [series], f"{text} {TAIL_NOTE}")


def likeness_chart(pictures: Sequence[Picture]) -> Iterator[Chart]:
    """How well the decoded latents reproduce the originals."""
    values = [picture.psnr for picture in pictures if picture.psnr is not None]
    if len(values) > 1:
        yield Chart("images", "PSNR against the originals", "dB", [histogram("records", values, edges_of(values))])


def column_charts(survey: Survey) -> Iterator[Chart]:
    """Histograms of kept columns that are numbers."""
    for name, column in survey.columns.items():
        values = [value for value in column.numbers if math.isfinite(value)]
        if len(set(values)) > 1:
            yield Chart("columns", name, "value", [histogram("records", values, edges_of(values))], TAIL_NOTE)
