"""Pretrained networks from Hugging Face folders (`config.json` and safetensors) into Equinox modules, without torch.

A network is built as shapes alone and then filled from the files by key: a parameter's path in the module tree is its
key. Every file read here is untrusted: JSON and safetensors hold data only, and an index cannot lead out of its folder.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from jax.sharding import Sharding
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

from flowdit.fields import FieldError, shortened, shown


def listed(names: Sequence[str], limit: int = 5) -> str:
    """The first names of a list for an error message, which a damaged file could make millions of characters long.

    "a, b, c, d, e ... and 484 more"; a long name is cut, and one with line breaks or control characters quoted.
    """
    first = ", ".join(shortened(name if name.isprintable() else repr(name)) for name in names[:limit])
    return f"{first} ... and {len(names) - limit} more" if len(names) > limit else first


def find_folder(
    field: str,
    name: str | Path,
    *,
    stem: str,
    embedded: Mapping[str, Path] | None = None,
    subfolder: str = "",
    also: Sequence[str] = (),
) -> Path:
    """The local folder of a network, downloaded from the hub where needed.

    Args:
        field: what the caller calls the setting, for the error message.
        name: a key of `embedded`, a local folder, or a Hugging Face hub id, looked for in this order.
        stem: the weights' file name up to `.safetensors` or `-00001-of-00002.safetensors`.
        embedded: networks that ship with the package.
        subfolder: where a pipeline keeps this network; used where it holds a `config.json`.
        also: further files to download beside `config.json` and the weights.

    Raises:
        FieldError: no such folder, and the hub does not have the name or cannot be reached.
    """
    embedded = embedded or {}
    folder = embedded[name] if isinstance(name, str) and name in embedded else Path(name)
    if not folder.is_dir():
        weights = [f"{stem}.safetensors", f"{stem}.safetensors.index.json", f"{stem}-*-of-*.safetensors"]
        files = ["config.json", *weights, *also]
        nested = [f"{subfolder}/{file}" for file in files] if subfolder else []
        accepted = ", ".join([*map(repr, embedded), "an existing folder or a reachable Hugging Face hub id"])
        folder = _download(field, str(name), [*files, *nested], accepted)
    return folder / subfolder if (folder / subfolder / "config.json").is_file() else folder


def _download(field: str, name: str, patterns: list[str], accepted: str) -> Path:
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # The client lets the errors of its HTTP library through, whichever that is.
        reason = str(error).strip().partition("\n")[0]
        problem = f"must be {accepted}, got {name!r} ({type(error).__name__}: {reason})"
        raise FieldError(field, problem) from error


def _every_key(key: str) -> bool:
    return True


def find_weights(
    folder: Path, stem: str, wanted: Callable[[str], bool] = _every_key, suffix: str = ".safetensors"
) -> list[Path]:
    """The files of weights in a folder, sorted: the single one, or the shards that its index lists.

    Of shards, those alone that hold a tensor whose key is `wanted`: the others need not be there.

    Raises:
        ValueError: neither is there, or the index names something that is not a file beside it.
    """
    single, index = folder / f"{stem}{suffix}", folder / f"{stem}{suffix}.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise ValueError(f"{folder}: must hold {single.name} or {index.name}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: weight_map must map tensors to files, not {shown(weight_map)}")
    return sorted({_shard(index, name) for key, name in weight_map.items() if wanted(key)})


def _shard(index: Path, name: Any) -> Path:
    if not isinstance(name, str) or Path(name).name != name or not (index.parent / name).is_file():
        raise ValueError(f"{index}: weight_map must name files beside it, not {shown(name)}")
    return index.parent / name


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; `ValueError` naming the file where there is none."""
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not a readable JSON file ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: must hold a JSON object, not {type(content).__name__}")
    return content


