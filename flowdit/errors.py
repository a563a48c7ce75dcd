"""What to say of an error that a library raised."""

from __future__ import annotations


def first_line(problem: BaseException) -> str:
    """The first line of an error's text that is not blank; the name of its type where there is none."""
    lines = (line.strip() for line in str(problem).splitlines())
    return next(filter(None, lines), type(problem).__name__)
