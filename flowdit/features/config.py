"""Settings of the feature networks: files of weights that the package does not hold."""

import dataclasses

from flowdit.fields import FieldError

SOURCES = {
    "inception": "pt_inception-2015-12-05-6726825d.pth, from the releases of github.com/mseitzer/pytorch-fid",
    "dinov2": "a Hugging Face folder or hub id such as facebook/dinov2-base",
    "clip": "a Hugging Face folder or hub id such as openai/clip-vit-large-patch14",
}
"""What each setting of `FeatureWeights` must be, and where to get it."""


@dataclasses.dataclass
class FeatureWeights:
    """Where the weights of feature networks are.

    Attributes:
        inception: file `pt_inception-2015-12-05-6726825d.pth` of pytorch-fid (read with torch), or its tensors in a
            safetensors file.
        dinov2: Hugging Face folder or hub id of a DINOv2 model, with or without registers.
        clip: Hugging Face folder or hub id of a CLIP model.
    """

    inception: str | None = None
    dinov2: str | None = None
    clip: str | None = None

    def given(self, name: str) -> str:
        """The setting `name`. Raises `FieldError` that says how to get the weights if it is not set."""
        value = getattr(self, name)
        if not value:
            raise FieldError(f"weights.{name}", f"must be given for features={name}: {SOURCES[name]}")
        return value
