"""The configuration in a checkpoint. It is untrusted: no interpolation in it is resolved."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flowdit.config import Config
from flowdit.errors import first_line
from flowdit.fields import FieldError, shortened
from flowdit.models.config import stored_model


def from_stored(values: Any) -> Config:
    """The configuration in a checkpoint; fields added after it was written have their defaults.

    The settings of auxiliary losses are kept unparsed: they are only compared, and the losses may no longer exist.
    """
    values = literal(dict(values))  # a checkpoint is untrusted
    auxiliary = values.pop("auxiliary", {})
    model = values.pop("model", {})
    with _naming_the_key(""):
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), values))
    assert isinstance(config, Config)
    with _naming_the_key("model."):
        model_class, fields = stored_model(dict(model))
        config.model = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(model_class), fields))  # type: ignore[assignment]
    config.auxiliary = auxiliary if isinstance(auxiliary, dict) else {}
    return config


def literal(value: Any) -> Any:
    """`value` with every `${` escaped, so that no interpolation in it reads other settings or the environment."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda found: 2 * found[1] + r"\${", value)
    if isinstance(value, dict):
        return {name: literal(part) for name, part in value.items()}
    return [literal(part) for part in value] if isinstance(value, list) else value


@contextlib.contextmanager
def _naming_the_key(prefix: str) -> Iterator[None]:
    """Raise `FieldError` for a stored value that OmegaConf refuses; the key is on another line of its errors."""
    try:
        yield
    except OmegaConfBaseException as problem:
        key = shortened(f"{prefix}{problem.full_key or ''}".strip("."))
        raise FieldError(key or "fields", shortened(first_line(problem))) from problem
