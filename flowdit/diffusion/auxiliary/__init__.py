"""Losses beside the objective's own: alignment with another network's features, auxiliary heads and the like.

To add one, write an `AuxiliaryLoss` in a file of its own and give it a line in `AUXILIARY` (docs/extending.md).
"""

from __future__ import annotations

from flowdit.diffusion.auxiliary.base import RESERVED_NAMES, AuxiliaryLoss, View, batch_losses

__all__ = ["AUXILIARY", "RESERVED_NAMES", "AuxiliaryLoss", "View", "batch_losses"]

AUXILIARY: dict[str, type[AuxiliaryLoss]] = {}
"""The auxiliary losses that there are, by their names in the configuration."""
