"""The stages as values: which records are read, which model is built, what conditions it, and what a preview shows.

Everything else in `training` is common to both.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array

from flowdit.config import Config
from flowdit.data.captions import TextReader, TokenizedCaptions
from flowdit.data.loader import DataConfig, Source
from flowdit.data.manifest import Manifest
from flowdit.data.records import Schema, stage1_schema, stage2_schema
from flowdit.data.text_cache import open_cache
from flowdit.diffusion.conditioning import Conditioning, class_conditioning, text_conditioning
from flowdit.models.ccdit import build_ccdit
from flowdit.models.mmdit import build_mmdit
from flowdit.models.text_encoder import TextEncoder, encode_tokens, load_text_encoder
from flowdit.models.transformer import ModelConfig
from flowdit.sharding import batch_sharding, on_mesh
from flowdit.training.step import Batch, join_micro_batches, micro_batch

Encode = Callable[[Batch], Batch]
"""A batch on the devices as the loader made it -> as the step takes it."""


class Requests(NamedTuple):
    """Pictures to draw: conditions and null conditions with a leading batch axis, and what to write below each."""

    condition: Any
    null: Any
    captions: list[str]


class Stage(NamedTuple):
    """All in which the stages differ. `text` opens the captions of a split; `encode` makes them what the step takes."""

    schema: Schema
    conditioning: Conditioning
    build_model: Callable[[], Any]
    text: Callable[[str], TextReader | None]
    encode: Encode
    previews: Callable[[Source], Requests]
    summary: str
    meta: dict[str, Any]


def make_stage(config: Config, manifest: Manifest, mesh: Mesh) -> Stage:
    """The stage that trains `config.model` on this data. Raises `ValueError` where the data lack what it needs."""
    return class_stage(config, manifest) if config.model.name == "ccdit" else text_stage(config, manifest, mesh)


def class_stage(config: Config, manifest: Manifest) -> Stage:
    """Stage 1: records of latent and label, the class-conditional DiT."""
    if not manifest.class_names:
        raise ValueError(
            f"data.path: {config.data.path} has no classes, which stage 1 needs; stage 2 takes its captions"
        )
    conditioning = class_conditioning(manifest.num_classes)
    labels = resolve_labels("train.sample_labels", config.train.sample_labels, manifest.class_names)
    return Stage(
        schema=stage1_schema(manifest.latent_shape, manifest.num_classes, manifest.has_latent_std),
        conditioning=conditioning,
        build_model=model_builder(config.model, manifest, None, config.seed),
        text=lambda split: None,
        encode=lambda batch: batch,
        previews=lambda source: label_requests(labels, manifest.class_names, conditioning),
        summary=f"{manifest.num_classes} classes",
        meta={"text": None},
    )


def text_stage(config: Config, manifest: Manifest, mesh: Mesh) -> Stage:
    """Stage 2: records of latent and captions, PixArt-alpha's transformer, features from the frozen text encoder."""
    if not manifest.has_captions:
        raise ValueError(f"data.path: {config.data.path} has no captions, which stage 2 needs")
    encoder = load_text_encoder(config.text, mesh)
    text = describe_encoder(encoder)
    conditioning = text_conditioning(micro_condition(config.model, manifest))
    cache = config.data.text_cache
    batch_size = config.train.batch_size // config.train.gradient_accum
    return Stage(
        schema=stage2_schema(manifest.latent_shape, manifest.has_latent_std),
        conditioning=conditioning,
        build_model=model_builder(config.model, manifest, text, config.seed),
        text=lambda split: open_text(config.data, manifest, encoder, split),
        encode=(lambda batch: batch) if cache else online_encoding(encoder, mesh, batch_size),
        previews=lambda source: prompt_requests(
            encoder, preview_prompts(config.train.sample_prompts, source), "", conditioning
        ),
        summary=f"captions, {encoder.name} features of {encoder.width} x {encoder.max_length} tokens "
        f"{'from ' + cache if cache else 'online'}",
        meta={"text": text},
    )


def describe_encoder(encoder: TextEncoder) -> dict[str, Any]:
    """What a checkpoint says of the text encoder: enough to refuse another one."""
    return {name: getattr(encoder, name) for name in ("name", "fingerprint", "dtype", "max_length", "width")}


def model_builder(config: ModelConfig, manifest: Manifest, text: dict[str, Any] | None, seed: int) -> Callable[[], Any]:
    """A function that initialises the model of this configuration on this data's latents and classes or text."""
    config.check(manifest.latent_shape)
    shape, key = manifest.latent_shape, functools.partial(jax.random.key, seed)
    if text is None:
        return lambda: build_ccdit(config, shape, manifest.num_classes, key=key())
    if config.null_tokens not in (1, text["max_length"]):
        raise ValueError(
            f"model.null_tokens: must be 1 or text.max_length={text['max_length']}, got {config.null_tokens}"
        )
    return lambda: build_mmdit(config, shape, text["width"], key=key())


