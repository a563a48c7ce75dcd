"""Composing a configuration a second time: on top of that of a stored run, and without a preset.

Runs inside the function of `hydra.main`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any, cast

from hydra import compose
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.default_element import ConfigDefault, GroupDefault, InputDefault
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from flowdit.config import Config
from flowdit.diffusion.auxiliary import AUXILIARY
from flowdit.errors import first_line
from flowdit.settings import in_yaml
from flowdit.stored_config import literal
from flowdit.training.resume import STARTING_FIELDS


def typed_overrides() -> list[str]:
    """The overrides of the command line, with interpolations as they were typed."""
    overrides = OmegaConf.to_container(cast(Any, HydraConfig.get().overrides.task), resolve=False)
    return cast(list[str], overrides)


def continued(stored: Config, folder: str, overrides: Sequence[str]) -> DictConfig:
    """The configuration of a stored run with `overrides` applied to it, to continue it in `folder`.

    An option of a group, such as `experiment=tiny`, stands for the keys in its file; if that is empty, as `text/t5gemma`
    is, for the defaults of its section. The overrides of the command that began the run change nothing. Settings of the
    process and not of the run (`STARTING_FIELDS`) are not taken from the stored run.
    """
    defaults = OmegaConf.structured(Config(model=type(stored.model)()))
    values = dataclasses.asdict(stored)
    auxiliary = _registered(values.pop("auxiliary"))  # `from_stored` has kept it escaped
    values = cast(dict[str, Any], literal(values)) | {"auxiliary": auxiliary}
    for key in STARTING_FIELDS:
        section, _, name = key.partition(".")
        del values[section][name]
    composed = OmegaConf.merge(defaults, values)
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    options = {option.key_or_group: option.value() for option in parsed if chooses_option(option)}
    for group in sorted(options, key=_place):
        keys = keys_of_option(group, options[group], typed=options)
        if group in defaults and group != "model" and not keys.get(group):  # a network's size is an option of its own
            keys = {group: OmegaConf.to_container(defaults[group])}
        composed = OmegaConf.merge(composed, keys)
    for override in parsed:
        if not chooses_option(override):
            OmegaConf.update(composed, override.key_or_group, override.value(), merge=True)
    composed.train.checkpoint_dir = literal(folder)
    composed.train.is_restore = True
    assert isinstance(composed, DictConfig)
    return composed


def _registered(auxiliary: dict[str, Any]) -> dict[str, Any]:
    """Stored settings of the auxiliary losses that still exist."""
    kept = {}
    for name, loss in AUXILIARY.items():
        known = {field.name for field in dataclasses.fields(loss)}
        settings = auxiliary.get(name)
        if isinstance(settings, dict):  # the file may hold anything
            kept[name] = {key: value for key, value in settings.items() if key in known}
    return kept


def chooses_option(override: Override) -> bool:
    """Whether an override chooses an option of a group, as `train=stage2`; `train={...}` sets values (Hydra's rule)."""
    is_values = isinstance(override.value(), dict)
    return not is_values and _loader().repository.group_exists(override.key_or_group)


def _place(group: str) -> tuple[int, str]:
    """Where Hydra applies a group: in the order of the command's defaults list, `model/size` with `model`."""
    found = _loader().repository.load_config(str(HydraConfig.get().job.config_name))
    groups = [default.group for default in (found and found.defaults_list) or [] if isinstance(default, GroupDefault)]
    first = group.partition("/")[0]
    return (groups.index(first) if first in groups else len(groups) - 1, group)


def _loader() -> ConfigLoaderImpl:
    loader = GlobalHydra.instance().config_loader()
    assert isinstance(loader, ConfigLoaderImpl)
    return loader


def keys_of_option(group: str, option: Any, typed: Collection[str] = ()) -> DictConfig:
    """The keys that an option of a group sets, itself and through the options of other groups that it chooses.

    Not its own defaults that the user can choose otherwise, such as the size of a network, and no options of the groups
    that are `typed`, where the user's choice wins.
    """
    keys = OmegaConf.create({})
    found = None if option is None else _loader().repository.load_config(f"{group}/{option}")
    if found is None:
        return keys
    defaults = list(found.defaults_list or [])
    if not any(_path(default) == "_self_" for default in defaults):
        defaults.append(ConfigDefault(path="_self_"))  # Hydra's rule: the file's own keys come last
    for default in defaults:
        if isinstance(default, GroupDefault):
            other = str(default.group).lstrip("/")
            is_chosen = default.override and other not in typed
            chosen = keys_of_option(other, default.value, typed) if is_chosen else {}
        elif _path(default) == "_self_":
            chosen = _in_package(found.config, found.header["package"] or group.replace("/", "."))
        else:
            is_schema = _path(default).endswith("_schema")
            chosen = {} if is_schema else keys_of_option(group, _path(default), typed)
        keys = OmegaConf.merge(keys, chosen)
    assert isinstance(keys, DictConfig)
    return keys


def _path(default: InputDefault) -> str:
    return str(default.path) if isinstance(default, ConfigDefault) else ""


def _in_package(content: Any, package: str) -> Any:
    if package == "_global_":
        return content
    keys = OmegaConf.create({})
    OmegaConf.update(keys, package, content)
    return keys


@contextlib.contextmanager
def naming_the_preset(is_restore: bool) -> Iterator[None]:
    """Add to the error of a setting that a preset has set, and not the user, which preset and how to undo it."""
    try:
        yield
    except ValueError as problem:
        advice = _advice(first_line(problem), is_restore)
        if advice is None:
            raise
        raise ValueError(f"{first_line(problem)}; {advice}") from problem


def _advice(message: str, is_restore: bool) -> str | None:
    preset = HydraConfig.get().runtime.choices.get("experiment")
    key = re.match(r"[a-z_]+(\.[a-z_]+)*(?=: )", message)
    typed = typed_overrides()
    if preset is None or key is None or any(override.partition("=")[0] == key[0] for override in typed):
        return None
    groups = [override.partition("=")[0] for override in typed]
    if OmegaConf.select(keys_of_option("experiment", preset, groups), key[0]) is None:
        return None
    if is_restore:
        return f"the value is from experiment={preset}, without it that of the run is used"
    others = [override for override in typed if override.partition("=")[0] != "experiment"]
    without = compose(str(HydraConfig.get().job.config_name), others)
    default = OmegaConf.select(without, key[0], throw_on_missing=False)
    default = OmegaConf.to_container(default) if OmegaConf.is_config(default) else default
    shown = "..." if key[0] in OmegaConf.missing_keys(without) else in_yaml(default)
    return f"the value is from experiment={preset}, {key[0]}={shown} undoes it"
