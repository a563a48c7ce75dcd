"""Models from elsewhere into flowdit checkpoints, and flowdit checkpoints out to where models are used.

from flowdit.interop import from_pretrained

pictures = from_pretrained("checkpoints/demo/1800").sample(labels=["heart"])
"""

from flowdit.interop.conversion import ConvertConfig, convert, read_source
from flowdit.interop.pretrained_model import PretrainedModel, from_pretrained

__all__ = ["ConvertConfig", "PretrainedModel", "convert", "from_pretrained", "read_source"]
