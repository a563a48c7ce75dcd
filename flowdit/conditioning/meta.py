"""Metadata of the conditioning in a checkpoint, in addition to configuration and data."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from flowdit.json_input import STRICT_PART, Count


@dataclass(frozen=True, config=STRICT_PART)
class EncoderMeta:
    """The text encoder of a model, whose features are (max_length, width) in `dtype`.

    `fingerprint` is empty for an imported model, whose encoder is not known.
    """

    name: str
    fingerprint: str
    dtype: str
    max_length: Count
    width: Annotated[int, Field(ge=0, lt=2**31)]


@dataclass(frozen=True, config=STRICT_PART, kw_only=True)
class ConditioningMeta:
    """Metadata of all kinds of conditioning: one field per kind, None for models of other kinds."""

    text: EncoderMeta | None = None
