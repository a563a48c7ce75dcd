"""`experiment=small`, `fast` and those for text: settings that follow from data and devices, put into the configuration."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from flowdit.composition import chooses_option, keys_of_option
from flowdit.config import Config
from flowdit.data.manifest import Manifest
from flowdit.fields import FieldError, about
from flowdit.hardware import this_machine
from flowdit.models.text_encoder import usual_width
from flowdit.training.estimate import Condition
from flowdit.training.small import choose

logger = logging.getLogger(__name__)

PRESETS = ("small", "small_text", "fast", "fast_text")


def choose_sizes(config: Config, overrides: Sequence[str]) -> None:
    """Set what these presets choose in the checked `config`, except for the keys of command-line `overrides`, and log it.

    Raises `ValueError` for data that cannot be read, typed values that do not fit them, and several processes.
    """
    if (count := jax.process_count()) > 1:
        raise FieldError(
            "mesh.multi_process", f"must be false with this preset, which is for one process, got {count} processes"
        )
    with about("data.path"):
        manifest = Manifest.read(config.data.path)
    condition = Condition()
    if config.model.name == "pixart":
        if not manifest.has_captions:
            advice = "python train_stage1.py experiment=small trains without"
            raise ValueError(f"data.path: {config.data.path} has no captions, which this preset needs; {advice}")
        condition = Condition(text_tokens=config.text.max_length, text_width=usual_width(config.text.encoder))
    typed = {key: functools.reduce(getattr, key.split("."), config) for key in typed_keys(overrides)}
    shift = config.train.time_shift
    sizes = choose(
        manifest,
        this_machine(),
        config.model.name,
        condition,
        typed,
        optimizer=config.optim.name,
        time_shift=1.0 if shift is None else shift,
    )
    for key, value in sizes.values.items():
        *sections, name = key.split(".")
        setattr(functools.reduce(getattr, sections, config), name, value)
    config.check()
    for line in sizes.lines():
        logger.info(line)


def typed_keys(overrides: Sequence[str]) -> list[str]:
    """The keys of the run, model and optimizer that command-line overrides set, themselves or by an option of a group."""
    keys: list[str] = []
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        key, value = override.key_or_group, override.value()
        if not chooses_option(override):
            keys += _keys(key, value)
        elif key != "experiment":
            for section, content in keys_of_option(key, value).items():
                keys += _keys(str(section), content)
    return keys


def _keys(key: str, value: Any) -> Iterator[str]:
    if isinstance(value, Mapping | DictConfig):
        for name, inner in value.items():
            yield from _keys(f"{key}.{name}", inner)
    elif key.partition(".")[0] in ("train", "model", "optim", "conditioning"):
        yield key
