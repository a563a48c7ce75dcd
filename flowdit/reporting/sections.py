"""The parts of the page that are text and tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from flowdit.config import Config
from flowdit.joining import ProcessConfig
from flowdit.reporting.facts import duration, facts, moment
from flowdit.reporting.grids import MOST_BYTES, Grid, embed
from flowdit.reporting.html import Html, fact_list, folded, joined, note, table, tag
from flowdit.reporting.reading import RunRecord
from flowdit.reporting.results import Results, metric_title
from flowdit.scores.metrics import Score
from flowdit.scores.results import COLUMNS, shown_score, shown_setting
from flowdit.settings import in_yaml
from flowdit.training.resume import STARTING_FIELDS, flat_settings

MISSING = "–"


def cards(runs: Sequence[RunRecord]) -> Html:
    """A card for each run with its main figures."""
    made = []
    for number, run in enumerate(runs):
        where = tag("p", tag("span", str(run.folder), class_="path"), f", {_origin(run)}", class_="note")
        head = tag("h3", run.name) if len(runs) > 1 else None
        made.append(tag("article", head, where, fact_list(facts(run)), class_=f"card run c{number}"))
    return tag("div", *made, class_="cards several" if len(runs) > 1 else "cards")


def _origin(run: RunRecord) -> str:
    """When a run was last heard of, or what reference curves are of."""
    if run.reference is not None:
        return ", ".join(f"{name} {run.reference[name]}" for name in ("commit", "command") if name in run.reference)
    last = max((s.ended for s in run.metrics.sessions if s.ended is not None), default=None)
    return f"last entry {moment(last)}"


def samples(runs: Sequence[RunRecord], count: int) -> Html:
    """The preview grids of each run, and the slider that the page's script switches on."""
    drawn = [(number, run) for number, run in enumerate(runs) if run.grids and count]
    columns = []
    for number, run in drawn:
        shots = [_shot(run, grid, len(runs) > 1) for grid in embed(run.grids, count, MOST_BYTES // len(drawn))]
        if shots:
            columns.append(tag("div", *shots, class_=f"card run c{number}" if len(runs) > 1 else "card"))
    if not columns:
        return Html("")
    slide = tag(
        "div",
        tag("input", type="range", min="0", value="0", aria_label="step of the samples"),
        tag("output"),
        tag("button", "All steps", type="button", class_="mode", aria_pressed="false"),
        class_="slide",
        hidden=True,
    )
    return joined(
        [
            note("The same noise and the same labels or prompts at every step, drawn with the EMA weights."),
            tag(
                "div",
                slide,
                tag("div", *columns, class_="columns several" if len(columns) > 1 else "columns"),
                class_="samples",
            ),
        ]
    )


def _shot(run: RunRecord, grid: Grid, is_named: bool) -> Html:
    name = f"{run.name}, step {grid.step:,}" if is_named else f"Step {grid.step:,}"
    image = tag(
        "img", src=grid.uri, width=grid.width, height=grid.height, alt=f"samples of {run.name} at step {grid.step}"
    )
    return tag("figure", tag("figcaption", name), image, class_="shot", data_run=run.name, data_step=grid.step)


def settings(runs: Sequence[RunRecord]) -> list[Html]:
    """What differs between the runs, what is not the default, and all settings."""
    known = {run.name: _shown_settings(run.meta.config) for run in runs if run.meta is not None}
    unknown = [run.name for run in runs if run.meta is None and run.reference is None]
    parts = []
    if unknown:
        parts.append(note(f"Unknown, as there is no intact checkpoint: {', '.join(unknown)}."))
    if not known:
        return parts
    keys = list(dict.fromkeys(key for values in known.values() for key in values))
    if len(known) > 1:
        rows = [
            [key, *(values.get(key, MISSING) for values in known.values())]
            for key in keys
            if len({values.get(key, MISSING) for values in known.values()}) > 1
        ]
        body = table(["setting", *known], rows, "settings") if rows else tag("p", "Nothing.")
        parts.append(tag("div", tag("h3", "What differs between the runs"), body, class_="card"))
    for run in runs:
        if run.meta is None:
            continue
        values, defaults = known[run.name], _shown_settings(Config(model=type(run.meta.config.model)()))
        changed = [
            [key, value, defaults.get(key, MISSING)] for key, value in values.items() if value != defaults.get(key)
        ]
        title = f"{run.name}: settings" if len(runs) > 1 else "Settings"
        shown = table(["setting", "value", "default"], changed, "settings")
        everything = folded(f"all {len(values)} settings", table(["setting", "value"], values.items(), "settings"))
        head = tag("h3", f"{title} that are not the defaults")
        if len(runs) > 1:
            parts.append(tag("div", folded(f"{title} that are not the defaults", shown, everything), class_="card"))
        else:
            parts.append(tag("div", head, shown, everything, class_="card"))
    return parts


def _shown_settings(config: Config) -> dict[str, str]:
    """Settings in the syntax of the command line, without those of the start of a process and the run folder."""
    flat, left_out = flat_settings(config), (*STARTING_FIELDS, "train.checkpoint_dir")
    return {key: in_yaml(value) for key, value in sorted(flat.items()) if key not in left_out}


def sessions(runs: Sequence[RunRecord]) -> list[Html]:
    """When each run was started and resumed."""
    rows = []
    for run in runs:
        for i, one in enumerate(run.metrics.sessions):
            kind = "start" if i == 0 else "resume"
            steps = f"{one.first_step:,} to {one.last_step:,}"
            again = f"{one.repeated:,}" if one.repeated else ""
            rows.append(
                [run.name, kind, moment(one.began), steps, duration(one.hours) if one.began else MISSING, again]
            )
    head = ["run", "", "began", "steps", "time", "steps done again"]
    parts = [tag("div", table(head, rows), class_="card")]
    skipped = [[run.name, f"{one.step:,}", one.first] for run in runs for one in run.skipped]
    if skipped:
        content = table(["run", "step", "first value that was not finite"], skipped)
        parts.append(tag("div", tag("h3", "Skipped steps"), content, class_="card"))
    unreadable = [f"{run.name} {run.metrics.unreadable}" for run in runs if run.metrics.unreadable]
    if unreadable:
        parts.append(note(f"Unreadable lines of metrics.jsonl, which are left out: {', '.join(unreadable)}."))
    return parts


def machines(runs: Sequence[RunRecord]) -> Html:
    """Hardware, precision, layout and versions, of the newest checkpoint of each run."""
    known = [run for run in runs if run.meta is not None]
    if not known:
        return Html("")
    metas = [run.meta for run in known if run.meta is not None]
    rows: list[list[Any]] = [
        ["hardware", *(meta.hardware or "unknown" for meta in metas)],
        ["mesh", *(_mesh(meta.config) for meta in metas)],
        ["computed in", *(meta.config.train.compute_dtype for meta in metas)],
        ["run id", *(meta.run_id for meta in metas)],
    ]
    packages = dict.fromkeys(name for meta in metas for name in meta.versions)
    rows += [[name, *(meta.versions.get(name, MISSING) for meta in metas)] for name in packages]
    return tag("div", table(["", *(run.name for run in known)], rows), class_="card")


def _mesh(config: Config) -> str:
    """The sizes of the mesh's axes, -1 for all devices that are left."""
    own = {field.name for field in dataclasses.fields(ProcessConfig)}
    sizes = {name: value for name, value in dataclasses.asdict(config.mesh).items() if name not in own}
    return ", ".join(f"{name} {value}" for name, value in sizes.items() if isinstance(value, int))


def data(runs: Sequence[RunRecord]) -> list[Html]:
    """The data sets with their licences; one that several runs share is shown once."""
    sets: dict[str, list[RunRecord]] = {}
    for run in runs:
        if run.meta is not None:
            sets.setdefault(run.meta.manifest.id, []).append(run)
    parts = []
    for users in sets.values():
        meta = users[0].meta
        assert meta is not None
        manifest = meta.manifest
        rows: list[list[Any]] = [
            ["path", tag("span", meta.config.data.path, class_="path")],
            [
                "records",
                f"{manifest.num_records('train'):,} training, {manifest.num_records('validation'):,} validation",
            ],
            ["images", f"{manifest.image_size} px, latents {'x'.join(map(str, manifest.latent_shape))}"],
            *([["buckets", f"{len(manifest.buckets)} aspect ratios"]] if manifest.buckets else []),
            ["classes", f"{manifest.num_classes:,}" if manifest.num_classes else MISSING],
            ["VAE", manifest.vae.name],
            *([["text encoder", meta.text.name]] if meta.text is not None else []),
            ["licence", tag("div", manifest.license or "not stated", class_="text")],
            ["attribution", tag("div", manifest.attribution or "not stated", class_="text")],
        ]
        head = tag("h3", ", ".join(run.name for run in users)) if len(sets) > 1 else None
        parts.append(tag("div", head, table(["", ""], rows), class_="card"))
    return parts


def score_tables(results: Results) -> Iterator[Html]:
    """The scores of one file: what was compared with what, and a table for each feature space."""
    yield note(results.description())
    varied = results.varied() or list(results.points[0].settings)
    for space in results.spaces():
        metrics = results.metrics(space)
        rows: list[list[str]] = []
        classes: list[str | None] = []
        for i, point in enumerate(results.points):
            is_best = i == results.best and len(results.points) > 1
            cells = [shown_setting(point.settings.get(name)) for name in varied]
            cells.append("" if point.evaluations is None else f"{point.evaluations:,.0f}")
            cells += [_score(point.scores.get(space, {}).get(name)) for name in metrics]
            rows.append(["best" if is_best else f"{i + 1}", *cells])
            classes.append("best" if is_best else None)
        floor = results.floors.get(space)
        if floor:
            count = f", {results.floor_counts[space]:,} against others" if space in results.floor_counts else ""
            rows.append([f"real images{count}", *("" for _ in varied), "", *(_score(floor.get(n)) for n in metrics)])
            classes.append("real")
        head = ["", *(COLUMNS.get(name, name) for name in varied), "evaluations", *map(metric_title, metrics)]
        yield tag("h3", space)
        if results.identities.get(space):
            yield note(results.identities[space])
        yield table(head, rows, "numbers", classes)
    yield folded(
        "all that was compared", table(["", ""], [["file", results.source], *results.facts.items()], "settings")
    )


def _score(score: Score | None) -> str:
    return MISSING if score is None else shown_score(score)
