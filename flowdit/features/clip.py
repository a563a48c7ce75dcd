"""CLIP from a Hugging Face folder: features of images and of texts in their common space, projected, not normalised.

Images are resized and cropped as the folder's `preprocessor_config.json` says. A text is represented by its end token;
longer texts are cut to the 77 tokens of the model, start and end tokens kept.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8
from pydantic import Field
from pydantic.dataclasses import dataclass
from tokenizers import Tokenizer

from flowdit.features import folders
from flowdit.features.base import Extracted, FeatureNetwork
from flowdit.features.config import FeatureWeights
from flowdit.features.preprocessing import Preprocessing, read_preprocessing
from flowdit.features.transformer import (
    EncoderConfig,
    EncoderLayer,
    LayerNorm,
    Linear,
    VisionConfig,
    VisionTransformer,
    run_layers,
    stacked_layers,
)
from flowdit.fields import about, content_of
from flowdit.json_input import STRICT_PART, Count, Positive, parse
from flowdit.models import pretrained
from flowdit.models.text_encoder import TOKENIZER_FILE, read_tokenizer

IMAGE_NAMES = {
    "vision_model.embeddings.class_embedding": "network.class_embedding",
    "vision_model.embeddings.patch_embedding.": "network.patch_embedding.",
    "vision_model.embeddings.position_embedding.weight": "network.position_embedding",
    "vision_model.pre_layrnorm.": "network.pre_layrnorm.",
    "vision_model.encoder.layers.": "network.layers.",
    "vision_model.post_layernorm.": "network.post_layernorm.",
    "visual_projection.": "projection.",
}
TEXT_NAMES = {
    "text_model.embeddings.token_embedding.weight": "token_embedding",
    "text_model.embeddings.position_embedding.weight": "position_embedding",
    "text_model.encoder.layers.": "layers.",
    "text_model.final_layer_norm.": "final_layer_norm.",
    "text_projection.": "projection.",
}
"""Beginnings of the keys that are read, and of their paths in the network."""
MAX_BATCH = 32
SHORTEST = 16


@dataclass(frozen=True, config=STRICT_PART)
class _Tower:
    """Fields of the text and of the image part, with transformers' defaults of the text part."""

    hidden_size: Count = 512
    intermediate_size: Count = 2048
    num_hidden_layers: Count = 12
    num_attention_heads: Count = 8
    hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu"
    layer_norm_eps: Positive = 1e-5

    def encoder(self, is_causal: bool = False) -> EncoderConfig:
        return EncoderConfig(
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=self.intermediate_size,
            hidden_act=self.hidden_act,
            layer_norm_eps=self.layer_norm_eps,
            is_causal=is_causal,
        )


@dataclass(frozen=True, config=STRICT_PART)
class _Text(_Tower):
    vocab_size: Count = 49408
    max_position_embeddings: Annotated[int, Field(ge=3)] = 77


@dataclass(frozen=True, config=STRICT_PART)
class _Vision(_Tower):
    hidden_size: Count = 768
    intermediate_size: Count = 3072
    num_attention_heads: Count = 12
    image_size: Count = 224
    patch_size: Count = 32
    num_channels: Literal[3] = 3

    def network(self) -> VisionConfig:
        return VisionConfig(
            encoder=self.encoder(),
            patch_size=self.patch_size,
            height=self.image_size,
            width=self.image_size,
            has_pre_norm=True,
        )


@dataclass(frozen=True, config=STRICT_PART)
class ClipConfig:
    """The fields of `config.json` that say what is computed."""

    model_type: Literal["clip"]
    text_config: _Text
    vision_config: _Vision
    projection_dim: Count = 512


class ClipImages(eqx.Module):
    """From 8-bit images to their projected features."""

    network: VisionTransformer
    projection: Linear
    preprocessing: Preprocessing = eqx.field(static=True)

    map_layer = "patch tokens"

    def __init__(self, config: ClipConfig, preprocessing: Preprocessing):
        self.network = VisionTransformer(config.vision_config.network())
        self.projection = Linear(config.vision_config.hidden_size, config.projection_dim, has_bias=False)
        self.preprocessing = preprocessing

    def __call__(self, images: UInt8[Array, "n height width 3"]) -> Extracted:
        with jax.default_matmul_precision("highest"):
            return Extracted(self.projection(jax.vmap(self.network)(self.preprocessing(images))), None)

    def maps(self, images: UInt8[Array, "n height width 3"]) -> Float[Array, "n rows columns dim"]:
        """The patch tokens before the last norm, which was trained on the class token alone."""
        with jax.default_matmul_precision("highest"):
            return jax.vmap(lambda image: self.network.patches(image, False))(self.preprocessing.whole(images))


class ClipTexts(eqx.Module):
    """From token ids of texts to their projected features."""

    token_embedding: Float[Array, "vocabulary dim"]
    position_embedding: Float[Array, "positions dim"]
    layers: EncoderLayer
    final_layer_norm: LayerNorm
    projection: Linear

    def __init__(self, config: ClipConfig):
        text = config.text_config
        encoder = text.encoder(is_causal=True)
        self.token_embedding = jnp.zeros((text.vocab_size, text.hidden_size))
        self.position_embedding = jnp.zeros((text.max_position_embeddings, text.hidden_size))
        self.layers = stacked_layers(encoder)
        self.final_layer_norm = LayerNorm(encoder)
        self.projection = Linear(text.hidden_size, config.projection_dim, has_bias=False)

    def __call__(self, ids: Int[Array, "n length"], ends: Int[Array, " n"]) -> Float[Array, "n width"]:
        """`ends` are the places of the end tokens; what follows them has no effect."""
        with jax.default_matmul_precision("highest"):
            return self.projection(jax.vmap(self._encode)(ids, ends))

    def _encode(self, ids: Int[Array, " length"], end: Int[Array, ""]) -> Float[Array, " dim"]:
        tokens = run_layers(self.layers, self.token_embedding[ids] + self.position_embedding[: len(ids)])
        return self.final_layer_norm(tokens[end][None])[0]


