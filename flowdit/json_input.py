"""JSON from outside as typed dataclasses, refused in one line that names key, rule and value.

Anything may be in such a file. A dataclass that says what must be in it is a `pydantic.dataclasses.dataclass` with
`config=STRICT`; rules over several fields are its model validators, which call `fields.require`.
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import ConfigDict, FailFast, Field, TypeAdapter, ValidationError

from flowdit.fields import listed, shown

STRICT = ConfigDict(strict=True, allow_inf_nan=False, extra="forbid")
"""No other type is taken for the one asked for, but a whole number for a float; neither NaN nor unknown keys are."""
STRICT_PART = ConfigDict(strict=True, allow_inf_nan=False, extra="ignore")
"""The same for a file of which only some keys matter."""

T = TypeVar("T")
_WITHOUT_VALUE = {"missing": "is missing", "unexpected_keyword_argument": "is not a known field"}
# Of pydantic's rules: "Input should be a valid integer", "Tuple should have at least 1 item after validation, not 0".
_PHRASES = re.compile("(Input|Tuple) should | after validation, not .*")
Listed = Annotated[tuple[T, ...], FailFast()]
"""A list of any length, of which the first wrong entry is told: a hostile one may hold millions."""
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]


class InputError(ValueError):
    """Content of a JSON file that breaks a rule, in one line."""


def read_json(file: Path) -> Any:
    """The content of a JSON file. Raises `InputError` naming the file if it cannot be read or is not JSON."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as problem:
        raise InputError(f"{file}: cannot be read: {problem.strerror}") from problem
    except (ValueError, RecursionError) as problem:
        raise InputError(f"{file}: is not JSON: {problem}") from None


def parse_file(kind: type[T], file: Path) -> T:
    """The content of a JSON file as `kind`. Raises `InputError` naming the file."""
    content = read_json(file)
    try:
        return parse(kind, content)
    except InputError as problem:
        raise InputError(f"{file}: {problem}") from None


def parse(kind: type[T], content: Any) -> T:
    """What came out of JSON as `kind`. Raises `InputError` for the first rule that it breaks: `key: rule, got value`."""
    try:
        # Back to text: of Python's lists and dicts strict types take none for a tuple or a dataclass.
        return _adapter(kind).validate_json(json.dumps(content))
    except RecursionError:
        raise InputError("must not be nested deeper than JSON can be written") from None
    except ValidationError as problem:
        raise InputError(_told(problem.errors(include_url=False)[0])) from None


@functools.cache
def _adapter(kind: Any) -> Any:
    return TypeAdapter(kind)


def _told(problem: Any) -> str:
    """One of pydantic's problems in one line."""
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem["loc"]).removeprefix(".")
    key = listed([key]) if key else ""
    if problem["type"] == "value_error":  # of a validator of ours, which names the key within its part
        return ".".join(filter(None, (key, str(problem["ctx"]["error"]))))
    if problem["type"] == "json_invalid":
        return f"must be JSON: {problem['ctx']['error']}"
    if problem["type"] in _WITHOUT_VALUE:
        rule = _WITHOUT_VALUE[problem["type"]]
    else:
        rule = f"must {_PHRASES.sub('', problem['msg'])}, got {shown(problem['input'])}"
    return f"{key}: {rule}" if key else rule
