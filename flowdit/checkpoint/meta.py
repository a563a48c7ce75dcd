"""Metadata of a checkpoint: the `meta` item, read only after all files are verified."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import secrets
from collections.abc import Sequence
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from flowdit.checkpoint.files import CheckpointError, verify_files
from flowdit.conditioning import Conditioning
from flowdit.config import Config
from flowdit.data.manifest import Manifest
from flowdit.errors import first_line

FORMAT = 1


def read_meta(step_folder: epath.PathLike) -> dict[str, Any]:
    """Verify all files of a checkpoint and read its metadata.

    Raises `CheckpointError` if it is not a flowdit checkpoint of a known format, `DamagedCheckpoint` if its files
    changed.
    """
    step_folder = epath.Path(step_folder)
    if not (step_folder / "meta").is_dir():
        raise CheckpointError(f"{step_folder}: not a checkpoint folder (expected checkpoints/<step>)")
    verify_files(step_folder)
    return verified_meta(step_folder)


def verified_meta(step_folder: epath.Path) -> dict[str, Any]:
    """Read the metadata of an already verified checkpoint. Raises `CheckpointError` for another format."""
    try:
        meta = read_json_item(step_folder / "meta")
    except Exception as problem:
        raise CheckpointError(f"{step_folder}: metadata cannot be read: {first_line(problem)}") from problem
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        found = meta.get("format") if isinstance(meta, dict) else None
        raise CheckpointError(f"{step_folder}: checkpoint format must be {FORMAT}, got {found}")
    return meta


def read_json_item(item_folder: epath.Path) -> Any:
    """Read a JSON item."""
    # The handler directly: a checkpointer waits for all processes, but only the first one reads metadata.
    return ocp.JsonCheckpointHandler().restore(item_folder)


def run_meta(
    config: Config,
    manifest: Manifest,
    conditioning: Conditioning,
    mean: Sequence[float],
    scale: Sequence[float],
) -> dict[str, Any]:
    """Metadata for a checkpoint, enough to sample from it and to refuse a resume that would not be exact."""
    packages = ("flowdit", "jax", "equinox", "optax", "orbax-checkpoint", "grain")
    return {
        "config": dataclasses.asdict(config),
        "manifest": dataclasses.asdict(manifest),
        "manifest_id": manifest.id,
        "latent_mean": list(mean),
        "latent_scale": list(scale),
        **conditioning.describe(),
        "run_id": secrets.token_hex(4),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in packages}},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "source"
