"""Aspect buckets: the sizes to which images of different aspect ratios are cropped, all of about the same area."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from flowdit.data.manifest import Bucket
from flowdit.fields import require

KINDS = ("pixart", "computed")
RATIOS = [0.25, 0.333, 0.5, 0.667, 0.75, 1.0, 1.333, 1.5, 2.0, 3.0, 4.0]
"""Height / width of computed buckets."""
PIXART = (
    *((8, 32), (8, 31), (8, 30), (8, 29), (9, 28), (9, 27), (9, 26), (10, 25), (10, 24), (11, 23)),
    *((11, 22), (11, 21), (12, 21), (12, 20), (13, 19), (13, 18), (14, 18), (14, 17), (15, 17), (15, 16)),
    *((16, 16), (16, 15), (17, 15), (17, 14), (18, 14), (18, 13), (19, 13), (20, 12), (21, 12), (22, 11)),
    *((23, 11), (24, 10), (25, 10), (26, 9), (27, 9), (28, 9), (29, 8), (30, 8), (31, 8), (32, 8)),
)
"""(height, width) of PixArt's 40 buckets in sixteenths of the side of a square image; its tables for 256, 512 and 1024
pixels are multiples of one another."""


def make_buckets(
    kind: str | None, image_size: int, stride: int, multiple: int | None, ratios: Sequence[float]
) -> tuple[Bucket, ...]:
    """The buckets of a kind, wide ones first; () for None.

    `stride` is the VAE's, `multiple` that of the sides of computed buckets, twice the stride if None. Raises
    `FieldError` if the sizes do not fit the VAE.
    """
    if kind is None:
        return ()
    if kind == "pixart":
        unit = 16 * stride
        require("image_size", image_size, image_size % unit == 0, f"must be a multiple of {unit} for buckets=pixart")
        return tuple(Bucket(image_size // 16 * height, image_size // 16 * width) for height, width in PIXART)
    multiple = multiple or 2 * stride
    rule = f"must be a multiple of the VAE's stride {stride}"
    require("bucket_multiple", multiple, multiple % stride == 0, rule)
    sizes = {_sides(image_size, ratio, multiple): None for ratio in sorted(ratios)}
    return tuple(Bucket(height, width) for height, width in sizes)


def _sides(image_size: int, ratio: float, multiple: int) -> tuple[int, int]:
    sides = (image_size * math.sqrt(ratio), image_size / math.sqrt(ratio))
    height, width = (multiple * max(1, round(side / multiple)) for side in sides)
    return height, width


def nearest(sizes: Int[np.ndarray, "n 2"], buckets: Sequence[Bucket]) -> Int[np.ndarray, " n"]:
    """The bucket of each image size (height, width): the one of the nearest aspect ratio, on a logarithmic scale."""
    if not buckets:
        return np.zeros(len(sizes), int)
    wanted = _log_ratios(np.array([(bucket.height, bucket.width) for bucket in buckets]))
    found = _log_ratios(sizes)
    order = np.argsort(wanted, kind="stable")
    limits = (wanted[order][1:] + wanted[order][:-1]) / 2
    return order[np.searchsorted(limits, found)]


def merged(buckets: Sequence[Bucket], counts: Sequence[int], minimum: int) -> Int[np.ndarray, " buckets"]:
    """For each bucket the number of the one that gets its images: the nearest with at least `minimum` of its own.

    If none has, the largest gets all.
    """
    if not buckets:
        return np.zeros(1, int)
    large = [i for i, count in enumerate(counts) if count >= max(minimum, 1)] or [int(np.argmax(counts))]
    ratios = _log_ratios(np.array([(bucket.height, bucket.width) for bucket in buckets]))
    return np.array([min(large, key=lambda i: abs(ratios[i] - own)) for own in ratios])


def _log_ratios(sizes: Int[np.ndarray, "n 2"]) -> Float[np.ndarray, " n"]:
    return np.log(sizes[:, 0] / sizes[:, 1])
