"""Parsing untrusted JSON into typed dataclasses, with one-line errors of key, rule and value.

The expected content is a `pydantic.dataclasses.dataclass` with `config=STRICT`; rules over several fields are its model
validators, which call `fields.require`.
"""

from __future__ import annotations

import functools
import json
import re
from typing import Annotated, Any, TypeVar

from etils import epath
from pydantic import ConfigDict, FailFast, Field, TypeAdapter, ValidationError

from flowdit.fields import listed, shown
from flowdit.storage import reason

STRICT = ConfigDict(strict=True, allow_inf_nan=False, extra="forbid")
"""Types must match, except that a float may be an integer; NaN and unknown keys are refused."""
STRICT_PART = ConfigDict(strict=True, allow_inf_nan=False, extra="ignore")
"""The same, but unknown keys are ignored."""

T = TypeVar("T")
_WITHOUT_VALUE = {"missing": "is missing", "unexpected_keyword_argument": "is not a known field"}
# Of pydantic's rules: "Input should be a valid integer", "Tuple should have at least 1 item after validation, not 0".
_SUBJECT = re.compile("^(Input|Tuple) should")
Listed = Annotated[tuple[T, ...], FailFast()]
"""A list of any length, validated up to the first wrong entry, as a hostile one may hold millions."""
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]


class InputError(ValueError):
    """Invalid content of a JSON file, in one line."""


def read_json(file: epath.PathLike) -> Any:
    """Read a JSON file. Raises `InputError` naming the file if it cannot be read or is not JSON."""
    try:
        return json.loads(epath.Path(file).read_text(encoding="utf-8"))
    except OSError as problem:
        raise InputError(f"{file}: cannot be read: {reason(problem)}") from problem
    except (ValueError, RecursionError) as problem:
        raise InputError(f"{file}: is not JSON: {problem}") from None


def parse_file(kind: type[T], file: epath.PathLike) -> T:
    """Parse a JSON file as `kind`. Raises `InputError` naming the file."""
    content = read_json(file)
    try:
        return parse(kind, content)
    except InputError as problem:
        raise InputError(f"{file}: {problem}") from None


def parse(kind: type[T], content: Any) -> T:
    """Parse JSON data as `kind`. Raises `InputError` for the first broken rule: `key: rule, got value`."""
    return parse_value(kind, content)


def parse_value(kind: Any, content: Any) -> Any:
    """The same for any annotation, such as a type with limits. Without a key the error begins with the rule."""
    try:
        # Back to text, as strict types do not accept Python lists and dicts for tuples and dataclasses.
        return _adapter(kind).validate_json(json.dumps(content))
    except RecursionError:
        raise InputError("must not be nested too deeply") from None
    except ValidationError as problem:
        raise InputError(one_line(problem)) from None


@functools.cache
def _adapter(kind: Any) -> Any:
    return TypeAdapter(kind)


def one_line(error: ValidationError) -> str:
    """Format the first problem of an error of pydantic in one line: `key: rule, got value`."""
    problem: Any = error.errors(include_url=False)[0]
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem["loc"]).removeprefix(".")
    key = listed([key]) if key else ""
    if problem["type"] == "value_error":  # of our validators, which name the key within their part
        return ".".join(filter(None, (key, str(problem["ctx"]["error"]))))
    if problem["type"] == "json_invalid":
        return f"must be JSON: {problem['ctx']['error']}"
    if problem["type"] in _WITHOUT_VALUE:
        rule = _WITHOUT_VALUE[problem["type"]]
    else:
        rule = _SUBJECT.sub("must", problem["msg"]).partition(" after validation")[0]
        rule = f"{rule}, got {shown(problem['input'])}"
    return f"{key}: {rule}" if key else rule
