"""Pretrained networks from Hugging Face folders (`config.json` and safetensors) into Equinox modules, without torch.

A network is built as shapes alone and then filled from the files by key: a parameter's path in the module tree is its
key. Every file read here is untrusted: JSON and safetensors hold data only, and an index cannot lead out of its folder.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.flax
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree


def find_folder(field: str, name: str | Path, *, embedded: Mapping[str, Path], subfolder: str, stem: str) -> Path:
    """The local folder of a network, downloaded from the hub where needed.

    Args:
        field: what the user calls the setting, for the error message.
        name: a key of `embedded`, a local folder, or a Hugging Face hub id, looked for in this order.
        embedded: networks that ship with the package.
        subfolder: where a pipeline keeps this network; used where it holds a `config.json`.
        stem: the weights' file name up to `.safetensors` or `-00001-of-00002.safetensors`.

    Raises:
        ValueError: no such folder, and the hub does not have the name or cannot be reached.
    """
    folder = embedded[name] if isinstance(name, str) and name in embedded else Path(name)
    if not folder.is_dir():
        files = ["config.json", f"{stem}.safetensors", f"{stem}.safetensors.index.json", f"{stem}-*-of-*.safetensors"]
        accepted = ", ".join([*map(repr, embedded), "an existing folder or a reachable Hugging Face hub id"])
        folder = _download(field, str(name), [*files, *(f"{subfolder}/{file}" for file in files)], accepted)
    return folder / subfolder if (folder / subfolder / "config.json").is_file() else folder


def _download(field: str, name: str, patterns: list[str], accepted: str) -> Path:
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # The client lets the errors of its HTTP library through, whichever that is.
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{field} must be {accepted}, not {name!r} ({type(error).__name__}: {reason})") from error


def find_weights(folder: Path, stem: str) -> list[Path]:
    """The safetensors files of a folder, sorted: the single one, or the shards that its index lists.

    Raises:
        ValueError: neither is there, or the index names something that is not a file beside it.
    """
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise ValueError(f"{folder}: must hold {single.name} or {index.name}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: weight_map must map tensors to files, not {weight_map!r}")
    return sorted({_shard(index, name) for name in weight_map.values()})


def _shard(index: Path, name: Any) -> Path:
    if not isinstance(name, str) or Path(name).name != name or not (index.parent / name).is_file():
        raise ValueError(f"{index}: weight_map must name files beside it, not {name!r}")
    return index.parent / name


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; `ValueError` naming the file where there is none."""
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: not a readable JSON file ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: must hold a JSON object, not {type(content).__name__}")
    return content


def read_tensors(files: Sequence[Path]) -> dict[str, Array]:
    """All tensors of some safetensors files by key; `ValueError` naming a file that is truncated or something else."""
    tensors = {}
    for file in files:
        try:
            # As jax arrays ("flax"): numpy, the other choice without torch, has no bfloat16.
            tensors |= safetensors.flax.load_file(file)
        except (OSError, safetensors.SafetensorError) as error:
            raise ValueError(f"{file}: not a readable safetensors file ({error})") from error
    return tensors


def fingerprint(*files: Path) -> str:
    """16 hex digits of a SHA-256 over names and contents of `files`: which network made a set of latents, say."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {_file_digest(file)}\n".encode())
    return digest.hexdigest()[:16]


def _file_digest(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"{file}: not a readable file ({error})") from error


def fill(
    shapes: PyTree[jax.ShapeDtypeStruct], tensors: Mapping[str, Array], dtype: DTypeLike, *, source: Path
) -> PyTree[Array]:
    """The module `shapes` with each parameter taken from `tensors` by its path and cast to `dtype`.

    Raises:
        ValueError: listing every tensor that is missing, unexpected, or of another shape, with `source` named.
    """
    parameters = {_key(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)}
    faults = {
        "missing": sorted(parameters.keys() - tensors.keys()),
        "unexpected": sorted(tensors.keys() - parameters.keys()),
        "of the wrong shape or type": _misfits(parameters, tensors),
    }
    found = [f"{len(keys)} {fault}: {', '.join(keys)}" for fault, keys in faults.items() if keys]
    if found:
        raise ValueError(f"{source}: tensors must match config.json, but {'; '.join(found)}")
    # Reshaped and cast in host memory, where a new shape does not cost a compilation.
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.asarray(np.asarray(tensors[_key(path)]).reshape(leaf.shape).astype(dtype)), shapes
    )


def _key(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _misfits(parameters: Mapping[str, jax.ShapeDtypeStruct], tensors: Mapping[str, Array]) -> list[str]:
    shapes = {key: _stored_shape(key, parameters[key]) for key in sorted(parameters.keys() & tensors.keys())}
    return [
        f"{key} ({tensors[key].dtype}{list(tensors[key].shape)} for float{list(shape)})"
        for key, shape in shapes.items()
        if tensors[key].shape != shape or not jnp.issubdtype(tensors[key].dtype, jnp.floating)
    ]


def _stored_shape(key: str, parameter: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    # Equinox keeps the bias of a convolution as (channels, 1, 1), the files as (channels,).
    return parameter.shape[:1] if key.endswith(".bias") else parameter.shape
