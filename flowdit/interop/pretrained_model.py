"""Two lines from a name to pictures."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple

from PIL import Image

from flowdit.config import SampleConfig
from flowdit.interop.conversion import read_source
from flowdit.interop.metadata import ForeignConfig
from flowdit.interop.portable import to_trained
from flowdit.sample import draw_pictures, make_requests
from flowdit.training.trained import Trained

# What says where the command reads and writes.
OF_THE_COMMAND = ("checkpoint", "out", "overwrite", "columns", "save_latents")


class PretrainedModel(NamedTuple):
    """A model and all that is known of it. `trained.model` is the network, on one example: `model(x_t, t, condition)`."""

    name: str
    trained: Trained

    def sample(self, **settings: Any) -> list[Image.Image]:
        """Pictures of `labels` or `prompts`; the settings are those of `python -m flowdit.sample`.

        One label or prompt may stand for a list of one. Raises `ValueError` naming a setting that cannot be used.
        """
        _check_names(settings, SampleConfig, but=OF_THE_COMMAND)
        config = SampleConfig(checkpoint=self.name, **settings)
        config.check()
        sampler = config.sampler(self.trained.config.train.sampler)
        drawn = draw_pictures(self.trained, config, sampler, make_requests(self.trained, config))
        return [Image.fromarray(image) for image in drawn.images]


def from_pretrained(name: str, weights: str = "ema", **said: Any) -> PretrainedModel:
    """The model in a flowdit checkpoint, a diffusers folder, a safetensors file or a hub repository.

    What is taken for granted, or left out of the file, comes as a warning.

    Args:
        name: path or hub id.
        weights: "ema" or "model", of a checkpoint that has both.
        said: fields of `ForeignConfig`, for what the files do not say.

    Raises:
        ValueError: in one line, for a source that is missing, damaged or another architecture's.
    """
    _check_names(said, ForeignConfig)
    portable = read_source(name, weights, ForeignConfig(**said))
    for note in portable.notes:
        warnings.warn(f"{name}: {note}", stacklevel=2)
    return PretrainedModel(name, to_trained(portable))


def _check_names(given: Iterable[str], schema: type, but: tuple[str, ...] = ()) -> None:
    """Raise `ValueError` naming the first setting that is no field of `schema`."""
    known = [field.name for field in dataclasses.fields(schema) if field.name not in but]
    unknown = [name for name in given if name not in known]
    if unknown:
        raise ValueError(f"{unknown[0]}: no such setting, must be one of {', '.join(known)}")
