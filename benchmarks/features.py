"""Feature networks on one machine: CPU time per image, and whether neighbours in the features are alike."""

import json
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from benchmarks.timing import interleave, table
from flowdit.data import openmoji
from flowdit.features import FeatureWeights, load_features
from flowdit.features.base import Extractor
from flowdit.features.convolution import DepthwiseConvolution
from flowdit.features.inception import Inception

BATCH_SIZE = 16


class GroupedConvolution(eqx.Module):
    """A depthwise convolution by XLA."""

    weight: Float[Array, "side side channels"]
    bias: Float[Array, " channels"]
    stride: int = eqx.field(static=True)

    def __call__(self, x: Float[Array, "n height width channels"]) -> Float[Array, "n _ _ channels"]:
        strides, axes = (self.stride, self.stride), ("NHWC", "HWIO", "NHWC")
        options = {"dimension_numbers": axes, "feature_group_count": x.shape[-1]}
        y = jax.lax.conv_general_dilated(x, self.weight[:, :, None], strides, "SAME", **options)
        return y + self.bias[None, None, None]


def grouped(layer: object) -> object:
    is_depthwise = isinstance(layer, DepthwiseConvolution)
    return GroupedConvolution(layer.weight, layer.bias, layer.stride) if is_depthwise else layer


def measure() -> str:
    network, pictures = load_features("efficientnet", FeatureWeights()).model, openmoji.load().tiles
    is_depthwise = lambda layer: isinstance(layer, DepthwiseConvolution)
    models = {
        "EfficientNet-Lite0": network,
        "with XLA's depthwise convolution": jax.tree.map(grouped, network, is_leaf=is_depthwise),
        "Inception v3, random weights": Inception(),
    }
    extract = eqx.filter_jit(lambda model, images: model(images).features)
    batch = jnp.asarray(pictures[:BATCH_SIZE])
    runs = {name: lambda model=model: extract(model, batch).block_until_ready() for name, model in models.items()}
    timings = interleave(runs, rounds=3, clock=time.process_time)
    rows = [[name, t.rate(BATCH_SIZE), t.ratio(timings["EfficientNet-Lite0"])] for name, t in timings.items()]
    first = f"pictures of 64x64, batch {BATCH_SIZE}"
    return table([first, "images per second of CPU time", "time / EfficientNet"], rows) + "\n\n" + neighbours(network)


def neighbours(network: Extractor) -> str:
    """How often the nearest other picture of OpenMoji has the same group."""
    rows = json.loads((openmoji.FOLDER / "table.json").read_text(encoding="utf-8"))
    named = {row["annotation"]: row["group"] for row in rows}
    pictures = openmoji.load()
    groups = np.array([named[short.replace("flag of ", "flag: ")] for short, _ in pictures.captions])
    extract = eqx.filter_jit(lambda model, images: model(images).features)
    count = len(groups) - len(groups) % BATCH_SIZE
    tiles = pictures.tiles[:count].reshape(-1, BATCH_SIZE, *pictures.tiles.shape[1:])
    features = np.concatenate([np.asarray(extract(network, jnp.asarray(batch))) for batch in tiles])
    squares = np.square(features).sum(1)
    distances = squares[:, None] + squares[None] - 2 * features @ features.T
    np.fill_diagonal(distances, np.inf)
    alike = (groups[distances.argmin(1)] == groups[:count]).mean()
    largest = np.unique(groups[:count], return_counts=True)[1].max() / count
    return f"The nearest of {count} pictures has the same group in {alike:.0%} of the cases; the largest group has {largest:.0%}."
