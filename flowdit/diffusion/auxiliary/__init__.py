"""Auxiliary losses, such as alignment with features of another network or auxiliary heads.

To add one, write an `AuxiliaryLoss` in a new file and register it in `AUXILIARY` (docs/extending.md).
"""

from __future__ import annotations

from flowdit.diffusion.auxiliary.base import RESERVED_NAMES, AuxiliaryLoss, DataShapes, View, batch_losses
from flowdit.diffusion.auxiliary.clean_latent import CleanLatent
from flowdit.diffusion.auxiliary.internal_guidance import InternalGuidance
from flowdit.diffusion.auxiliary.layer_sync import LayerSync
from flowdit.diffusion.auxiliary.repa import Repa

__all__ = ["AUXILIARY", "RESERVED_NAMES", "AuxiliaryLoss", "DataShapes", "View", "batch_losses"]

AUXILIARY: dict[str, type[AuxiliaryLoss]] = {
    "clean_latent": CleanLatent,
    "internal_guidance": InternalGuidance,
    "layer_sync": LayerSync,
    "repa": Repa,
}
"""All auxiliary losses by their name in the configuration."""
