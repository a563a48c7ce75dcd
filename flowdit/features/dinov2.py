"""DINOv2, with and without registers, from a Hugging Face folder; its feature is the class token after the last norm.

Images are resized and cropped as the folder's `preprocessor_config.json` says. The position table is interpolated to
that size when the weights are read, as transformers does at each call: by PyTorch's bicubic, antialiased with registers.
"""

import math
from pathlib import Path
from typing import Annotated, Literal

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, Float, UInt8
from pydantic import Field
from pydantic.dataclasses import dataclass

from flowdit.features import folders
from flowdit.features.base import Extracted, FeatureNetwork
from flowdit.features.config import FeatureWeights
from flowdit.features.preprocessing import Preprocessing, read_preprocessing
from flowdit.features.resize import antialiased, interpolated
from flowdit.features.transformer import EncoderConfig, VisionConfig, VisionTransformer
from flowdit.fields import about, content_of
from flowdit.json_input import STRICT_PART, Count, Positive, parse

REGISTERS = "dinov2_with_registers"
NAMES = {
    "embeddings.cls_token": "class_embedding",
    "embeddings.position_embeddings": "position_embedding",
    "embeddings.register_tokens": "register_tokens",
    "embeddings.patch_embeddings.projection.": "patch_embedding.",
    "encoder.layer.": "layers.",
    "layernorm.": "post_layernorm.",
}
"""Beginnings of the keys that are read, and of their paths in the network."""
NAMES_IN_A_LAYER = {
    ".attention.attention.query.": ".self_attn.q_proj.",
    ".attention.attention.key.": ".self_attn.k_proj.",
    ".attention.attention.value.": ".self_attn.v_proj.",
    ".attention.output.dense.": ".self_attn.out_proj.",
    ".norm1.": ".layer_norm1.",
    ".norm2.": ".layer_norm2.",
    ".layer_scale1.lambda1": ".layer_scale1",
    ".layer_scale2.lambda1": ".layer_scale2",
    ".mlp.weights_in.": ".mlp.fc1.",
    ".mlp.weights_out.": ".mlp.fc2.",
}


@dataclass(frozen=True, config=STRICT_PART)
class _Dinov2:
    """The fields of `config.json` that say what is computed, with transformers' defaults."""

    model_type: Literal["dinov2", "dinov2_with_registers"]
    hidden_size: Count = 768
    num_hidden_layers: Count = 12
    num_attention_heads: Count = 12
    mlp_ratio: Annotated[float, Field(ge=1, le=64)] = 4
    layer_norm_eps: Positive = 1e-6
    patch_size: Count | None = None
    num_register_tokens: Annotated[int, Field(ge=1, le=1024)] = 4
    use_swiglu_ffn: bool = False
    hidden_act: Literal["gelu"] = "gelu"
    qkv_bias: Literal[True] = True
    num_channels: Literal[3] = 3

    def network(self, height: int, width: int) -> VisionConfig:
        """The network for images of that size."""
        inner, has_registers = int(self.hidden_size * self.mlp_ratio), self.model_type == REGISTERS
        encoder = EncoderConfig(
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=(int(inner * 2 / 3) + 7) // 8 * 8 if self.use_swiglu_ffn else inner,
            hidden_act="swiglu" if self.use_swiglu_ffn else "gelu",
            layer_norm_eps=self.layer_norm_eps,
            has_layer_scale=True,
        )
        return VisionConfig(
            encoder=encoder,
            patch_size=self.patch_size or (16 if has_registers else 14),
            height=height,
            width=width,
            num_registers=self.num_register_tokens if has_registers else 0,
            has_patch_bias=True,
        )


class Dinov2(eqx.Module):
    """From 8-bit images to the class tokens after the last norm."""

    network: VisionTransformer
    preprocessing: Preprocessing = eqx.field(static=True)

    map_layer = "patch tokens"

    def __call__(self, images: UInt8[Array, "n height width 3"]) -> Extracted:
        with jax.default_matmul_precision("highest"):
            return Extracted(jax.vmap(self.network)(self.preprocessing(images)), None)

    def maps(self, images: UInt8[Array, "n height width 3"]) -> Float[Array, "n rows columns dim"]:
        """The patch tokens after the last norm."""
        with jax.default_matmul_precision("highest"):
            return jax.vmap(lambda image: self.network.patches(image, True))(self.preprocessing.whole(images))


def load_dinov2(weights: FeatureWeights) -> FeatureNetwork:
    """Read the network of `weights.dinov2`, its weights cast to float32.

    Raises:
        FieldError: naming `weights.dinov2` if it is not given or not found, or its files are damaged or of another
            network.
    """
    folder = folders.find(weights, "dinov2")
    with about("weights.dinov2"):
        preprocessing = read_preprocessing(folder)
        config = _read_config(folder, preprocessing)
        network = folders.read(
            folder,
            lambda: VisionTransformer(config),
            rename=path_in_network,
            layers="layers",
            depth=config.encoder.num_hidden_layers,
            prepare=lambda tensors: _prepare(tensors, config),
        )
        registers = f" {config.num_registers} registers" if config.num_registers else ""
        variant = f"dinov2-{config.encoder.hidden_size}-{config.encoder.num_hidden_layers}{registers}"
        digest = folders.digest(folder)
        identity = f"{variant} class token, {preprocessing.describe()}, float32, {digest}"
    model, width = Dinov2(network, preprocessing), config.encoder.hidden_size
    return FeatureNetwork("dinov2", model, width, identity, weights=f"{variant} {digest}")


def path_in_network(key: str) -> str | None:
    """From a key of the file to a path in `VisionTransformer`; None for tensors that are not used."""
    path = folders.renamed(key, NAMES)
    if path is not None and path.startswith("layers."):
        for theirs, ours in NAMES_IN_A_LAYER.items():
            path = path.replace(theirs, ours)
    return path


def _read_config(folder: Path, preprocessing: Preprocessing) -> VisionConfig:
    shapes = folders.read_shapes(folder, path_in_network)
    with content_of(folder / folders.CONFIG):
        config = parse(_Dinov2, folders.read_config(folder)).network(*preprocessing.sides)
        folders.check_encoder(config.encoder, "layers.", shapes)
        folders.check_patches(config)
    return config


def _prepare(tensors: dict[str, np.ndarray], config: VisionConfig) -> None:
    """Give the embeddings the shapes of the network's."""
    if "class_embedding" in tensors:
        tensors["class_embedding"] = tensors["class_embedding"].reshape(-1)
    if "register_tokens" in tensors and tensors["register_tokens"].ndim == 3:
        tensors["register_tokens"] = tensors["register_tokens"][0]
    folders.flatten_patches(tensors, "patch_embedding.weight")
    table = tensors.get("position_embedding")
    side = 0 if table is None or table.ndim != 3 else math.isqrt(table.shape[1] - 1)
    if table is not None and side and len(table) == 1 and table.shape[1] == 1 + side**2:
        tensors["position_embedding"] = _resized(table[0], side, config)


def _resized(table: Float[np.ndarray, "positions dim"], side: int, config: VisionConfig) -> np.ndarray:
    """The position table for the grid of `config`, from that of a square grid."""
    if config.grid == (side, side):
        return table
    resized = antialiased if config.num_registers else interpolated
    rows, columns = (resized(side, new) for new in config.grid)
    grid = table[1:].astype(np.float64).reshape(side, side, -1)
    patches = np.einsum("ur,vc,rcd->uvd", rows, columns, grid, optimize=True)
    return np.concatenate([table[:1], patches.reshape(-1, grid.shape[-1])]).astype(np.float32)
