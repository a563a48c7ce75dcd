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

from flowdit.checkpoint.files import what_is_in
from flowdit.checkpoint.restore import newest_intact
from flowdit.config import as_list
from flowdit.fields import FREE_TEXT, about, require, require_choice
from flowdit.image_grid import save_grid
from flowdit.inference.images import load_matching_vae
from flowdit.inference.sampler import Sampler
from flowdit.inference.trained import describe_trained
from flowdit.interop.diffusers_in import META_FILE, WEIGHTS_STEM, read_diffusers
from flowdit.interop.diffusers_out import check_representable, export_diffusers, without_guidance_head
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
from flowdit.models.torch_files import ENTRIES, SUFFIXES
from flowdit.storage import is_remote, require_local

logger = logging.getLogger(__name__)

TARGETS = ("checkpoint", "diffusers", "safetensors")
WEIGHTS = tuple(ENTRIES)
SINGLE = ".safetensors"
CONFIGS = ("model_index.json", "config.json")
"""Files that diffusers writes, of which a pipeline has the first and a network the second."""


@dataclasses.dataclass
class ConvertConfig(ForeignConfig):
    """Settings of `python -m flowdit.convert`.

    Attributes:
        source: a flowdit checkpoint or safetensors file, a diffusers folder, a file of DiT, SiT or PixArt, or a hub id.
        target: the folder, or the file ending in `.safetensors`, to be written; it must not exist.
        to: `checkpoint` (flowdit's own folder, weights and metadata), `diffusers` (folder) or `safetensors` (one file);
            null: by the suffix of `target`, `safetensors` or else `checkpoint`.
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
    to: str | None = None
    weights: str = "ema"
    dtype: str = "float32"
    own_class: bool = False
    image: str = "draw"
    picture: str | None = None
    prompts: Any = dataclasses.field(default=None, metadata=FREE_TEXT)
    push_to_hub: str | None = None
    private: bool = True

    def __post_init__(self) -> None:
        self.prompts = as_list(self.prompts)
        if self.picture is not None:
            self.image, self.picture = self.picture, None

    @property
    def target_format(self) -> str:
        """What is written: `to`, or by default what the suffix of `target` says."""
        return self.to or ("safetensors" if Path(self.target).suffix == SINGLE else "checkpoint")

    def check(self) -> None:
        """Raise `ValueError` naming the first field that breaks a rule."""
        super().check()
        for field, value, choices in (
            ("to", self.target_format, TARGETS),
            ("weights", self.weights, WEIGHTS),
            ("dtype", self.dtype, DTYPES),
        ):
            require_choice(field, value, choices)
        is_single = self.target_format == "safetensors"
        rule = f"must {'' if is_single else 'not '}end in {SINGLE} with to={self.to}"
        require("target", self.target, is_single == (Path(self.target).suffix == SINGLE), rule)
        require_local("target", self.target)
        require("target", self.target, not epath.Path(self.target).exists(), "must not exist")
        if self.target_format == "diffusers" and self.image not in ("draw", "none") and not Path(self.image).is_file():
            raise ValueError(f"image: must be draw, none or an image file, got {self.image!r}")


def read_source(name: str, weights: str = "ema", hints: ForeignConfig | None = None) -> Portable:
    """Read a model in any supported format; of a run folder the newest intact checkpoint.

    Raises `ValueError` with one line: `FieldError` for a hint that is invalid or contradicts the source, another one
    that names the file or folder if that cannot be read.
    """
    hints = hints or ForeignConfig()
    ForeignConfig.check(hints)
    require_choice("weights", weights, WEIGHTS)
    is_ema = hints.ema_width is None or weights == "ema"
    require("ema_width", hints.ema_width, is_ema, f"must not be given with weights={weights}")
    found = find_source(name)
    source = newest_intact(found)
    if (source / "meta").is_dir():
        return read_checkpoint(source, weights, is_verified=source != found, ema_width=hints.ema_width)
    rule = "must not be given for a model that is not a checkpoint of flowdit"
    require("ema_width", hints.ema_width, hints.ema_width is None, rule)
    if is_remote(source):
        raise ValueError(f"{source}: must be a checkpoint (<run>/<step>) or a run folder, {what_is_in(source)}")
    path = Path(source)  # safetensors and torch read local files
    if path.is_file():
        single = read_single(path) if path.suffix == SINGLE else None
        if single is None and path.suffix not in (SINGLE, *SUFFIXES):
            raise ValueError(f"{path} must be a folder or end in {SINGLE}, {', '.join(SUFFIXES)}")
        return single or read_original(path, weights, hints)
    if any((path / file).is_file() for file in (*CONFIGS, META_FILE)):
        return read_diffusers(path, weights, hints)
    for folder in (path, path / "transformer"):
        if any(folder.glob(f"{WEIGHTS_STEM}*")) and not (folder / "config.json").is_file():
            raise ValueError(f"{folder / 'config.json'} is missing: diffusers writes it next to the weights")
    singles = sorted(path.glob(f"*{SINGLE}"))
    if len(singles) == 1:
        return read_source(str(singles[0]), weights, hints)
    needed = "must be a checkpoint (<run>/<step>), a run folder, or a folder of diffusers (with config.json)"
    raise ValueError(f"{path}: {needed}, {what_is_in(source, CONFIGS)}")


def convert(config: ConvertConfig) -> Portable:
    """Read, check, write under a temporary name, rename, and upload if requested. Returns the converted model."""
    config.check()
    with about("source"):
        portable = read_source(config.source, config.weights, config)
    described = describe_trained(portable.meta)
    if config.target_format == "diffusers":
        check_representable(described, config.own_class)
        portable = without_guidance_head(portable)
    if config.vae is not None:
        load_matching_vae(config.vae, described.manifest)
    target = epath.Path(config.target)
    with _finished(target) as partial:
        if config.target_format == "checkpoint":
            write_checkpoint(portable, partial, config.dtype)
        elif config.target_format == "diffusers":
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
