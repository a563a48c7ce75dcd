"""Blocks of rows of a large matrix, such as that of all distances between two sets of images."""

from __future__ import annotations

from collections.abc import Iterator

BLOCK_SIZE = 2**23
"""Elements of a block: 32 MB in float32."""


def row_blocks(rows: int, columns: int) -> Iterator[slice]:
    """Consecutive slices of the rows, so that each block has at most `BLOCK_SIZE` elements (or is one row)."""
    step = max(1, BLOCK_SIZE // max(columns, 1))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))
