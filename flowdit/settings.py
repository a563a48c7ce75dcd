"""The settings of a command: keys, types, defaults and meanings, read from the dataclasses that hold them.

Every field is described in an `Attributes:` section of the docstring of its class.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
import types
import typing
from collections.abc import Collection
from typing import Any

from flowdit.fields import FieldError


@dataclasses.dataclass(frozen=True)
class Setting:
    """One key of a command, such as `train.num_steps`, with the texts for users. `hint` is its Python type."""

    key: str
    hint: Any
    default: str
    meaning: str
    is_free_text: bool = False

    @property
    def type(self) -> str:
        return type_name(self.hint)

    @property
    def allows_null(self) -> bool:
        return self.hint is Any or type(None) in typing.get_args(self.hint)

    def takes(self, *kinds: type) -> bool:
        """Whether the type is one of `kinds`, or one of them or None."""
        parts = typing.get_args(self.hint) if _is_union(self.hint) else (self.hint,)
        parts = [typing.get_origin(part) or part for part in parts if part is not type(None)]
        return all(part in kinds for part in parts)


def settings_of(schema: type, prefix: str = "") -> dict[str, Setting]:
    """The settings of `schema` by key: plain fields first, then one section after the other.

    A section with subclasses has the fields of all of them. A dictionary counts as one setting. Raises `ValueError` for
    a field without a description, or a description without a field.
    """
    found: dict[str, Setting] = {}
    sections: dict[str, type] = {}
    hints = typing.get_type_hints(schema)
    for field, meaning in described_fields(schema):
        hint = hints[field.name]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            sections[field.name] = hint
        else:
            is_free_text = bool(field.metadata.get("free_text"))
            key = prefix + field.name
            found[key] = Setting(key, hint, default(field), meaning, is_free_text)
    for name, hint in sections.items():
        for kind in (hint, *own_subclasses(hint)):
            found |= {key: s for key, s in settings_of(kind, f"{prefix}{name}.").items() if key not in found}
    return found


def described_fields(schema: type) -> list[tuple[dataclasses.Field, str]]:
    """The fields of a dataclass with their descriptions. Raises `ValueError` if fields and descriptions differ."""
    texts = descriptions(schema)
    names = {field.name for field in dataclasses.fields(schema)}
    if wrong := names ^ texts.keys():
        raise ValueError(f"{schema.__name__}: fields and their descriptions differ in {', '.join(sorted(wrong))}")
    return [(field, texts[field.name]) for field in dataclasses.fields(schema)]


def descriptions(schema: type) -> dict[str, str]:
    """The description of every field, from the docstrings of the class and its bases."""
    found: dict[str, str] = {}
    for kind in reversed(schema.__mro__):
        section = inspect.cleandoc(kind.__dict__.get("__doc__") or "").partition("\nAttributes:\n")[2]
        for entry in re.split(r"\n(?=    \w)", "\n" + section.split("\n\n")[0])[1:]:
            name, _, text = entry.strip().partition(": ")
            found[name] = text[:1].upper() + " ".join(text.split())[1:]
    return found


def own_subclasses(schema: type) -> list[type]:
    """All subclasses that belong to the package."""
    direct = [kind for kind in schema.__subclasses__() if kind.__module__.startswith("flowdit.")]
    return [kind for child in direct for kind in (child, *own_subclasses(child))]


def _is_union(hint: Any) -> bool:
    return isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union


def type_name(hint: Any) -> str:
    """The name of a type for users."""
    if _is_union(hint):
        return " or ".join(type_name(part) for part in typing.get_args(hint))
    if typing.get_origin(hint) in (list, dict):
        inner = typing.get_args(hint)[-1]
        kind = "list" if typing.get_origin(hint) is list else "section"
        return kind if inner is Any else f"{kind} of {type_name(inner)}"
    return {type(None): "null", Any: "any"}.get(hint) or hint.__name__


def default(field: dataclasses.Field) -> str:
    """The default in YAML, or `must be given`, `empty`, or for a dictionary of sections `a section each`."""
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if value == "???":
        return "must be given"
    if value == "" or value == {}:
        return "empty"
    if isinstance(value, dict):
        return "a section each"
    return f"`{in_yaml(value)}`"


def in_yaml(value: Any) -> str:
    """A value in command-line syntax."""
    if isinstance(value, list):
        return f"[{','.join(in_yaml(item) for item in value)}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def unknown_setting(key: str, settings: Collection[str]) -> FieldError:
    """The error for a key that does not exist: the nearest one, and the keys of its section."""
    section, _, name = key.rpartition(".")
    same_name = [
        other for other in settings if other.rpartition(".")[2] == name
    ]  # learning_rate for optim.learning_rate
    candidates = dict.fromkeys([*settings, *(other.partition(".")[0] for other in settings)])
    similar = same_name or difflib.get_close_matches(key, candidates, n=1, cutoff=0.75)
    if not similar:
        last_parts = {other.rpartition(".")[2]: other for other in settings}
        similar = [last_parts[part] for part in difflib.get_close_matches(name, last_parts, n=1, cutoff=0.75)]
    nearest = f"; did you mean {similar[0]}?" if similar else ""
    known = [other.rpartition(".")[2] for other in settings if other.rpartition(".")[0] == section]
    if section and known:
        return FieldError(key, f"no such setting{nearest} ({section} has {', '.join(known)})")
    top_level = dict.fromkeys(other.partition(".")[0] for other in settings)
    return FieldError(key, f"no such setting{nearest} (there are {', '.join(top_level)})")
