"""The features of a reference, computed once and kept by the content of the reference and of the network."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import Int

from flowdit.data.progress import progress_bar
from flowdit.errors import first_line
from flowdit.features.base import Extracted, FeatureNetwork
from flowdit.fields import FieldError, require
from flowdit.hashing import fingerprint, sha256
from flowdit.scores.feature_set import FeatureSet
from flowdit.scores.moments import Moments, merge, moments_of
from flowdit.scores.references import Images, Reference

logger = logging.getLogger(__name__)

MAX_KEPT = 50_000
"""Images whose features are kept, evenly spread over the reference; the moments are those of all images."""
MERGED = 2_048
"""Images whose moments are added at once."""
STATISTICS_OF = "inception"
"""The network whose statistics `.npz` files hold."""

Extract = Callable[[Images], Extracted]


def check_statistics(reference: Reference, network: FeatureNetwork) -> None:
    """Raise `FieldError` if only statistics are known, and not those of this network."""
    if reference.statistics is None or (network.name != STATISTICS_OF and reference.images is not None):
        return
    rule = f"must be {STATISTICS_OF} alone: the reference holds only statistics of its features, no images"
    require("features", network.name, network.name == STATISTICS_OF, rule)
    width = len(reference.statistics.mean)
    rule = f"must have statistics of {network.width} features, as {network.name} has"
    require("reference", width, width == network.width, rule)


def reference_features(
    reference: Reference, network: FeatureNetwork, extract: Extract, cache: Path, batch_size: int = 32
) -> FeatureSet:
    """The features of a reference, read from the folder `cache` or computed and written there.

    `extract` gets `batch_size` images each time, and must not wait for other processes: each reads or computes them by
    itself. A damaged file is computed again, with a warning; if the folder cannot be written, there is a warning too.
    Raises `FieldError` for statistics of another network, `ValueError` for images that cannot be read.
    """
    check_statistics(reference, network)
    statistics = reference.statistics if network.name == STATISTICS_OF else None
    if reference.images is None:
        assert statistics is not None
        return FeatureSet(statistics)
    identity = f"{reference.identity}; {network.identity}; {MAX_KEPT} kept"
    file = cache / f"{fingerprint(identity)}.safetensors"
    found = _read(file, identity)
    if found is None:
        found = _compute(reference, extract, batch_size)
        _write(file, identity, found)
    return found if statistics is None else found._replace(moments=statistics)


def kept_rows(count: int) -> Int[np.ndarray, " kept"]:
    """The images, of `count`, whose features are in the set of a reference."""
    kept = min(count, MAX_KEPT)
    return np.arange(kept) * count // max(kept, 1)


def _compute(reference: Reference, extract: Extract, batch_size: int) -> FeatureSet:
    assert reference.images is not None
    count = reference.count
    kept = kept_rows(count)
    features: list[np.ndarray] = []
    logits: list[np.ndarray] = []
    moments: Moments | None = None
    waiting: list[np.ndarray] = []
    first = 0
    with progress_bar("features of the reference", "images", count, count) as progress:
        for images in reference.images(batch_size):
            padded = np.pad(images, ((0, batch_size - len(images)), (0, 0), (0, 0), (0, 0)))  # one compilation
            extracted = extract(padded)
            batch = np.asarray(extracted.features, np.float32)[: len(images)]
            waiting.append(batch)
            if sum(map(len, waiting)) >= MERGED or first + len(batch) == count:  # a merge costs as much as many batches
                found = moments_of(np.concatenate(waiting))
                moments = found if moments is None else merge(moments, found)
                waiting = []
            rows = kept[(kept >= first) & (kept < first + len(images))] - first
            features.append(batch[rows])
            if extracted.logits is not None:
                logits.append(np.asarray(extracted.logits, np.float32)[rows])
            first += len(images)
            progress.update(len(images))
    if moments is None or first != count:
        raise FieldError("reference", f"must have {count} images, got {first}")
    return FeatureSet(moments, np.concatenate(features), np.concatenate(logits) if logits else None)


def _write(file: Path, identity: str, found: FeatureSet) -> None:
    """Write the file atomically, unless another process has."""
    tensors: dict[str, Any] = {"mean": found.moments.mean, "covariance": found.moments.covariance}
    tensors |= {name: getattr(found, name) for name in ("features", "logits") if getattr(found, name) is not None}
    metadata = {"identity": identity, "count": str(found.moments.count), "sha256": _digest(tensors)}
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        safetensors.numpy.save_file(tensors, temporary, metadata)
        temporary.replace(file)
    except (OSError, safetensors.SafetensorError) as error:
        logger.warning("%s cannot be written, so the next run computes the features again: %s", file, first_line(error))
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _read(file: Path, identity: str) -> FeatureSet | None:
    """The content of a file; None if there is none, or, with a warning, if it is damaged."""
    if not file.is_file():
        return None
    try:
        with safetensors.safe_open(file, framework="np") as stored:
            metadata = stored.metadata() or {}
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - no dict
        require("identity", metadata.get("identity"), metadata.get("identity") == identity, f"must be {identity}")
        require("sha256", metadata.get("sha256"), metadata.get("sha256") == _digest(tensors), "must be the content's")
        moments = Moments(int(metadata["count"]), tensors["mean"], tensors["covariance"])
        return FeatureSet(moments, tensors["features"], tensors.get("logits"))
    except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
        logger.warning("%s is damaged, so the features are computed again: %s", file, first_line(error))
        return None


def _digest(tensors: dict[str, np.ndarray]) -> str:
    """A hash of the content, which shows damage."""
    return sha256(part for name in sorted(tensors) for part in (name.encode(), tensors[name].tobytes()))
