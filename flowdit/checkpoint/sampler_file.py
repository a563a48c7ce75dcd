"""`sampler.json` of a checkpoint: the sampler that an evaluation found best, used instead of the run's.

It is beside the verified items, which stay as they were written: a resumed run does not read it.
"""

from __future__ import annotations

import dataclasses
import json

from etils import epath
from pydantic import RootModel

from flowdit.checkpoint.meta import RunMeta
from flowdit.diffusion.sampling import SamplerConfig
from flowdit.fields import content_of, require
from flowdit.json_input import parse_file
from flowdit.storage import write_whole

SAMPLER_FILE = "sampler.json"


class _Fields(RootModel[dict[str, int | float | str | None]]):
    """The fields of the sampler by name."""


def write_sampler(step_folder: epath.PathLike, config: SamplerConfig) -> epath.Path:
    """Write `config` into a checkpoint, replacing an earlier one. Returns the file. Raises `OSError`."""
    file = epath.Path(step_folder) / SAMPLER_FILE
    write_whole(file, json.dumps(dataclasses.asdict(config), indent=1) + "\n")
    return file


def with_sampler(meta: RunMeta, step_folder: epath.PathLike) -> RunMeta:
    """The metadata with the sampler of `sampler.json`, if the checkpoint has one. Raises `ValueError` if it is invalid."""
    file = epath.Path(step_folder) / SAMPLER_FILE
    if not file.exists():
        return meta
    fields = parse_file(_Fields, file).root
    known = {field.name for field in dataclasses.fields(SamplerConfig)}
    with content_of(file):
        for name in fields:
            require(name, fields[name], name in known, f"is not a field of the sampler ({', '.join(sorted(known))})")
        sampler = SamplerConfig(**fields)  # type: ignore[arg-type]
        sampler.check()
    train = dataclasses.replace(meta.config.train, sampler=sampler)
    return dataclasses.replace(meta, config=dataclasses.replace(meta.config, train=train))
