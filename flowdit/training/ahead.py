"""Training on several latent shapes: the step of each is compiled before the first batch."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from flowdit.diffusion.objective import Batch
from flowdit.training.step import Metrics, TrainState

logger = logging.getLogger(__name__)

Shape = tuple[int, int, int]


class ShapedStep:
    """The training step of each latent shape, compiled from `template`, the shapes and shardings of the state.

    `batches` has the shapes and shardings of a batch by its name on the console and its latent shape. Later batches are
    not compiled for, whatever their order.
    """

    def __init__(self, train_step: Any, template: TrainState, batches: Mapping[Shape, Any], names: Mapping[Shape, str]):
        self._compiled: dict[tuple[int, ...], Callable[[TrainState, Batch], tuple[TrainState, Metrics]]] = {}
        for i, (shape, batch) in enumerate(batches.items(), 1):
            start = time.perf_counter()
            self._compiled[shape] = train_step.lower(template, batch).compile()
            seconds = time.perf_counter() - start
            logger.info("compiled the step for %s px, %d of %d, in %.1f s", names[shape], i, len(batches), seconds)

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        return self._compiled[tuple(batch["latent"].shape[1:])](state, batch)


def mean_flops(image_flops: Callable[[Any], int], batches: Mapping[Shape, Any], shares: Mapping[Shape, int]) -> int:
    """The training FLOPs of an image on average, where `shares` are the images of each latent shape in an epoch.

    They depend on the number of tokens, so that a shape and its transpose are counted once.
    """
    by_size: dict[int, int] = {}
    for shape, batch in batches.items():
        size = math.prod(shape)
        if size not in by_size:
            by_size[size] = image_flops(batch)
    total = sum(share * by_size[math.prod(shape)] for shape, share in shares.items())
    return round(total / sum(shares.values()))
