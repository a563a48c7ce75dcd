"""Comparing the arrays of a file with those of a model, by name, shape and dtype."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from flowdit.fields import listed


def check_arrays(wanted: Mapping[str, str], found: Mapping[str, str], source: Any) -> None:
    """Raise `ValueError` naming `source`, with the number and first names of arrays that differ.

    Args:
        wanted: the arrays of the model by name, described by shape (`shape_text`) or dtype and shape.
        found: those of the file, described in the same way.
        source: the file or folder.
    """
    common = sorted(wanted.keys() & found.keys())
    faults = {
        "missing": sorted(wanted.keys() - found.keys()),
        "unexpected": sorted(found.keys() - wanted.keys()),
        "different": [f"{name} {found[name]} for {wanted[name]}" for name in common if found[name] != wanted[name]],
    }
    told = [f"{len(names)} {fault}: {listed(names)}" for fault, names in faults.items() if names]
    if told:
        raise ValueError(f"{source}: arrays must be those of the model, but {'; '.join(told)}")


def shape_text(shape: Iterable[int]) -> str:
    """A shape for `check_arrays`, such as "[8, 8]"."""
    return str(list(shape))
