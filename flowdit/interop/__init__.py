"""Conversion of models between flowdit and other formats, and `flowdit.load`."""

from flowdit.interop.conversion import ConvertConfig, convert, read_source
from flowdit.interop.loading import from_pretrained, load

__all__ = ["ConvertConfig", "convert", "from_pretrained", "load", "read_source"]