encode = eqx.filter_jit(lambda model, ids, ends: model(ids, ends))


class Clip(NamedTuple):
    """Both parts of CLIP; `encode_texts` returns one row of features for each text."""

    image: FeatureNetwork
    encode_texts: Callable[[Sequence[str]], Float[np.ndarray, "n width"]]


def load_clip_images(weights: FeatureWeights) -> FeatureNetwork:
    """Read the image part of `weights.clip`. Raises `FieldError` as `load_clip`."""
    folder = folders.find(weights, "clip")
    with about("weights.clip"):
        return _read_images(folder, _read_config(folder))


def load_clip(weights: FeatureWeights) -> Clip:
    """Read both parts and the tokenizer of `weights.clip`, weights cast to float32.

    Raises:
        FieldError: naming `weights.clip` if it is not given or not found, or its files are damaged or of another network.
    """
    folder = folders.find(weights, "clip", TOKENIZER_FILE)
    with about("weights.clip"):
        config = _read_config(folder)
        tokenizer = _read_tokenizer(folder, config.text_config)
        depth = config.text_config.num_hidden_layers
        texts = folders.read(
            folder,
            lambda: ClipTexts(config),
            lambda key: folders.renamed(key, TEXT_NAMES),
            layers="layers",
            depth=depth,
        )
        images = _read_images(folder, config)
    return Clip(images, lambda prompts: encode_texts(texts, tokenizer, prompts))


def encode_texts(model: ClipTexts, tokenizer: Tokenizer, texts: Sequence[str]) -> Float[np.ndarray, "n width"]:
    """Features of texts in host memory, in batches of one of a few sizes, as each is compiled once."""
    longest, width = model.position_embedding.shape[0], model.projection.weight.shape[0]
    rows = [_tokens(tokenizer, text, longest) for text in texts]
    length = min(longest, max([SHORTEST, *(1 << (len(row) - 1).bit_length() for row in rows)]))
    batch = min(MAX_BATCH, 1 << max(0, len(texts) - 1).bit_length())
    features = np.empty((len(texts), width), np.float32)
    for start in range(0, len(texts), batch):
        part = rows[start : start + batch]
        ids, ends = np.zeros((batch, length), np.int32), np.zeros(batch, np.int32)
        for i, row in enumerate(part):
            ids[i, : len(row)], ends[i] = row, row.index(row[-1])
        features[start : start + len(part)] = encode(model, jnp.asarray(ids), jnp.asarray(ends))[: len(part)]
    return features


def _tokens(tokenizer: Tokenizer, text: str, longest: int) -> list[int]:
    content = tokenizer.encode(text, add_special_tokens=False)
    content.truncate(longest - tokenizer.num_special_tokens_to_add(False))
    return tokenizer.post_process(content).ids


def _read_tokenizer(folder: Path, config: _Text) -> Tokenizer:
    tokenizer = read_tokenizer(folder / TOKENIZER_FILE)
    added = tokenizer.num_special_tokens_to_add(False)
    largest = max([*tokenizer.get_vocab().values(), *tokenizer.encode("a").ids], default=0)
    if added != 2 or largest >= config.vocab_size:
        rule = f"must add a start and an end token and have ids below {config.vocab_size}"
        raise ValueError(f"{folder / TOKENIZER_FILE}: {rule}, it adds {added} tokens and has ids up to {largest}")
    return tokenizer


def _read_config(folder: Path) -> ClipConfig:
    image_shapes = folders.read_shapes(folder, lambda key: folders.renamed(key, IMAGE_NAMES))
    text_shapes = folders.read_shapes(folder, lambda key: folders.renamed(key, TEXT_NAMES))
    with content_of(folder / folders.CONFIG):
        config = parse(ClipConfig, folders.read_config(folder))
        folders.check_encoder(config.vision_config.encoder(), "network.layers.", image_shapes)
        folders.check_encoder(config.text_config.encoder(), "layers.", text_shapes)
        folders.check_patches(config.vision_config.network())
        pretrained.check_sizes(config, ("projection_dim",), image_shapes)
        pretrained.check_sizes(config.text_config, ("vocab_size", "max_position_embeddings"), text_shapes)
    return config


def _read_images(folder: Path, config: ClipConfig) -> FeatureNetwork:
    preprocessing, side = read_preprocessing(folder), config.vision_config.image_size
    if preprocessing.sides != (side, side):
        raise ValueError(f"{folder}: images must be {side}x{side}, not {preprocessing.sides} as in its preprocessing")
    model = folders.read(
        folder,
        lambda: ClipImages(config, preprocessing),
        lambda key: folders.renamed(key, IMAGE_NAMES),
        layers="network.layers",
        depth=config.vision_config.num_hidden_layers,
        prepare=lambda tensors: folders.flatten_patches(tensors, "network.patch_embedding.weight"),
    )
    vision = config.vision_config
    variant = f"clip-{vision.hidden_size}-{vision.num_hidden_layers} patch {vision.patch_size}"
    digest = folders.digest(folder)
    identity = f"{variant} projected, {preprocessing.describe()}, float32, {digest}"
    return FeatureNetwork("clip", model, config.projection_dim, identity, weights=f"{variant} {digest}")
