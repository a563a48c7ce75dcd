"""The data that a planned run trains on: those at `data.path`, or assumed ones where there are none yet."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from flowdit import conditioning as kinds
from flowdit.conditioning import Conditioning
from flowdit.conditioning.meta import ConditioningMeta, EncoderMeta
from flowdit.data import feature_cache as features
from flowdit.data.manifest import FILE_NAME, Manifest, VaeInfo
from flowdit.models.text_encoder import usual_width
from flowdit.planning.config import PlanConfig
from flowdit.storage import connect

LATENT = (16, 32, 32)
CLASSES = 1000
STRIDE = 8
MAP = (16, 16, 768)


class PlannedData(NamedTuple):
    """A manifest, the conditioning on its fields, and lines that say where the shapes are from.

    `map_shape` is that of the feature maps (rows, columns, width) if an auxiliary loss reads them.
    """

    manifest: Manifest
    conditioning: Conditioning
    assumptions: list[str]
    map_shape: tuple[int, int, int] | None = None


def planned_data(config: PlanConfig) -> PlannedData:
    """The data of a configuration. No shard is read, and no text encoder is loaded.

    Raises `ValueError` for an invalid data set, or one that lacks what is conditioned on.
    """
    path, shape = config.data.path, config.shape
    found = Manifest.read(path) if path and (connect(path) / FILE_NAME).is_file() else None
    manifest = found
    if manifest is None or (shape.latent, shape.classes) != (None, None):
        manifest = _assumed(config, manifest)
        config.train.latent_mean = config.train.latent_scale = None  # of other latents
        why = "no data.path" if not path else f"there is no data set at {path}"
        source = "assumed: shape.*" if found else f"assumed: {why}"
    else:
        source = f"of {path}"
    text = EncoderMeta(
        name=config.text.encoder,
        fingerprint="",
        dtype=config.text.dtype,
        max_length=config.text.max_length,
        width=shape.text_width or usual_width(config.text.encoder),
    )
    conditioning = kinds.from_checkpoint(config, manifest, ConditioningMeta(text=text))
    channels, height, width = manifest.latent_shape
    lines = [f"data: latents {channels}x{height}x{width}, {manifest.num_classes} classes, {source}"]
    if kinds.kind_of(config) == "text":
        tokens = f"{text.max_length} text tokens of {text.width}"
        lines = [f"data: latents {channels}x{height}x{width}, {tokens}, {source}"]
        lines.append("text features come from a cache: an encoder in the training loop adds its weights and its time")
    if not config.map_readers:
        return PlannedData(manifest, conditioning, lines)
    map_shape, line = _map_shape(config)
    return PlannedData(manifest, conditioning, [*lines, line], map_shape)


def _map_shape(config: PlanConfig) -> tuple[tuple[int, int, int], str]:
    """The shape of the feature maps, and a line that says where it is from."""
    path, shape = config.data.feature_cache, config.shape.features
    if shape is None and path and (connect(path) / features.FILE_NAME).is_file():
        shape, source = features.read_features(path).shape, f"of {path}"
    else:
        shape, source = shape or MAP, "assumed"
    rows, columns, width = shape
    return (rows, columns, width), f"feature maps: {rows}x{columns}x{width}, {source}"


def _assumed(config: PlanConfig, given: Manifest | None) -> Manifest:
    """A data set of the shapes in the settings, else those of `given`, else the usual ones."""
    latent = tuple(config.shape.latent or (given.latent_shape if given else LATENT))
    classes = config.shape.classes or (given.num_classes if given else CLASSES)
    channels, height, _ = latent
    return Manifest(
        latent_shape=latent,  # type: ignore[arg-type]
        latent_dtype="float32",
        has_latent_std=given.has_latent_std if given else False,
        vae=VaeInfo(name="assumed", fingerprint="", shift=0.0, scale=1.0, stride=STRIDE),
        image_size=STRIDE * height,
        channel_mean=(0.0,) * channels,
        channel_std=(1.0,) * channels,
        class_names=tuple(str(number) for number in range(classes)),
        shards=(),
        license="",
        attribution="",
        has_captions=True,
    )


def with_batch_size(config: PlanConfig, batch_size: int) -> PlanConfig:
    """The same settings with another batch."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=batch_size))