def micro_condition(config: ModelConfig, manifest: Manifest) -> tuple[int, int] | None:
    """Height and width in pixels for a model that is conditioned on them."""
    return (manifest.image_size, manifest.image_size) if config.micro_conditioning else None


def open_text(data: DataConfig, manifest: Manifest, encoder: TextEncoder, split: str) -> TextReader:
    """The captions of a split: tokens for the online encoder, or features from the cache made by the same encoder."""
    if data.text_cache is None:
        return TokenizedCaptions(encoder.tokenize, data.long_caption_prob)
    hashes = {"verify_hashes": data.verify_hashes, "hash_limit": data.hash_limit}
    return open_cache(data.text_cache, manifest, split, encoder, data.long_caption_prob, **hashes)


def online_encoding(encoder: TextEncoder, mesh: Mesh, batch_size: int) -> Encode:
    """Replaces `text_ids` by `text_features`, `batch_size` rows at a time: more would cost more memory."""

    features = make_encode_step(mesh, batch_size)

    def encode(batch: Batch) -> Batch:
        rest = {name: value for name, value in batch.items() if name != "text_ids"}
        return rest | {"text_features": features(encoder.network, batch["text_ids"], batch["text_mask"])}

    return encode


def make_encode_step(mesh: Mesh, batch_size: int) -> Callable[[Any, Array, Array], Array]:
    """Jitted (network, ids, mask) -> features of a batch, `batch_size` rows at a time."""

    def encode_step(network, ids, mask):
        count = len(ids) // batch_size
        encode_rows = lambda i: encode_tokens(network, *micro_batch((ids, mask), i, count))
        return join_micro_batches(jax.lax.map(encode_rows, jnp.arange(count)))

    return jax.jit(on_mesh(mesh, encode_step), out_shardings=batch_sharding(mesh))


def preview_prompts(prompts: Sequence[str] | None, source: Source, default_count: int = 16) -> list[str]:
    """The prompts asked for, or short captions spread over `source`."""
    if prompts is not None:
        if not prompts:
            raise ValueError("train.sample_prompts: must hold at least one prompt, got []")
        return list(prompts)
    count = min(default_count, len(source))
    records = source.read([i * len(source) // count for i in range(count)])
    return [record["short_caption"] or record["long_caption"] for record in records]


def prompt_requests(
    encoder: TextEncoder, prompts: Sequence[str], negative_prompt: str, conditioning: Conditioning
) -> Requests:
    """Conditions for prompts. The null condition is `negative_prompt`; when that is empty, the model's null caption."""
    encoded = encoder.encode([*prompts, negative_prompt])
    text = {"text_features": jnp.asarray(encoded.features), "text_mask": jnp.asarray(encoded.mask)}
    both = jax.vmap(conditioning.of_example)(text)
    condition = jax.tree.map(lambda x: x[:-1], both)
    if negative_prompt.strip():
        null = jax.tree.map(lambda x: jnp.repeat(x[-1:], len(prompts), axis=0), both)
    else:
        null = jax.vmap(conditioning.null)(condition)
    return Requests(condition, null, list(prompts))


def label_requests(labels: Sequence[int], class_names: Sequence[str], conditioning: Conditioning) -> Requests:
    """Conditions for class numbers, captioned by the classes' names."""
    condition = jnp.asarray(labels, jnp.int32)
    return Requests(condition, jax.vmap(conditioning.null)(condition), [class_names[label] for label in labels])


def resolve_labels(
    field: str, labels: Sequence[Any] | None, class_names: Sequence[str], default_count: int = 16
) -> list[int]:
    """Class numbers for numbers or names; without any, `default_count` classes spread over all."""
    if labels is None:
        count = min(default_count, len(class_names))
        return [i * len(class_names) // count for i in range(count)]
    if not labels:
        raise ValueError(f"{field}: must name at least one class, got []")
    return [_label(field, label, class_names) for label in labels]


def _label(field: str, label: Any, class_names: Sequence[str]) -> int:
    if isinstance(label, str) and label in class_names:
        return class_names.index(label)
    number = int(label) if isinstance(label, int) or str(label).isdigit() else -1
    if isinstance(label, bool) or not 0 <= number < len(class_names):
        known = ", ".join(class_names[:8]) + (", ..." if len(class_names) > 8 else "")
        raise ValueError(f"{field}: must be in [0, {len(class_names)}) or a class name ({known}), got {label!r}")
    return number
