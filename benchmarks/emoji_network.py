"""The features by which `benchmarks.emoji_judge` tells styles and subjects apart.

Styles are told by what is in a picture wherever it is: its palette, by the edges in it; how often random filters respond
(as in ROCKET, Dempster et al., arXiv:1910.13051); mean and spread of the channels of EfficientNet-Lite0. Subjects are
told by two layers of EfficientNet-Lite0 with their positions.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from flowdit.features.base import Extracted, FeatureNetwork
from flowdit.features.convolution import Convolution, relu6
from flowdit.features.efficientnet import FILE, EfficientNet, load_efficientnet
from flowdit.features.resize import resize
from flowdit.hashing import file_sha256

SIZE = 112
"""Of the images that EfficientNet sees. Half the usual side takes a quarter of the time; an emoji has 64 pixels."""
POOLED = {0: 16, 2: 24, 4: 40, 7: 80, 10: 112}
"""Blocks with their channels, for the style."""
PROJECTED = {10: 7 * 7 * 112, 15: 4 * 4 * 320}
"""Blocks with the number of their values, for the subject."""
PROJECTIONS = 700
"""Random projections of each block. Real pictures find their subject as often as with its principal components."""
FILTERS, THRESHOLDS = 192, (-1.2, -0.4, -0.1, 0.1, 0.4, 1.2)
LEVELS, EDGES = 6, (4, 40)
"""Of each colour, and the differences of green between neighbours at which an edge is weak or strong."""
STYLE_WIDTH = FILTERS * (len(THRESHOLDS) + 1) + LEVELS**3 * (len(EDGES) + 1) + 2 * sum(POOLED.values())
SUBJECT_WIDTH = PROJECTIONS * len(PROJECTED)


class EmojiFeatures(eqx.Module):
    """From 8-bit images to `STYLE_WIDTH` features of the style and `SUBJECT_WIDTH` of the subject."""

    network: EfficientNet
    filters: Float[Array, "3 3 3 filters"]
    projections: dict[int, Float[Array, "values width"]]

    map_layer = EfficientNet.map_layer

    def __call__(self, images: UInt8[Array, "n height width 3"]) -> Extracted:
        with jax.default_matmul_precision("highest"):
            style = [jnp.sqrt(jax.vmap(_palette)(images)), self._responses(images)]
            subject: list[Float[Array, "n width"]] = []
            x = relu6(self.network.stem((resize(images, SIZE, SIZE) - 127) / 128))
            for number, block in enumerate(self.network.blocks):
                x = block(x)
                if number in POOLED:
                    style += [x.mean((1, 2)), x.std((1, 2))]
                if number in PROJECTED:
                    subject.append(x.reshape(len(x), -1) @ self.projections[number])
            return Extracted(jnp.concatenate([*style, *subject], axis=1), None)

    def maps(self, images: UInt8[Array, "n height width 3"]) -> Float[Array, "n rows columns width"]:
        """Those of EfficientNet."""
        return self.network.maps(images)

    def _responses(self, images: UInt8[Array, "n height width 3"]) -> Float[Array, "n width"]:
        """For every filter the shares of places at which it is above each threshold, and its spread."""
        convolution = Convolution(self.filters, jnp.zeros(FILTERS), stride=2, padding="VALID")
        found = convolution(images.astype(jnp.float32) / 127.5 - 1)
        shares = [(found > threshold).mean((1, 2)) for threshold in THRESHOLDS]
        return jnp.concatenate([*shares, found.std((1, 2))], axis=1)


def _palette(image: UInt8[Array, "height width 3"]) -> Float[Array, " colours"]:
    """The shares of pixels of each colour at each strength of edge."""
    pixels = image.astype(jnp.int32)
    red, green, blue = jnp.moveaxis(pixels * LEVELS // 256, -1, 0)
    along = [
        jnp.abs(jnp.diff(pixels[..., 1], axis=axis, append=pixels[..., 1].take(jnp.array([-1]), axis)))
        for axis in (0, 1)
    ]
    edge = sum((jnp.maximum(*along) > strength).astype(jnp.int32) for strength in EDGES)
    colour = (red * LEVELS + green) * LEVELS + blue
    counts = jnp.zeros(LEVELS**3 * (len(EDGES) + 1)).at[colour * (len(EDGES) + 1) + edge].add(1)
    return counts / colour.size


def load_emoji_features() -> FeatureNetwork:
    """The network, with filters of norm 1, half of which do not respond to flat areas, and projections of seed 0."""
    network = load_efficientnet().model
    assert isinstance(network, EfficientNet)
    random = np.random.default_rng(0)
    filters = random.standard_normal((3, 3, 3, FILTERS), np.float32)
    filters[..., : FILTERS // 2] -= filters[..., : FILTERS // 2].mean((0, 1))
    filters /= np.sqrt(np.square(filters).sum((0, 1, 2)))
    projections = {
        number: jnp.asarray(random.standard_normal((values, PROJECTIONS), np.float32) / np.float32(np.sqrt(values)))
        for number, values in PROJECTED.items()
    }
    model = EmojiFeatures(network, jnp.asarray(filters), projections)
    settings = f"{SIZE}, {POOLED}, {PROJECTED}, {PROJECTIONS}, {FILTERS}, {THRESHOLDS}, {LEVELS}, {EDGES}"
    identity = f"emoji styles and subjects, {settings}, {file_sha256(FILE)[:12]}"
    return FeatureNetwork("emoji", model, STYLE_WIDTH + SUBJECT_WIDTH, identity)
