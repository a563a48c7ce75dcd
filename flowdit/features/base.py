"""The interface of feature networks: from 8-bit images to the features and logits that scores are computed from."""

from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Array, Float, UInt8


class Extracted(NamedTuple):
    """Features of images in float32, and the logits of the classifier if the network has one."""

    features: Float[Array | np.ndarray, "n width"]
    logits: Float[Array | np.ndarray, "n classes"] | None


class Extractor(Protocol):
    """An Equinox module. It resizes the images itself and computes in float32 on every device."""

    def __call__(self, images: UInt8[Array, "n height width 3"]) -> Extracted: ...


class FeatureNetwork(NamedTuple):
    """A feature network with its weights. Pass `model` as an argument of a jitted function, so that weights are no constants.

    `identity` names everything that changes a feature: variant, layer, resize, dtype, and 12 hex digits of the SHA-256
    of the weights. Features are comparable only if it is equal. `num_classes` is 0 without logits.
    """

    name: str
    model: Extractor
    width: int
    identity: str
    num_classes: int = 0
