"""Errors of settings in one line: `field: rule, got value`.

A component names its own fields, without a prefix. The code that holds the component adds the prefix (`under`): `steps`
of the sampler becomes `sampler.steps` in the training settings and `train.sampler.steps` for the user.
"""

from __future__ import annotations

import contextlib
import math
import numbers
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

FREE_TEXT = {"free_text": True}
"""Metadata of a dataclass field that holds text for people: on the command line no character of it is syntax."""


class FieldError(ValueError):
    """An invalid value of a field."""

    def __init__(self, field: str, problem: str):
        super().__init__(field, problem)
        self.field = field
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.field}: {self.problem}"


def require(field: str, value: Any, is_valid: bool, rule: str) -> None:
    """Raise `FieldError` with `rule` and `value` unless the value is valid."""
    if not is_valid:
        raise FieldError(field, f"{rule}, got {shown(value)}")


def is_finite_number(value: Any) -> bool:
    """Whether `value` is a number, no truth value, that a float can hold: not NaN, infinite or beyond 1e308."""
    try:
        return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer of hundreds of digits
        return False


def require_choice(field: str, value: Any, choices: Iterable[str]) -> None:
    """Raise `FieldError` unless `value` is one of `choices`."""
    choices = tuple(choices)
    require(field, value, value in choices, f"must be one of {', '.join(choices)}")


def require_effect(settings: Any, field: str, chooser: str, choice: str) -> None:
    """Raise `FieldError` for a value of `field` other than its default that only `choice` of `chooser` would read."""
    value = getattr(settings, field)
    is_read = getattr(settings, chooser) == choice or value == getattr(type(settings), field)
    require(field, value, is_read, f"has no effect without {chooser}={choice}")


@contextlib.contextmanager
def under(prefix: str) -> Iterator[None]:
    """Add `prefix`, such as "train.", to the fields of errors within."""
    try:
        yield
    except FieldError as error:
        raise FieldError(prefix + error.field, error.problem) from error


@contextlib.contextmanager
def called(names: Mapping[str, str]) -> Iterator[None]:
    """Rename the fields of errors within, {"their name": "ours"}; other fields keep their name."""
    try:
        yield
    except FieldError as error:
        raise FieldError(names.get(error.field, error.field), error.problem) from error


@contextlib.contextmanager
def about(field: str) -> Iterator[None]:
    """Name `field` in errors within that name no field: those of the file or folder that is its value."""
    try:
        yield
    except FieldError:
        raise
    except ValueError as error:
        raise FieldError(field, str(error)) from error


@contextlib.contextmanager
def content_of(file: Any) -> Iterator[None]:
    """Name `file` in errors within, which are of its content; the fields that they name are the file's, not settings."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{file}: {shortened(str(error), 300)}") from error


def shown(value: Any) -> str:
    """The `repr` of a value, possibly from an untrusted file, shortened for an error message."""
    try:
        return shortened(repr(value), 80)
    except (RecursionError, ValueError):  # nested too deeply, an integer of thousands of digits
        return f"a value of type {type(value).__name__}"


def shortened(text: str, length: int = 120) -> str:
    """`text`, cut to `length` characters."""
    return text if len(text) <= length else f"{text[: length - 3]}..."


def listed(names: Sequence[str], limit: int = 5, length: int = 120) -> str:
    """The first names of a list for an error message, as a damaged file may have millions of them.

    "a, b, c, d, e ... and 484 more"; names are cut to `length`, and names with line breaks or control characters are quoted.
    """
    first = ", ".join(shortened(name if name.isprintable() else repr(name), length) for name in names[:limit])
    return f"{first} ... and {len(names) - limit} more" if len(names) > limit else first
