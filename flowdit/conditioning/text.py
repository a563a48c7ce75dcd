"""Captions: records of latent and captions, PixArt-alpha's transformer, features from a frozen text encoder."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray

from flowdit.conditioning.base import DEFAULT_PREVIEWS, Batch, Conditioning, Example, Exported, Requests, repeated
from flowdit.conditioning.meta import ConditioningMeta, EncoderMeta
from flowdit.config import Config, TrainConfig, as_list
from flowdit.data.captions import TextReader, TokenizedCaptions
from flowdit.data.loader import DataConfig
from flowdit.data.manifest import Manifest
from flowdit.data.mixture import Mixture, Part
from flowdit.data.schema import CAPTION_FIELDS, Field, SizeField
from flowdit.data.text_cache import open_cache
from flowdit.fields import FieldError, called, under
from flowdit.fsdp import on_mesh
from flowdit.models.attention import AttentionShape
from flowdit.models.config import ModelConfig, PixArtConfig
from flowdit.models.pixart import PixArt, TextCondition, build_pixart
from flowdit.models.text_encoder import WORDLLAMA, TextConfig, TextEncoder, encode_tokens, load_text_encoder
from flowdit.sharding import batch_sharding, join_micro_batches, micro_batch

logger = logging.getLogger(__name__)

MAX_TOKENS = 2**16
"""Maximum text length: it is not the size of any tensor, but sampling allocates it."""


@dataclasses.dataclass(frozen=True)
class Training:
    """Values that exist only in training. A batch is encoded in micro-batches of `micro_batch` rows."""

    encoder: TextEncoder
    data: DataConfig
    mesh: Mesh
    micro_batch: int
    readers: dict[tuple[str, str], TextReader] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Text(Conditioning):
    """Conditioning on text features; the null caption is part of the model (PixArt-alpha).

    `info` says which encoder made the features (`describe_encoder`); its fingerprint is empty for a model that was
    trained elsewhere. `size` is the (height, width) in pixels of examples that do not say theirs, for networks that are
    micro-conditioned on it. `config` names the encoder that reads prompts.
    """

    info: EncoderMeta | None = None
    size: tuple[int, int] | None = None
    config: TextConfig | None = None
    training: Training | None = None

    model = "pixart"
    starts_from = ("pixart", "ccdit")
    request_args = ("prompts", "negative_prompt")
    preview_field = "sample_prompts"
    same_in_mixtures = ("has_captions",)

    @classmethod
    def check(cls, config: Config) -> None:
        with under("text."):
            config.text.check()

    @classmethod
    def for_training(cls, config: Config, manifest: Manifest, mesh: Mesh) -> Text:
        if not manifest.has_captions:
            raise ValueError(
                f"data.path: {config.data.path} has no captions, which conditioning=text needs: "
                "prepare the images with captions=... into another folder"
            )
        with under("text."):
            encoder = load_text_encoder(config.text, mesh)
        rows = config.train.batch_size // config.train.gradient_accum
        training = Training(encoder, config.data, mesh, rows)
        return cls(describe_encoder(encoder), micro_condition(config.model, manifest), config.text, training)

    @classmethod
    def from_checkpoint(cls, config: Config, manifest: Manifest, meta: ConditioningMeta) -> Text:
        if meta.text is None:
            raise ValueError("text: must describe the text encoder of a model that reads text, got None")
        return cls(meta.text, micro_condition(config.model, manifest), config.text)

    def with_encoder(self, name: str) -> Text:
        assert self.config is not None
        return dataclasses.replace(self, config=dataclasses.replace(self.config, encoder=name))

    def at_size(self, height: int, width: int) -> Text:
        return self if self.size is None else dataclasses.replace(self, size=(height, width))

    @functools.cached_property
    def encoder(self) -> TextEncoder:
        """The text encoder, loaded on first use. Raises `ValueError` if it is not the encoder of the features."""
        if self.training is not None:
            return self.training.encoder
        assert self.config is not None and self.info is not None
        return load_matching_encoder(self.config, self.info)

    # --- the network ---

    def build_model(self, config: PixArtConfig, channels: int, *, key: PRNGKeyArray) -> PixArt:
        assert self.info is not None
        return build_pixart(config, channels, self.info.width, key=key)

    def check_model(self, config: ModelConfig) -> None:
        assert isinstance(config, PixArtConfig) and self.info is not None and self.config is not None
        if (tokens := max(self.info.max_length, self.config.max_length)) > MAX_TOKENS:
            raise ValueError(f"text.max_length: must be at most {MAX_TOKENS}, got {tokens}")
        if config.null_tokens not in (1, length := self.info.max_length):
            raise ValueError(f"model.null_tokens: must be 1 or text.max_length={length}, got {config.null_tokens}")

    def attention_shapes(self, config: ModelConfig, latent_shape: tuple[int, int, int]) -> list[AttentionShape]:
        assert self.info is not None
        return config.attention_shapes(latent_shape, self.info.max_length)

    # --- a batch ---

    def fields(self) -> dict[str, Field]:
        sizes = {} if self.size is None else {"image_size": SizeField(self.size)}
        return {**CAPTION_FIELDS, **sizes}

    def reader(self, split: str, part: Part) -> TextReader:
        """A reader of tokens for the encoder in the loop, or of features from a cache made by the same encoder."""
        assert self.training is not None
        data, folder = self.training.data, part.folder
        if folder.text_cache is None:
            tag_dropout = data.tag_dropout if split == "train" else 0.0
            reader = TokenizedCaptions(self.encoder.tokenize, data.long_caption_prob, tag_dropout)
        else:
            options = {"data": folder.path, "local_dir": data.local_dir, "pool": data.pool}
            options |= {"verify_hashes": data.verify_hashes, "hash_limit": data.hash_limit}
            cache, probability = folder.text_cache, data.long_caption_prob
            reader = open_cache(cache, part.manifest, split, self.encoder, probability, **options)
        self.training.readers[split, folder.path] = reader
        return reader

    def encode(self, batch: Batch) -> Batch:
        """Replace `text_ids` by `text_features`; a batch with cached features is unchanged."""
        if "text_ids" not in batch:
            return batch
        rest = {name: value for name, value in batch.items() if name != "text_ids"}
        return rest | {"text_features": self._encode_step(self.encoder.network, batch["text_ids"], batch["text_mask"])}

    def encoded(self) -> dict[str, jax.ShapeDtypeStruct]:
        assert self.info is not None
        length, width = self.info.max_length, self.info.width
        features = jax.ShapeDtypeStruct((length, width), jnp.dtype(self.info.dtype))
        return {"text_features": features, "text_mask": jax.ShapeDtypeStruct((length,), jnp.dtype(bool))}

    @functools.cached_property
    def _encode_step(self) -> Any:
        assert self.training is not None
        return make_encode_step(self.training.mesh, self.training.micro_batch)

    def condition(self, example: Example) -> TextCondition:
        """Of `text_features`, `text_mask` and, where the network is conditioned on it, `image_size` or else `size`.

        An example without a valid token has no caption.
        """
        mask = example["text_mask"]
        pixels = None if self.size is None else jnp.asarray(example.get("image_size", self.size), jnp.float32)
        return TextCondition(example["text_features"], mask, ~mask.any(), pixels)

    def null(self, condition: TextCondition) -> TextCondition:
        return condition._replace(dropped=jnp.ones_like(condition.dropped))

    # --- requests for images ---

    def requests(self, count: int = 1, prompts: Any = None, negative_prompt: str = "") -> Requests:
        """Requests for prompts, one or a list. An empty `negative_prompt` means the model's null caption."""
        texts = [str(prompt) for prompt in as_list(prompts) or []]
        if not texts:
            raise ValueError(f"prompts: must hold at least one prompt, got {prompts}")
        self._warn_of_truncation([*texts, negative_prompt])
        return self._requests(repeated(texts, count), negative_prompt)

    def previews(self, train: TrainConfig, data: Mixture | None) -> Requests:
        """`train.sample_prompts`, or evenly spaced short captions of `data`."""
        prompts = train.sample_prompts
        if prompts is None and data is not None:
            count = min(DEFAULT_PREVIEWS, len(data))
            records = data.read([i * len(data) // count for i in range(count)])
            prompts = [record["short_caption"] or record["long_caption"] for record in records]
        if not prompts:
            raise ValueError(f"train.sample_prompts: must hold at least one prompt, got {prompts}")
        return self._requests(list(prompts), "")

    def _requests(self, prompts: list[str], negative_prompt: str) -> Requests:
        negative = self._conditions([negative_prompt]) if negative_prompt.strip() else None

        def encode(rows: Sequence[int]) -> tuple[TextCondition, TextCondition]:
            condition = self._conditions([prompts[row] for row in rows])
            if negative is None:
                return condition, jax.vmap(self.null)(condition)
            return condition, jax.tree.map(lambda x: jnp.repeat(x, len(rows), axis=0), negative)

        return Requests(prompts, encode, lambda row: {"prompts": prompts[row], "negative_prompt": negative_prompt})

    def _conditions(self, texts: list[str]) -> TextCondition:
        """Conditions with a fixed shape, so that images do not depend on the length of other prompts."""
        encoded = self.encoder.encode(texts, self.encoder.max_length)
        text = {"text_features": jnp.asarray(encoded.features), "text_mask": jnp.asarray(encoded.mask)}
        return jax.vmap(self.condition)(text)

    def _warn_of_truncation(self, prompts: list[str], chunk: int = 256) -> None:
        length, distinct = self.encoder.max_length, list(dict.fromkeys(prompts))
        for start in range(0, len(distinct), chunk):
            some = distinct[start : start + chunk]
            for prompt, is_cut in zip(some, self.encoder.tokenize(some).truncated, strict=True):
                if is_cut:
                    logger.warning("longer than %d tokens, the rest is ignored: %r...", length, prompt[:60])

    # --- descriptions ---

    @property
    def summary(self) -> str:
        assert self.training is not None
        cache = self.training.data.text_cache
        features = f"{self.encoder.name} features of {self.encoder.width} x {self.encoder.max_length} tokens"
        return f"captions, {features} {'from ' + cache if cache else 'online'}"

    def describe(self) -> ConditioningMeta:
        return ConditioningMeta(text=self.info)

    def exported(self) -> Exported:
        assert self.info is not None
        name, tokens = self.info.name, self.info.max_length
        call, parts = (
            'pipe(prompt="...")',
            (
                f'tokenizer=AutoTokenizer.from_pretrained("{name}")',
                f'text_encoder=T5GemmaEncoderModel.from_pretrained("{name}", is_encoder_decoder=False)',
            ),
        )
        if name == WORDLLAMA:  # not an encoder of transformers
            call, parts = "pipe(prompt_embeds=..., prompt_attention_mask=...)", ()
        return Exported(
            "Text-conditional (PixArt-alpha)",
            call,
            task="text-to-image",
            values={"max_length": tokens, "text_encoder_name": name},
            parts=parts,
            facts={"text encoder": name, "tokens": tokens},
        )

    def figures(self) -> dict[str, int]:
        """Captions of the training split that were read, and those of them longer than `text.max_length`."""
        assert self.training is not None
        counts = [reader.counts for (split, _), reader in self.training.readers.items() if split == "train"]
        captions, truncated = (sum(getattr(c, name) for c in counts) for name in ("captions", "truncated"))
        return {"data/captions": captions, "data/truncated_captions": truncated}

    def unlike(self, theirs: Conditioning) -> str | None:
        if not isinstance(theirs, Text):
            return super().unlike(theirs)
        assert self.info is not None and theirs.info is not None
        # The fingerprint of an imported model's encoder is unknown: compare the name.
        same = "fingerprint" if self.info.fingerprint and theirs.info.fingerprint else "name"
        for field in (same, "width", "max_length"):
            if (ours := getattr(self.info, field)) != (other := getattr(theirs.info, field)):
                return (
                    f"must read the features of the model's text encoder, of {field} {ours}, it reads those of {other}"
                )
        if theirs.size not in (None, self.size):
            return f"must take images of the model's size {self.size}, it takes {theirs.size}"
        return None

    # --- starting and resuming ---

    def check_resumable(self, stored: ConditioningMeta) -> None:
        assert self.info is not None
        # The location of the encoder may change.
        if stored.text is None or dataclasses.replace(stored.text, name=self.info.name) != self.info:
            raise ValueError(f"text.encoder: must be that of the checkpoint to resume, {stored.text}, got {self.info}")

    def fresh_parts(self, theirs: Conditioning, their_model: ModelConfig, model: ModelConfig) -> dict[str, str]:
        assert isinstance(theirs, Text) and theirs.info is not None and self.info is not None
        assert isinstance(their_model, PixArtConfig) and isinstance(model, PixArtConfig)
        parts = {}
        # The fingerprint of an imported model's encoder is unknown: compare the name.
        same = "fingerprint" if theirs.info.fingerprint else "name"
        if any(getattr(theirs.info, field) != getattr(self.info, field) for field in (same, "width")):
            texts = (theirs.info, self.info)
            encoders = " and ".join(f"{t.name} ({t.fingerprint}, width {t.width})" for t in texts)
            parts |= dict.fromkeys(("caption_proj", "null_caption"), f"the text encoders differ, {encoders}")
        elif their_model.null_tokens != model.null_tokens:
            parts["null_caption"] = f"model.null_tokens was {their_model.null_tokens}, is {model.null_tokens}"
        if model.micro_conditioning and not their_model.micro_conditioning:
            parts["size_embed"] = "model.micro_conditioning was false; its output starts at zero"
        return parts


def describe_encoder(encoder: TextEncoder) -> EncoderMeta:
    """Checkpoint metadata of the text encoder, enough to detect another one."""
    return EncoderMeta(**{field.name: getattr(encoder, field.name) for field in dataclasses.fields(EncoderMeta)})


def micro_condition(config: ModelConfig, manifest: Manifest) -> tuple[int, int] | None:
    """Height and width in pixels for a model with micro-conditioning, else None."""
    assert isinstance(config, PixArtConfig)
    return (manifest.image_size, manifest.image_size) if config.micro_conditioning else None


def load_matching_encoder(config: TextConfig, info: EncoderMeta) -> TextEncoder:
    """Load the text encoder of `config`. Raises `ValueError` if it is not the one described by `info`."""
    if not config.encoder:
        raise FieldError("text_encoder", f"must be given, the checkpoint has none (features of width {info.width})")
    with called({"encoder": "text_encoder"}):
        encoder = load_text_encoder(config)
    if encoder.width != info.width:
        rule = f"must make features of width {info.width}, {encoder.name!r} makes {encoder.width}"
        raise FieldError("text_encoder", rule)
    known = info.fingerprint  # empty for an imported model
    if known and encoder.fingerprint != known:
        rule = f"must be the one of the training run ({info.name}, fingerprint {known})"
        raise FieldError("text_encoder", f"{rule}, {encoder.name!r} has {encoder.fingerprint}")
    return encoder


def make_encode_step(mesh: Mesh, batch_size: int) -> Any:
    """Return a jitted (network, ids, mask) -> features, computed `batch_size` rows at a time to save memory."""

    def encode_step(network, ids, mask):
        count = len(ids) // batch_size
        encode_rows = lambda i: encode_tokens(network, *micro_batch((ids, mask), i, count))
        return join_micro_batches(jax.lax.map(encode_rows, jnp.arange(count)))

    return jax.jit(on_mesh(mesh, encode_step), out_shardings=batch_sharding(mesh))
