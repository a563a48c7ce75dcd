"""The page about a data set: one HTML file that loads nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from flowdit.data.manifest import Manifest
from flowdit.fields import shortened
from flowdit.inspection import figures
from flowdit.inspection.leftovers import RejectedImages
from flowdit.inspection.pictures import Picture, data_uri
from flowdit.inspection.survey import Example, Survey, channel_values, repeated_captions, size_of
from flowdit.inspection.tokens import Tokens
from flowdit.reporting.grids import Grid
from flowdit.reporting.html import Fact, Html, fact_list, folded, joined, note, section, table, tag
from flowdit.reporting.sections import MISSING
from flowdit.reporting.series import Chart
from flowdit.reporting.shell import chart_grid, figure_of, page_foot, page_head, whole_page

GENERATOR = "flowdit inspect"
"""In every page, which a later one may replace."""
MOST_ROWS = 40
"""Of a table that is not folded."""
LONGEST_TEXT = 600


class Contents(NamedTuple):
    """What the page is made of. `pictures` are evenly spaced records; with `outliers` those of the highest scores."""

    folder: epath.Path
    manifest: Manifest
    survey: Survey
    tokens: Tokens | None
    pictures: Sequence[Picture]
    outliers: Sequence[Picture]
    rejected: RejectedImages | None
    vae_check: Grid | None


def make_page(contents: Contents, title: str | None, num_outliers: int) -> str:
    """The whole file. Text from files is escaped."""
    drawn: list[Chart] = []

    def charts(found: Iterable[Chart]) -> Html:
        made = []
        for chart in found:
            drawn.append(chart)
            made.append(figure_of(len(drawn) - 1, chart, has_legend=len(chart.series) > 1))
        return chart_grid(made)

    survey, manifest = contents.survey, contents.manifest
    all_shown = len(contents.pictures) + 2 * len(contents.outliers) + num_outliers
    sections = {
        "images": ("Images", _images(contents, all_shown), charts(figures.likeness_chart(contents.pictures))),
        "outliers": ("Outliers", *_outliers(contents, num_outliers, all_shown)),
        "sizes": ("Originals", charts(figures.size_charts(survey))),
        "buckets": ("Buckets", _buckets(manifest)),
        "captions": ("Captions", charts(figures.caption_charts(survey, contents.tokens)), *_captions(contents)),
        "classes": ("Classes", charts(figures.class_chart(survey, manifest.num_classes)), _classes(contents)),
        "channels": ("Channels", charts(figures.channel_charts(survey)), _channels(contents)),
        "columns": ("Kept columns", charts(figures.column_charts(survey)), *_columns(survey)),
        "rejected": ("Rejected images", _rejected(contents.rejected)),
        "check": ("Check of the VAE", _vae_check(contents.vae_check)),
        "problems": ("Problems", _problems(survey)),
    }
    parts = {name: section(name, *content) for name, content in sections.items()}
    links = [tag("a", sections[name][0], href=f"#{name}") for name, part in parts.items() if part]
    title = title or contents.folder.name
    body = joined(
        [
            page_head(title, "Inspection", links),
            tag("main", _summary(contents), *parts.values()),
            page_foot("python -m flowdit.inspect"),
        ]
    )
    return whole_page(f"{title}: data set", body, {"runs": [], "charts": [c.as_json() for c in drawn]}, GENERATOR)


def _summary(contents: Contents) -> Html:
    manifest, survey = contents.manifest, contents.survey
    total = sum(shard.records for shard in manifest.shards)
    train, validation = manifest.num_records("train"), manifest.num_records("validation")
    size = sum(shard.bytes for shard in manifest.shards)
    shapes = "x".join(map(str, manifest.latent_shape))
    buckets = f"{len(manifest.buckets)} buckets" if manifest.buckets else "one shape"
    held_out = "".join(f", {part.records:,} {part.name}" for part in manifest.validation_parts)
    facts = [
        Fact("Records", f"{train + validation:,}", f"{train:,} training, {validation:,} validation{held_out}"),
        Fact(
            "Size",
            f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB",
            f"{len(manifest.shards):,} shards",
        ),
        Fact("Images", f"{manifest.image_size} px", buckets),
        Fact("Latents", shapes, manifest.latent_dtype + (" with deviation" if manifest.has_latent_std else "")),
        Fact("VAE", manifest.vae.name),
        Fact("Classes", f"{manifest.num_classes:,}" if manifest.class_names else MISSING),
        Fact("Captions", "yes" if manifest.has_captions else MISSING),
    ]
    if contents.tokens is not None:
        cache = contents.tokens.manifest
        facts.append(Fact("Text features", cache.encoder, f"{cache.truncated:,} of {cache.captions:,} captions cut"))
    if contents.rejected is not None:
        facts.append(Fact("Rejected images", f"{contents.rejected.count:,}"))
    read = f"Histograms and outliers are from {survey.records:,} of {total:,} records, evenly spaced."
    where = tag("p", tag("span", str(contents.folder), class_="path"), class_="note")
    terms = [["licence", manifest.license or "not stated"], ["attribution", manifest.attribution or "not stated"]]
    rows = [[name, tag("div", text, class_="text")] for name, text in terms]
    card = tag("article", where, fact_list(facts), note(read), table(["", ""], rows), class_="card")
    return tag("div", card, class_="cards")


def _images(contents: Contents, share: int) -> list[Html] | Html:
    if not contents.pictures:
        return Html("")
    has_originals = any(picture.original is not None for picture in contents.pictures)
    text = "The original on the left, the decoded latent on the right." if has_originals else "Decoded latents."
    return joined([note(f"{text} Evenly spaced records."), _gallery(contents.pictures, contents.manifest, share)])


def _gallery(pictures: Iterable[Picture], manifest: Manifest, share: int) -> Html:
    return tag("div", *(_picture(picture, manifest, share) for picture in pictures), class_="pictures")


def _picture(picture: Picture, manifest: Manifest, share: int) -> Html:
    record = picture.example.record
    name = str(record.get("key", f"{picture.example.file} record {picture.example.number}"))
    shown = [("decoded latent", picture.decoded)]
    if picture.original is not None and picture.original.pixels is not None:
        shown.insert(0, ("original", picture.original.pixels))
    images = []
    for kind, pixels in shown:
        uri, width, height = data_uri(pixels, 2 * share)
        images.append(tag("img", src=uri, width=width, height=height, alt=f"{kind} of {name}", title=kind))
    label = manifest.class_names[int(record["label"])] if "label" in record else None
    captions = [record[field] for field in ("short_caption", "long_caption") if record.get(field)]
    return tag(
        "figure",
        tag("div", *images, class_="pair" if len(images) > 1 else "pair alone"),
        tag("figcaption", tag("span", name, class_="path"), note(" · ".join(_facts(picture)))),
        tag("p", tag("b", label)) if label is not None else None,
        *(tag("p", shortened(caption, LONGEST_TEXT)) for caption in captions),
        class_="picture card",
    )


def _facts(picture: Picture) -> Iterator[str]:
    """What is known about a record, in a few words each."""
    record = picture.example.record
    yield picture.example.split
    if "image_size" in record:
        height, width = size_of(record)
        yield f"{width} x {height} px"
    if record.get("mirrored"):
        yield "mirrored"
    if picture.psnr is not None:
        yield f"{picture.psnr:.1f} dB"
    if picture.original is not None and picture.original.problem:
        yield f"original: {shortened(picture.original.problem)}"
    yield f"at most {picture.example.score:.1f} std"


def _outliers(contents: Contents, count: int, share: int) -> Iterator[Html]:
    measured = [picture for picture in contents.pictures if picture.psnr is not None]
    worst = sorted(measured, key=lambda picture: picture.psnr or 0)[:count]
    if worst:
        yield tag("h3", "Lowest PSNR against the original, of the images above")
        yield _gallery(worst, contents.manifest, share)
    if contents.outliers:
        yield tag("h3", "Latents with the largest distance from the mean of a channel")
        yield _gallery(contents.outliers, contents.manifest, share)
    elif contents.survey.outliers:
        rows = [[_name(e), f"{e.score:.2f}"] for e in contents.survey.outliers]
        head = tag("h3", "Latents with the largest distance from the mean of a channel")
        yield tag("div", head, table(["record", "standard deviations"], rows), class_="card")


def _name(example: Example) -> str:
    return str(example.record.get("key", f"{example.file} record {example.number}"))


def _share(count: int, total: int) -> Html:
    """A bar for a part of a whole."""
    width = 100 * count / max(total, 1)
    bar = tag("rect", class_="bar c0", x=0, y=0, width=f"{width:.1f}", height=8)
    return tag("svg", bar, class_="share", viewBox="0 0 100 8", preserveAspectRatio="none", aria_hidden="true")


def _counts(head: str, counts: Sequence[tuple[Any, int]], total: int) -> Html:
    """A table of counts with bars, of which only the first rows are shown."""
    most = max((count for _, count in counts), default=1)
    rows = [[name, f"{count:,}", f"{count / max(total, 1):.1%}", _share(count, most)] for name, count in counts]
    titles = [head, "records", "", ""]
    first = table(titles, rows[:MOST_ROWS], "counts")
    if len(rows) <= MOST_ROWS:
        return first
    return joined([first, folded(f"{len(rows) - MOST_ROWS:,} more", table(titles, rows[MOST_ROWS:], "counts"))])


def _buckets(manifest: Manifest) -> Html:
    if not manifest.buckets:
        return Html("")
    train, validation = manifest.bucket_counts("train"), manifest.bucket_counts("validation")
    most = max(train, default=0)
    rows = [
        [f"{b.width} x {b.height}", f"{b.height / b.width:.2f}", f"{n:,}", f"{held:,}", _share(n, most)]
        for b, n, held in zip(manifest.buckets, train, validation, strict=True)
    ]
    head = ["width x height", "height / width", "training", "validation", ""]
    text = note("All records, as counted in the manifest. A batch comes of one bucket.")
    return tag("div", text, table(head, rows, "counts"), class_="card")


def _captions(contents: Contents) -> Iterator[Html]:
    survey = contents.survey
    if not contents.manifest.has_captions:
        return
    rows = []
    for field, lengths in survey.lengths.items():
        there = [length for length in lengths if length]
        middle = f"{np.median(there):,.0f}" if there else MISSING
        longest = f"{max(there):,}" if there else MISSING
        rows.append([field, f"{len(there):,}", f"{len(lengths) - len(there):,}", middle, longest])
    head = ["", "records with it", "empty", "median length", "longest"]
    yield tag("div", table(head, rows, "numbers"), class_="card")
    repeated = list(repeated_captions(survey, MOST_ROWS))
    if repeated:
        rows = [[shortened(caption, LONGEST_TEXT), f"{count:,}"] for caption, count in repeated]
        head = tag("h3", "Captions of several records")
        yield tag("div", head, table(["caption", "records"], rows, "counts"), class_="card")


def _classes(contents: Contents) -> Html:
    names, labels = contents.manifest.class_names, contents.survey.labels
    if not names:
        return Html("")
    counts = sorted(((name, labels.get(i, 0)) for i, name in enumerate(names)), key=lambda item: -item[1])
    empty = sum(count == 0 for _, count in counts)
    text = f"{empty:,} of {len(names):,} classes have no record among those that were read." if empty else ""
    return tag("div", note(text) if text else None, _counts("class", counts, contents.survey.records), class_="card")


def _channels(contents: Contents) -> Html:
    found, manifest = channel_values(contents.survey), contents.manifest
    if found is None:
        return Html("")
    vae = manifest.vae
    rows = []
    for i, (mean, std) in enumerate(zip(*found, strict=True)):
        stored = (manifest.channel_mean[i], manifest.channel_std[i])
        normal = ((mean - vae.shift) * vae.scale, std * abs(vae.scale))
        rows.append([str(i), *(f"{value:.4f}" for value in (stored[0], mean, stored[1], std, *normal))])
    head = ["channel", "mean in the manifest", "of the records", "deviation in the manifest", "of the records"]
    head += ["mean after shift and scale", "deviation"]
    text = "The records that were read, of the train split. flowdit verify compares the statistics over all records."
    return tag("div", note(text), table(head, rows, "numbers"), class_="card")


def _columns(survey: Survey) -> Iterator[Html]:
    for name, column in survey.columns.items():
        if not column.texts and not column.missing:
            continue
        counts: list[tuple[Any, int]] = [(shortened(text), count) for text, count in column.texts.most_common()]
        if column.others:
            counts.append((tag("i", "other texts"), column.others))
        if column.missing:
            counts.append((tag("i", "none"), column.missing))
        yield tag("div", tag("h3", name), _counts("value", counts, survey.records), class_="card")


def _rejected(found: RejectedImages | None) -> Html:
    if found is None or not found.count:
        return Html("")
    reasons = _counts("reason", found.reasons.most_common(), found.count)
    first = folded("the first of them", table(["image", "reason"], found.first))
    return tag("div", reasons, first, class_="card")


def _vae_check(sheet: Grid | None) -> Html:
    if sheet is None:
        return Html("")
    text = note("Images beside their reconstructions, the least similar ones first: vae_check.png of flowdit prepare.")
    image = tag("img", src=sheet.uri, width=sheet.width, height=sheet.height, alt="check of the VAE")
    return tag("div", text, tag("div", image, class_="sheet scroll", tabindex="0"), class_="card")


def _problems(survey: Survey) -> Html:
    if not survey.problems:
        return Html("")
    text = note(f"{len(survey.problems):,} were found in what was read; flowdit verify checks everything.")
    rows = [[each.file, "" if each.record is None else f"{each.record:,}", each.problem] for each in survey.problems]
    return tag("div", text, table(["file", "record", "problem"], rows[:MOST_ROWS]), class_="card")
