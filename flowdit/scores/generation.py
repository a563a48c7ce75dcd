"""Drawing images and extracting their features, batch by batch, stored so that a killed run goes on where it was."""

from __future__ import annotations

import collections
import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors.numpy
from jaxtyping import Int, UInt8

from flowdit.conditioning import Requests
from flowdit.data.progress import progress_bar
from flowdit.diffusion.sampling import Samples
from flowdit.features.base import Extracted
from flowdit.processes import from_first
from flowdit.scores.extraction import Features, Seen, on_host
from flowdit.scores.feature_set import FeatureSet, feature_set

logger = logging.getLogger(__name__)

PART_IMAGES = 1024
"""Images of a part, which is stored as one file: what a kill can lose."""


class Part(NamedTuple):
    """Features of consecutive images, on the host, their images if wanted, and evaluations of the velocity for each."""

    numbers: range
    features: Features
    evaluations: Int[np.ndarray, " n"]
    images: UInt8[np.ndarray, "n height width 3"] | None = None


Draw = Callable[[np.ndarray, Any, Any], Samples]
"""From image numbers, conditions and null conditions of a batch to its samples, on the devices."""
See = Callable[[Any], list[Seen]]
"""From latents of a batch on the devices to what is seen of them, as `Extraction.from_latents` makes it."""


def draw_features(draw: Draw, see: See, requests: Requests, batch_size: int, first: int = 0) -> Iterator[Part]:
    """Yield the features of the images of `requests` from number `first` on, batch by batch.

    One batch is drawn while the features of the one before are copied to the host, so the devices do not wait for it.
    """
    pending: collections.deque[tuple[range, Samples, list[Seen]]] = collections.deque()
    for start in range(first, len(requests), batch_size):
        numbers = range(start, min(start + batch_size, len(requests)))
        padded = [*numbers, *[numbers[-1]] * (batch_size - len(numbers))]
        samples = draw(np.asarray(padded, np.int32), *requests.encode(padded))
        pending.append((numbers, samples, see(samples.latents)))
        if len(pending) > 1:
            yield _on_host(*pending.popleft())
    for batch in pending:
        yield _on_host(*batch)


def _on_host(numbers: range, samples: Samples, seen: list[Seen]) -> Part:
    features, images = on_host(seen, len(numbers))
    return Part(numbers, features, np.asarray(samples.evaluations)[: len(numbers)], images)


class PartFiles:
    """The features of the images of one point of a sweep, on disk: a file for every `PART_IMAGES` images.

    A part is complete when it has its name. Only the first process reads and writes.
    """

    def __init__(self, folder: Path, names: list[str], count: int, batch_size: int):
        self._folder = folder
        self._names = names
        self._count = count
        self._size = -(-PART_IMAGES // batch_size) * batch_size  # whole batches, so that a resumed run has the same

    def num_images(self) -> int:
        """The number of images whose features are stored, from the first on."""
        return from_first(self._num_stored)

    def _num_stored(self) -> int:
        for start in range(0, self._count, self._size):
            if self._file(start).is_file() and self._read(start) is None:
                logger.warning("%s is damaged: its images are drawn again", self._file(start))
                self._file(start).unlink()
            if not self._file(start).is_file():
                return start
        return self._count

    def add(self, batches: Iterator[Part]) -> Iterator[Part]:
        """Store the batches, which begin at `num_images()`, part by part; yield each."""
        collected: list[Part] = []
        for batch in batches:
            yield batch
            collected.append(batch._replace(images=None))
            if (end := batch.numbers.stop) % self._size == 0 or end == self._count:
                self._write(joined(collected))
                collected = []

    def read(self) -> Part:
        """All features."""
        parts = [self._read(start) for start in range(0, self._count, self._size)]
        assert all(part is not None for part in parts)
        return joined([part for part in parts if part is not None])

    def remove(self) -> None:
        """Remove the files."""
        if jax.process_index() == 0:
            for start in range(0, self._count, self._size):
                self._file(start).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # files of others, other points
                self._folder.rmdir()
                self._folder.parent.rmdir()

    def _file(self, start: int) -> Path:
        return self._folder / f"{start:08d}.safetensors"

    def _write(self, part: Part) -> None:
        if jax.process_index() != 0:
            return
        tensors = {"evaluations": part.evaluations}
        for name, (features, logits) in part.features.items():
            tensors |= {f"{name}.features": features} | ({} if logits is None else {f"{name}.logits": logits})
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._file(part.numbers.start)
        unfinished = file.with_suffix(".unfinished")
        safetensors.numpy.save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, unfinished)
        os.replace(unfinished, file)

    def _read(self, start: int) -> Part | None:
        """A part; None if its file is damaged."""
        numbers = range(start, min(start + self._size, self._count))
        try:
            tensors = safetensors.numpy.load_file(self._file(start))
            features = {
                name: Extracted(tensors[f"{name}.features"], tensors.get(f"{name}.logits")) for name in self._names
            }
            part = Part(numbers, features, tensors["evaluations"])
        except (OSError, KeyError, ValueError, safetensors.SafetensorError):
            return None
        is_whole = all(len(array) == len(numbers) for array in jax.tree.leaves((part.features, part.evaluations)))
        return part if is_whole else None


def joined(parts: list[Part]) -> Part:
    """Consecutive parts as one."""
    numbers = range(parts[0].numbers.start, parts[-1].numbers.stop)
    features = jax.tree.map(lambda *arrays: np.concatenate(arrays), *[part.features for part in parts])
    return Part(numbers, features, np.concatenate([part.evaluations for part in parts]))


def feature_sets(part: Part) -> dict[str, FeatureSet]:
    """The features of all images of a point as the scores take them."""
    return {
        name: feature_set(np.asarray(found.features), None if found.logits is None else np.asarray(found.logits))
        for name, found in part.features.items()
    }


def generate(draw: Draw, see: See, requests: Requests, files: PartFiles, batch_size: int) -> Iterator[Part]:
    """Draw the images whose features are not stored yet, store the features, and yield each batch. Shows progress."""
    stored = files.num_images()
    with progress_bar("drawing", "images", len(requests), len(requests) - stored) as progress:
        for part in files.add(draw_features(draw, see, requests, batch_size, stored)):
            yield part
            progress.update(len(part.numbers))
