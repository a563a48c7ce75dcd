"""The interface of feature networks: from 8-bit images to the features and logits that scores are computed from."""

from typing import NamedTuple, Protocol

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, Float, UInt8


class Extracted(NamedTuple):
    """Features of images in float32, and the logits of the classifier if the network has one."""

    features: Float[Array | np.ndarray, "n width"]
    logits: Float[Array | np.ndarray, "n classes"] | None


class Extractor(Protocol):
    """An Equinox module. It resizes the images itself and computes in float32 on every device.

    `map_layer` says in a few words which layer `maps` are of.
    """

    map_layer: str

    def __call__(self, images: UInt8[Array, "n height width 3"]) -> Extracted: ...

    def maps(self, images: UInt8[Array, "n height width 3"]) -> Float[Array, "n rows columns dim"]:
        """Features by position. The whole image is resized to the network's input: nothing is cut off, and the grid has
        the same size for images of all shapes.
        """
        ...


class FeatureNetwork(NamedTuple):
    """A feature network with its weights. Pass `model` as an argument of a jitted function, so that weights are no constants.

    `identity` names everything that changes a feature: variant, layer, resize, dtype, and 12 hex digits of the SHA-256
    of the weights. Features are comparable only if it is equal. `num_classes` is 0 without logits. `weights` is the part
    of it that maps depend on, variant and digits; empty for a network without maps.
    """

    name: str
    model: Extractor
    width: int
    identity: str
    num_classes: int = 0
    weights: str = ""

    @property
    def map_identity(self) -> str:
        """Everything that changes a map. Maps are comparable only if it is equal."""
        return f"{self.weights}, {self.model.map_layer} of whole images, float32"

    @property
    def map_shape(self) -> tuple[int, int, int]:
        """Rows, columns and width of a map."""
        one = jax.ShapeDtypeStruct((1, 8, 8, 3), np.uint8)
        rows, columns, width = eqx.filter_eval_shape(lambda model, images: model.maps(images), self.model, one).shape[
            1:
        ]
        return rows, columns, width
