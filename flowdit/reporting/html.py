"""Building HTML. Text from files is untrusted: everything that is not `Html` is escaped."""

from __future__ import annotations

import html
import itertools
import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

VOID = ("img", "input", "meta")


class Html(str):
    """Finished HTML, which is not escaped again."""


def escaped(content: Any) -> Html:
    """`content` as HTML: text is escaped, `Html` is kept, None is empty."""
    if isinstance(content, Html):
        return content
    return Html("" if content is None else html.escape(str(content)))


def joined(parts: Iterable[Any]) -> Html:
    """Parts one after another, each escaped unless it is `Html`."""
    return Html("".join(escaped(part) for part in parts))


def tag(name: str, *children: Any, **attributes: Any) -> Html:
    """An element with its children and attributes.

    `class_` and `data_chart` become `class` and `data-chart`. True gives an attribute without a value, None and False none.
    """
    written = []
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        written.append(f" {key}" if value is True else f' {key}="{escaped(str(value))}"')
    start = f"<{name}{''.join(written)}>"
    return Html(start if name in VOID else f"{start}{joined(children)}</{name}>")


def table(
    head: Iterable[Any],
    rows: Iterable[Iterable[Any]],
    class_: str | None = None,
    row_classes: Sequence[str | None] = (),
) -> Html:
    """A table that scrolls sideways where it is too wide. The first cell of a row is its head."""
    lines = []
    for row, row_class in itertools.zip_longest(rows, row_classes):
        first, *others = row
        cells = (tag("td", cell) for cell in others)
        lines.append(tag("tr", tag("th", first, scope="row"), *cells, class_=row_class))
    titles = list(head)
    heads = tag("thead", tag("tr", *(tag("th", cell, scope="col") for cell in titles))) if any(titles) else None
    return tag("div", tag("table", heads, tag("tbody", *lines), class_=class_), class_="scroll", tabindex="0")


class Fact(NamedTuple):
    """A figure with its name, and what it is about in smaller letters."""

    name: str
    value: str
    detail: str = ""


def fact_list(facts: Iterable[Fact]) -> Html:
    """Figures beside one another."""
    entries = (
        tag("div", tag("dt", fact.name), tag("dd", fact.value, tag("small", fact.detail) if fact.detail else None))
        for fact in facts
    )
    return tag("dl", *entries, class_="facts")


def section(name: str, title: str, *content: Any) -> Html:
    """A section with a heading, empty without content."""
    parts = [part for part in content if part]
    return tag("section", tag("h2", title), *parts, id=name) if parts else Html("")


def note(text: str) -> Html:
    return tag("p", text, class_="note")


def folded(title: str, *content: Any) -> Html:
    """Content that is shown on a click."""
    return tag("details", tag("summary", title), *content)


def json_for_script(content: Any) -> Html:
    """JSON that cannot end the script element it is in. Raises `ValueError` for numbers that are not finite."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return Html(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))
