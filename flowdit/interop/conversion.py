"""Conversion from any source to any target, for `python -m flowdit.convert`."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from flowdit.checkpoint.files import list_steps
from flowdit.checkpoint.restore import newest_intact
from flowdit.config import as_list
from flowdit.fields import require_choice
from flowdit.inference.images import load_matching_vae, save_grid
from flowdit.inference.sampler import Sampler
from flowdit.inference.trained import describe_trained
from flowdit.interop.diffusers_in import META_FILE, read_diffusers
from flowdit.interop.diffusers_out import check_representable, export_diffusers
from flowdit.interop.hub import find_source, push
from flowdit.interop.metadata import ForeignConfig
from flowdit.interop.model_card import IMAGE, write_card
from flowdit.interop.originals import read_original
from flowdit.interop.portable import (
    DTYPES,
    Portable,
    read_checkpoint,
    read_single,
    to_trained,
    write_checkpoint,
    write_single,
)
from flowdit.interop.torch_files import ENTRIES, SUFFIXES

logger = logging.getLogger(__name__)

TARGETS = ("checkpoint", "diffusers", "safetensors")
WEIGHTS = tuple(ENTRIES)


@dataclasses.dataclass
class ConvertConfig(ForeignConfig):
    """Settings of `python -m flowdit.convert`.

    Attributes:
        source: a flowdit checkpoint or safetensors file, a diffusers folder, a file of DiT, SiT or PixArt, or a hub id.
        target: the folder, or with `to=safetensors` the file, to be written; it must not exist.
        to: `checkpoint` (flowdit's own, weights and metadata), `diffusers` (folder) or `safetensors` (one file).
        weights: `ema`, or `model` for the raw weights.
        dtype: dtype of the weights written: `float32`, `bfloat16` or `float16`.
        own_class: export flowdit's transformer class to diffusers, for features that the stock class does not have.
        image: an image file for the model card; `draw` samples one, `none` omits it.
        picture: the same as `image`.
        prompts: prompts for the image of a text model, one or a list; null: the run's `train.sample_prompts`.
        push_to_hub: repository on the Hugging Face hub to upload the target to; null: no upload.
        private: make that repository private, if it is new.
    """

    source: str = "???"
    target: str = "???"
    to: str = "checkpoint"
    weights: str = "ema"
    dtype: str = "float32"
    own_class: bool = False
    image: str = "draw"
    picture: str | None = None
    prompts: Any = None
    push_to_hub: str | None = None
    private: bool = True

    def __post_init__(self) -> None:
        self.prompts = as_list(self.prompts)
        if self.picture is not None:
            self.image, self.picture = self.picture, None

    def check(self) -> None:
        """Raise `ValueError` naming the first field that breaks a rule."""
        super().check()
        for field, choices in (("to", TARGETS), ("weights", WEIGHTS), ("dtype", DTYPES)):
            require_choice(field, getattr(self, field), choices)
        if epath.Path(self.target).exists():
            raise ValueError(f"target: must not exist, got {self.target}")
        if self.to == "safetensors" and Path(self.target).suffix != ".safetensors":
            raise ValueError(f"target: must end in .safetensors with to=safetensors, got {self.target}")
        if self.to == "diffusers" and self.image not in ("draw", "none") and not Path(self.image).is_file():
            raise ValueError(f"image: must be draw, none or an image file, got {self.image!r}")


def read_source(name: str, weights: str = "ema", hints: ForeignConfig | None = None) -> Portable:
    """Read a model in any supported format.

    Raises `ValueError` with one line if the source cannot be read, or a hint contradicts it.
    """
    hints = hints or ForeignConfig()
    ForeignConfig.check(hints)
    require_choice("weights", weights, WEIGHTS)
    source = find_source(name)
    if (source / "meta").is_dir():
        return read_checkpoint(source, weights)
    if list_steps(source):
        return read_checkpoint(newest_intact(source), weights)
    path = Path(source)  # safetensors and torch read local files
    if path.is_file():
        single = read_single(path) if path.suffix == ".safetensors" else None
        if single is None and path.suffix not in (".safetensors", *SUFFIXES):
            raise ValueError(f"source: {path} must be .safetensors or one of {', '.join(SUFFIXES)}")
        return single or read_original(path, weights, hints)
    if any((path / file).is_file() for file in ("model_index.json", "config.json", META_FILE)):
        return read_diffusers(path, weights, hints)
    singles = sorted(path.glob("*.safetensors"))
    if len(singles) == 1:
        return read_source(str(singles[0]), weights, hints)
    raise ValueError(f"source: {path} holds neither a checkpoint (meta) nor a diffusers folder (config.json)")


def convert(config: ConvertConfig) -> Portable:
    """Read, check, write under a temporary name, rename, and upload if requested. Returns the converted model."""
    config.check()
    portable = read_source(config.source, config.weights, config)
    described = describe_trained(portable.meta)
    if config.to == "diffusers":
        check_representable(described, config.own_class)
    if config.vae is not None:
        load_matching_vae(config.vae, described.manifest)
    target = epath.Path(config.target)
    with _finished(target) as partial:
        if config.to == "checkpoint":
            write_checkpoint(portable, partial, config.dtype)
        elif config.to == "diffusers":
            _write_diffusers(portable, Path(partial), config)  # safetensors writes local files
        else:
            write_single(portable, Path(partial), config.dtype)
    if config.push_to_hub:
        logger.info("uploaded: %s", push(Path(target), config.push_to_hub, config.private))
    return portable


@contextmanager
def _finished(target: epath.Path) -> Iterator[epath.Path]:
    """A temporary path that is renamed to `target` at the end, and removed on an error."""
    partial = target.with_name(f"{target.stem}.partial{target.suffix}")
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove(partial)
    try:
        yield partial
        partial.rename(target)
    finally:
        _remove(partial)


def _remove(path: epath.Path) -> None:
    if path.is_dir():
        path.rmtree()
    path.unlink(missing_ok=True)


def _write_diffusers(portable: Portable, folder: Path, config: ConvertConfig) -> None:
    export_diffusers(portable, folder, config.dtype, own_class=config.own_class, vae=config.vae)
    image = folder / IMAGE
    if config.image == "draw":
        try:
            draw_grid(Sampler(to_trained(portable), vae=config.vae), image, config.prompts)
        except ValueError as problem:  # a missing VAE or text encoder must not prevent the export
            logger.warning("no sample image: %s", problem)
    elif config.image != "none":
        shutil.copyfile(config.image, image)
    write_card(portable, folder, Path(config.target).name, config.weights, image.is_file())


def draw_grid(sampler: Sampler, path: Path, prompts: list[str] | None) -> None:
    """Draw a grid of `prompts`, or of the training previews, with the sampler of the previews."""
    trained, train = sampler.trained, sampler.trained.config.train
    requests = sampler.requests(1, {"prompts": prompts}) if prompts else trained.conditioning.previews(train, None)
    images = [drawn.images for drawn in sampler.batches(requests, train.sampler)]
    save_grid(path, np.concatenate(images), requests.captions, columns=8)
