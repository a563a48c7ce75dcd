"""Auxiliary losses, such as alignment with features of another network or auxiliary heads.

To add one, write an `AuxiliaryLoss` in a new file and register it in `AUXILIARY` (docs/extending.md).
"""

from __future__ import annotations

from flowdit.diffusion.auxiliary.base import RESERVED_NAMES, AuxiliaryLoss, View, batch_losses

__all__ = ["AUXILIARY", "RESERVED_NAMES", "AuxiliaryLoss", "View", "batch_losses"]

AUXILIARY: dict[str, type[AuxiliaryLoss]] = {}
"""All auxiliary losses by their name in the configuration."""
