"""Feature networks of the scores: EfficientNet-Lite0, Inception v3, DINOv2 and CLIP, frozen and in float32."""

from collections.abc import Callable

from flowdit.features.base import Extracted, FeatureNetwork
from flowdit.features.clip import load_clip_images
from flowdit.features.config import FeatureWeights
from flowdit.features.dinov2 import load_dinov2
from flowdit.features.efficientnet import load_efficientnet
from flowdit.features.inception import load_inception
from flowdit.fields import require_choice

__all__ = ["FEATURES", "Extracted", "FeatureNetwork", "FeatureWeights", "load_features"]

LOADERS: dict[str, Callable[[FeatureWeights], FeatureNetwork]] = {
    "efficientnet": lambda weights: load_efficientnet(),
    "inception": load_inception,
    "dinov2": load_dinov2,
    "clip": load_clip_images,
}
FEATURES = tuple(LOADERS)
"""Names of the feature networks. Only the weights of `efficientnet` are part of the package."""


def load_features(name: str, weights: FeatureWeights) -> FeatureNetwork:
    """Read the feature network `name`.

    Raises:
        FieldError: naming `features` for an unknown name, or a field of `weights` that is missing or wrong.
    """
    require_choice("features", name, FEATURES)
    return LOADERS[name](weights)