def read_shapes(files: Sequence[Path], wanted: Callable[[str], bool] = _every_key) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors of some safetensors files whose key is `wanted`, from the files' headers alone.

    Raises:
        ValueError: naming a file that is truncated or something else.
    """
    return _read(files, wanted, lambda stored, key: tuple(stored.get_slice(key).get_shape()))


def read_tensors(files: Sequence[Path], wanted: Callable[[str], bool] = _every_key) -> dict[str, np.ndarray]:
    """The tensors of some safetensors files whose key is `wanted`, in host memory; the others are not read.

    Raises:
        ValueError: naming a file that is truncated, something else, or of a dtype that numpy does not have, or a tensor
            that holds NaN or infinity.
    """
    tensors = _read(files, wanted, lambda stored, key: stored.get_tensor(key))
    check_finite(tensors, files[0].parent if len(files) > 1 else files[0])
    return tensors


def _read(files: Sequence[Path], wanted: Callable[[str], bool], get: Callable[[Any, str], Any]) -> dict[str, Any]:
    found = {}
    for file in files:
        try:
            # numpy knows bfloat16 by name because JAX registers it.
            with safetensors.safe_open(file, framework="np") as stored:
                found |= {key: get(stored, key) for key in stored.keys() if wanted(key)}  # noqa: SIM118
        except (OSError, safetensors.SafetensorError, TypeError, AttributeError) as error:
            raise ValueError(f"{file}: not a readable safetensors file ({error})") from error
    return found


def numbers_after(prefix: str, keys: Iterable[str]) -> set[str]:
    """What stands in the keys between `prefix` and the next dot: "0", "1" and so on, as text, for those of a list.

    How many there are is bounded by the file; the largest of them is not.
    """
    return {key.removeprefix(prefix).partition(".")[0] for key in keys if key.startswith(prefix)}


def check_finite(tensors: Mapping[str, np.ndarray], source: str | Path) -> None:
    """Raise `ValueError` naming the tensors that hold NaN or infinity: a network with one of them computes only NaN."""
    broken = [name for name, tensor in tensors.items() if not _is_finite(tensor)]
    if broken:
        raise ValueError(f"{source}: tensors must hold finite numbers, but NaN or infinity is in {listed(broken)}")


def _is_finite(tensor: np.ndarray, step: int = 1 << 24) -> bool:
    # In pieces: the answer for each number takes memory too.
    flat = tensor.reshape(-1)
    return all(bool(np.isfinite(flat[i : i + step]).all()) for i in range(0, flat.size, step))


def fill(
    shapes: PyTree[jax.ShapeDtypeStruct],
    tensors: dict[str, np.ndarray],
    dtype: DTypeLike,
    *,
    source: Path,
    shardings: PyTree[Sharding] | None = None,
) -> PyTree[Array]:
    """The module `shapes` with each parameter taken from `tensors` by its path and cast to `dtype`.

    `tensors` is emptied on the way, so that host memory never holds the network twice. With `shardings`, a tree like
    `shapes`, a device gets its own part of a parameter and nothing else.

    Raises:
        ValueError: telling how many tensors are missing, unexpected, or of another shape, with `source` named.
    """
    check_tensors(shapes, tensors, source=source)

    def place(path: tuple, leaf: jax.ShapeDtypeStruct, sharding: Sharding | None = None) -> Array:
        # Reshaped and cast in host memory, where a new shape does not cost a compilation.
        value = tensors.pop(_key(path)).reshape(leaf.shape).astype(dtype, copy=False)
        if sharding is None:
            return jnp.asarray(value)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: value[index])

    return jax.tree_util.tree_map_with_path(place, shapes, *([] if shardings is None else [shardings]))


def check_tensors(shapes: PyTree[jax.ShapeDtypeStruct], tensors: Mapping[str, np.ndarray], *, source: Path) -> None:
    """Raise `ValueError`, telling all faults, unless `tensors` are the parameters of `shapes` by path and shape."""
    parameters = {_key(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)}
    faults = {
        "missing": sorted(parameters.keys() - tensors.keys()),
        "unexpected": sorted(tensors.keys() - parameters.keys()),
        "of the wrong shape or type": _misfits(parameters, tensors),
    }
    found = [f"{len(keys)} {fault}: {listed(keys)}" for fault, keys in faults.items() if keys]
    if found:
        raise ValueError(f"{source}: tensors must match config.json, but {'; '.join(found)}")


def _key(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _misfits(parameters: Mapping[str, jax.ShapeDtypeStruct], tensors: Mapping[str, np.ndarray]) -> list[str]:
    shapes = {key: _stored_shape(key, parameters[key]) for key in sorted(parameters.keys() & tensors.keys())}
    return [
        f"{key} ({tensors[key].dtype}{list(tensors[key].shape)} for float{list(shape)})"
        for key, shape in shapes.items()
        if tensors[key].shape != shape or not jnp.issubdtype(tensors[key].dtype, jnp.floating)
    ]


def _stored_shape(key: str, parameter: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    # Equinox keeps the bias of a convolution as (channels, 1, 1), the files as (channels,).
    return parameter.shape[:1] if key.endswith(".bias") else parameter.shape
