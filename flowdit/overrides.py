"""The command line as users write it, made ready for Hydra, which reads commas, brackets and quotes as syntax.

Free text arrives as written, one value may stand where a list may, and `1e4` is a whole number. Unknown keys and values
that Hydra would read as a sweep are refused in one line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString, Sweep
from hydra.errors import HydraException

import flowdit.configs
from flowdit.fields import FieldError, require, shown
from flowdit.settings import Setting, unknown_setting
from flowdit.stored_config import literal

GROUPS = Path(flowdit.configs.__file__).parent
OWN_NAMES = ("${hydra:job.num}", "${hydra:job.id}", "${hydra:job.override_dirname}")
"""What differs between the jobs of any sweep."""


def for_hydra(arguments: Sequence[str], settings: Mapping[str, Setting]) -> list[str]:
    """The arguments of a command with these settings, by key, as Hydra needs them.

    Raises `FieldError` for an option that Hydra does not have, an argument that is not `key=value`, an unknown key, and
    a value with a comma where one value is needed.
    """
    known, unknown = get_args_parser().parse_known_args(list(arguments))
    if options := [argument for argument in unknown if argument.startswith("-")]:
        raise FieldError(options[0], "no such option; settings are given as key=value (--help lists them)")
    own_groups = known.config_dir is not None or known.config_path is not None
    # Hydra's parser refuses overrides after an option, such as --cfg job.
    overrides = [*known.overrides, *unknown]
    options = [argument for argument in arguments if argument not in overrides]
    return [*(_override(argument, settings, known.multirun, own_groups) for argument in overrides), *options]


def require_own_folders(arguments: Sequence[str], key: str) -> None:
    """Raise `FieldError` if the jobs of a sweep (`--multirun`) could write to the same folder, which `key` names.

    The second run in a folder would be refused, or with `train.is_restore` go on with the checkpoints of the first.
    """
    known, _ = get_args_parser().parse_known_args(list(arguments))
    if known.multirun:
        value = dict(argument.partition("=")[::2] for argument in known.overrides).get(key, "the default")
        rule = f"must differ between the jobs of --multirun, as in {key}=sweep/{OWN_NAMES[0]}"
        require(key, value, any(name in value for name in OWN_NAMES), rule)


def _override(argument: str, settings: Mapping[str, Setting], sweeps: bool, own_groups: bool) -> str:
    key, equals, value = argument.partition("=")
    is_change = key[:1] not in ("+", "~")  # and not one of Hydra's additions and removals, refused after composing
    if is_change and not equals:
        raise FieldError(argument, "settings are given as key=value (--help lists them)")
    if is_change and key not in settings and not _is_group(key, settings, own_groups):
        raise unknown_setting(key, [*settings, *_groups(settings)])
    if key not in settings:
        is_sweep = isinstance(_parsed(argument), Sweep) and not sweeps
        require(key, value, not is_sweep, "must be one value")
        return argument
    setting = settings[key]
    if setting.is_free_text:
        return f"{key}={_free_text(setting, value)}"
    parsed = _parsed(argument)
    if isinstance(parsed, Sweep) and not sweeps:
        return f"{key}={_one_value(setting, value)}"
    if setting.takes(str):
        is_plain = parsed is None or isinstance(parsed, str | QuotedString | int | float | Sweep)
        return argument if is_plain and not isinstance(parsed, HydraException) else f"{key}={quoted(value)}"
    if setting.takes(int) and isinstance(parsed, float) and parsed.is_integer():
        return f"{key}={int(parsed)}"
    is_single = isinstance(parsed, QuotedString | int | float) or (isinstance(parsed, str) and "${" not in parsed)
    return f"{key}=[{value}]" if setting.takes(list) and is_single else argument


def _is_group(key: str, settings: Mapping[str, Setting], own_groups: bool) -> bool:
    """Whether a key is Hydra's, a group of configurations, or a section of settings."""
    if key.startswith("hydra") or "@" in key or own_groups:
        return True
    section = key.partition(".")[0]
    is_section = any(known.startswith(f"{key}.") for known in settings)
    return is_section or section in settings or key in _groups(settings)


def _groups(settings: Mapping[str, Setting]) -> list[str]:
    """The groups of a command: those of its sections, and the presets of a command with such groups."""
    sections = {key.partition(".")[0] for key in settings if "." in key}
    names = [path.relative_to(GROUPS).as_posix() for path in sorted(GROUPS.rglob("*")) if path.is_dir()]
    own = {name for name in names if name.partition("/")[0] in sections}
    return [name for name in names if name in own or (own and name == "experiment")]


def _parsed(argument: str) -> Any:
    """The value as Hydra reads it, or its error."""
    try:
        override: Override = OverridesParser.create().parse_override(argument)
    except HydraException as problem:
        return problem
    return override._value  # `value()` would drop the quotes


def _free_text(setting: Setting, value: str) -> str:
    """Text in quotes; for a setting that also takes a list, a value in brackets is one, of texts as Hydra reads them."""
    if value.startswith("[") and not setting.takes(str):
        if isinstance(_parsed(f"key={value}"), HydraException):
            rule = "cannot be read as a list; quote a text with a comma, colon, bracket or quote, as in ['a, b',c]"
            raise FieldError(setting.key, f"{rule}, got {shown(value)}")
        return literal(value)
    if value == "null" and setting.allows_null:
        return value
    is_quoted = isinstance(_parsed(f"key={value}"), QuotedString)
    text = literal(value) if is_quoted else quoted(literal(value))
    return f"[{text}]" if setting.takes(list) else text


def _one_value(setting: Setting, value: str) -> str:
    """The value, which has a comma outside quotes and brackets, as text. Raises `FieldError` if it cannot be text."""
    if setting.takes(str):
        return quoted(value)
    rule = f"must be one value, got {value}"
    is_list = not setting.takes(int, float, bool)
    raise FieldError(setting.key, f"{rule}; a list is written in brackets, [{value}]" if is_list else rule)


def quoted(text: str) -> str:
    """`text` in Hydra's quotes."""
    return QuotedString(text=text, quote=Quote.single).with_quotes()
