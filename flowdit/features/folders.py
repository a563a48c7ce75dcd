"""Reading the weights of a Hugging Face folder into the modules of `features.transformer`."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from flowdit import hashing
from flowdit.features.config import FeatureWeights
from flowdit.features.preprocessing import FILE as PREPROCESSING
from flowdit.features.transformer import EncoderConfig, VisionConfig
from flowdit.fields import require
from flowdit.models import pretrained

STEM = "model"
CONFIG = "config.json"
MAX_PATCHES = 4096
"""DINOv2's own largest grid has 1369; its attention grows with the square of the number."""
Network = TypeVar("Network", bound=eqx.Module)


def find(weights: FeatureWeights, name: str, *also: str) -> Path:
    """The folder of the setting `name`. Raises `FieldError` if it is not given or not found."""
    field, given = f"weights.{name}", weights.given(name)
    return pretrained.find_folder(field, given, stem=STEM, also=[PREPROCESSING, *also])


def check_encoder(config: EncoderConfig, prefix: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise `FieldError` for sizes that do not fit together, or are larger than the tensors of the file."""
    dim, heads = config.hidden_size, config.num_attention_heads
    require("hidden_size", dim, dim % heads == 0, f"must be a multiple of num_attention_heads={heads}")
    found = len(pretrained.numbers_after(prefix, shapes))
    require(
        "num_hidden_layers",
        config.num_hidden_layers,
        config.num_hidden_layers == found,
        f"must be {found}, as in its tensors",
    )
    pretrained.check_sizes(config, ("hidden_size", "intermediate_size"), shapes)


def check_patches(config: VisionConfig) -> None:
    """Raise `FieldError` unless an image has a number of patches that fits into memory."""
    count, (height, width) = config.grid[0] * config.grid[1], (config.height, config.width)
    rule = f"must cut an image of {height}x{width} into 1 to {MAX_PATCHES} patches"
    require("patch_size", config.patch_size, 1 <= count <= MAX_PATCHES, rule)


def read(
    folder: Path,
    build: Callable[[], Network],
    rename: Callable[[str], str | None],
    layers: str,
    depth: int,
    prepare: Callable[[dict[str, np.ndarray]], None] = lambda tensors: None,
) -> Network:
    """Read the network that `build` describes, in float32.

    Args:
        rename: from a key of the file to a path in the network, None for tensors that are not read.
        layers: path of the stacked layers in the network, of which there are `depth`.
        prepare: changes the renamed tensors before their shapes are checked.

    Raises:
        ValueError: files that are damaged, or tensors that are not those of the network.
    """
    files = pretrained.find_weights(folder, STEM, lambda key: rename(key) is not None)
    stored = pretrained.read_tensors(files, lambda key: rename(key) is not None)
    tensors: dict[str, np.ndarray] = {str(rename(key)): tensor for key, tensor in stored.items()}
    del stored  # to free the single layers while they are stacked
    prepare(tensors)
    shapes = eqx.filter_eval_shape(build)
    single = pretrained.with_single_layers(shapes, layers, depth)
    pretrained.check_tensors(single, tensors, source=folder)
    pretrained.stack_layers(tensors, layers, depth)
    return pretrained.fill(shapes, tensors, jnp.float32, source=folder)


def digest(folder: Path, *also: str) -> str:
    """12 hex digits over the weights of a folder, its configuration and its preprocessing."""
    files = pretrained.find_weights(folder, STEM)
    names = [CONFIG, PREPROCESSING, *also]
    return hashing.files_fingerprint(*(folder / name for name in names), *files)[:12]


def read_config(folder: Path) -> dict[str, Any]:
    """The content of `config.json`. Raises `ValueError` naming the file."""
    return pretrained.read_json(folder / CONFIG)


def renamed(key: str, names: Mapping[str, str]) -> str | None:
    """`key` with its beginning replaced; None if it begins with none of `names`."""
    return next((ours + key.removeprefix(theirs) for theirs, ours in names.items() if key.startswith(theirs)), None)


def read_shapes(folder: Path, rename: Callable[[str], str | None]) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that are read, by their paths in the network."""
    files = pretrained.find_weights(folder, STEM, lambda key: rename(key) is not None)
    shapes = pretrained.read_shapes(files, lambda key: rename(key) is not None)
    return {str(rename(key)): shape for key, shape in shapes.items()}


def flatten_patches(tensors: dict[str, np.ndarray], path: str) -> None:
    """Make the weight of a convolution over patches, (out, channels, rows, columns), a matrix."""
    if path in tensors and tensors[path].ndim == 4:
        tensors[path] = tensors[path].reshape(len(tensors[path]), -1)
