"""Text of an error raised by a library."""

from __future__ import annotations


def first_line(problem: BaseException) -> str:
    """The first non-blank line of an error's text, or the name of its type."""
    lines = (line.strip() for line in str(problem).splitlines())
    return next(filter(None, lines), type(problem).__name__)
