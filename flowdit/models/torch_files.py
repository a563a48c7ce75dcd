"""Reading tensors from PyTorch files (`.pt`, `.pth`, `.bin`) without running code from them.

Such a file is a pickle. `torch.load(weights_only=True)` reads it with an unpickler that accepts only tensors and plain
containers; `argparse.Namespace`, which holds the arguments of DiT and SiT, is allowed because it has only attributes.
torch is an optional extra, and only this module imports it.
"""

from __future__ import annotations

import argparse
import logging
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from flowdit.errors import first_line
from flowdit.fields import shown
from flowdit.models.pretrained import check_finite

logger = logging.getLogger(__name__)

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
# The entries with the weights in training checkpoints: of DiT and SiT, then of PixArt.
ENTRIES = {"ema": ("ema", "state_dict_ema"), "model": ("model", "state_dict")}


class TorchFile(NamedTuple):
    """Tensors by name, on the host, and the arguments of the training run if the file holds them."""

    tensors: dict[str, np.ndarray]
    arguments: dict[str, Any]


def read_torch_file(file: Path, weights: str) -> TorchFile:
    """Read tensors by name; from a training checkpoint the tensors of `weights` ("ema" or "model").

    Raises `ValueError` naming the file if it is damaged, would import something, does not hold tensors by name, or
    would take more memory than its size.
    """
    try:
        import torch
    except ImportError:
        raise ValueError(f"{file} needs torch: pip install 'flowdit[interop]'") from None
    try:
        is_zip = _is_zip(file)
        if is_zip:
            _check_stored(file)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as problem:  # pickle, zip and torch raise different types
        raise ValueError(f"{file} must hold tensors only: {_reason(problem)}") from None
    tensors = _choose(file, content, weights)
    if unnamed := [name for name in tensors if not isinstance(name, str)]:
        raise ValueError(f"{file} must hold tensors by name, it has the key {shown(unnamed[0])}")
    wrong = [name for name, tensor in tensors.items() if not isinstance(tensor, torch.Tensor)]
    if wrong:
        raise ValueError(f"{file} must hold tensors by name, {shown(wrong[0])} is {type(tensors[wrong[0]]).__name__}")
    _check_memory(file, tensors, torch.strided)
    arguments = content.get("args") if tensors is not content else None
    arrays = {_plain_name(name): _to_numpy(file, name, tensor, torch.int16) for name, tensor in tensors.items()}
    check_finite(arrays, str(file))
    return TorchFile(arrays, vars(arguments) if isinstance(arguments, argparse.Namespace) else {})


def _check_stored(file: Path) -> None:
    """Raise `ValueError` for a compressed entry, which torch never writes and which may expand a thousandfold."""
    with zipfile.ZipFile(file) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("a compressed entry")


def _check_memory(file: Path, tensors: dict[str, Any], strided: Any) -> None:
    """Raise `ValueError` for tensors with more elements than the file holds, through strides of 0 or shared storage.

    The blocks of a diffusers model may share one embedder, which is one tensor in memory.
    """
    stored, claimed = {}, 0
    for name, tensor in tensors.items():
        if tensor.layout != strided or tensor.device.type != "cpu":
            raise ValueError(f"{file} must hold dense CPU tensors, {shown(name)} is not one")
        storage, size = tensor.untyped_storage(), tensor.numel() * tensor.element_size()
        if size > storage.nbytes():
            raise ValueError(f"{file}: {shown(name)} must not be longer than its storage")
        stored[storage.data_ptr()] = storage.nbytes()
        is_shared_embedder = ".norm1.emb." in name and tensor.is_contiguous()
        claimed += 0 if is_shared_embedder else size
    if claimed > sum(stored.values()):
        raise ValueError(f"{file} must hold each tensor once, several of them share memory")


def _is_zip(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(2) == b"PK"


def _reason(problem: Exception) -> str:
    """The line with the refused name; torch's advice to switch off the protection is left out."""
    lines = (line.strip() for line in str(problem).splitlines())
    refused = (line for line in lines if "Unsupported" in line or "GLOBAL" in line)
    return next(refused, first_line(problem))[:200]


def _choose(file: Path, content: Any, weights: str) -> dict[Any, Any]:
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold tensors by name, it holds {type(content).__name__}")
    found = {
        kind: next((n for n in names if isinstance(content.get(n), dict)), None) for kind, names in ENTRIES.items()
    }
    if not any(found.values()):
        return content
    kind = weights if found[weights] else next(kind for kind, name in found.items() if name)
    if kind != weights:
        logger.warning("%s holds no %s weights; its %r is used", file, weights, found[kind])
    return content[found[kind]]


def _plain_name(name: str) -> str:
    """Remove the prefixes added by DistributedDataParallel and torch.compile."""
    return name.removeprefix("module.").removeprefix("_orig_mod.")


def _to_numpy(file: Path, name: str, tensor: Any, int16: Any) -> np.ndarray:
    tensor = tensor.detach().contiguous()
    if str(tensor.dtype) == "torch.bfloat16":  # torch cannot convert to the bfloat16 that JAX adds to numpy
        return tensor.view(int16).numpy().view(jnp.bfloat16)
    try:
        return tensor.numpy()
    except (TypeError, RuntimeError):
        raise ValueError(f"{file}: {shown(name)} must have a numpy dtype, got {tensor.dtype}") from None
