"""Loading pretrained networks from Hugging Face folders (`config.json` and safetensors) into Equinox modules, without
torch.

A network is built as shapes only and then filled from the files by key: a parameter's path in the module tree is its
key. All files are untrusted: JSON and safetensors hold data only, and an index cannot point outside its folder.
"""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from jax.sharding import Sharding
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

from flowdit import json_input
from flowdit.arrays import check_arrays, shape_text
from flowdit.errors import first_line
from flowdit.fields import FieldError, listed, require, shown


def find_folder(
    field: str,
    name: str | Path,
    *,
    stem: str,
    embedded: Mapping[str, Path] | None = None,
    subfolder: str = "",
    also: Sequence[str] = (),
) -> Path:
    """Find the local folder of a network, or download it from the hub.

    Args:
        field: name of the setting, for the error message.
        name: a key of `embedded`, a local folder, or a Hugging Face hub id, tried in this order.
        stem: the weights' file name up to `.safetensors` or `-00001-of-00002.safetensors`.
        embedded: networks that are part of the package.
        subfolder: the network's folder in a pipeline; used if it holds a `config.json`.
        also: files to download in addition to `config.json` and the weights.

    Raises:
        FieldError: no such folder, and not found on the hub, or the hub cannot be reached.
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
    except Exception as error:  # the client raises the errors of its HTTP library
        reason = first_line(error)
        problem = f"must be {accepted}, got {name!r} ({type(error).__name__}: {reason})"
        raise FieldError(field, problem) from error


def _every_key(key: str) -> bool:
    return True


def find_weights(
    folder: Path, stem: str, wanted: Callable[[str], bool] = _every_key, suffix: str = ".safetensors"
) -> list[Path]:
    """Find the weight files in a folder, sorted: the single one, or the shards listed in its index.

    Only shards that hold a tensor whose key is `wanted` are returned; the others need not exist.

    Raises:
        ValueError: neither exists, or the index lists something that is not a file in its folder.
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
        raise ValueError(f"{index}: weight_map must name files in its folder, not {shown(name)}")
    return index.parent / name


def read_json(file: Path) -> dict[str, Any]:
    """Read the object in a JSON file. Raises `ValueError` naming the file if there is none."""
    content = json_input.read_json(file)
    if not isinstance(content, dict):
        raise ValueError(f"{file}: must hold a JSON object, got {shown(content)}")
    return content


def read_shapes(files: Sequence[Path], wanted: Callable[[str], bool] = _every_key) -> dict[str, tuple[int, ...]]:
    """Read the shapes of the tensors whose key is `wanted`, from the headers of safetensors files.

    Raises:
        ValueError: naming a file that is truncated or not a safetensors file.
    """
    return _read(files, wanted, lambda stored, key: tuple(stored.get_slice(key).get_shape()))


def read_tensors(files: Sequence[Path], wanted: Callable[[str], bool] = _every_key) -> dict[str, np.ndarray]:
    """Read the tensors whose key is `wanted` from safetensors files into host memory; the others are not read.

    Raises:
        ValueError: naming a file that is truncated, not a safetensors file, or has a dtype that numpy does not support,
            or a tensor with NaN or infinity.
    """
    tensors = _read(files, wanted, lambda stored, key: stored.get_tensor(key))
    check_finite(tensors, files[0].parent if len(files) > 1 else files[0])
    return tensors


def _read(files: Sequence[Path], wanted: Callable[[str], bool], get: Callable[[Any, str], Any]) -> dict[str, Any]:
    found = {}
    for file in files:
        try:
            # numpy supports bfloat16 because JAX registers it.
            with safetensors.safe_open(file, framework="np") as stored:
                found |= {key: get(stored, key) for key in stored.keys() if wanted(key)}  # noqa: SIM118
        except (OSError, safetensors.SafetensorError, TypeError, AttributeError) as error:
            raise ValueError(f"{file}: not a readable safetensors file ({error})") from error
    return found


def numbers_after(prefix: str, keys: Iterable[str]) -> set[str]:
    """The parts of the keys between `prefix` and the next dot, as strings: "0", "1", ... for a list.

    Their number is bounded by the file size, the largest number is not.
    """
    return {key.removeprefix(prefix).partition(".")[0] for key in keys if key.startswith(prefix)}


def check_sizes(config: Any, names: Iterable[str], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise `FieldError` naming the first of the sizes in `config` that is larger than every axis of the tensors."""
    largest = max((size for shape in shapes.values() if 0 not in shape for size in shape), default=0)
    for name in names:
        value = getattr(config, name)
        is_found = (max(value) if isinstance(value, tuple) else value) <= largest
        require(name, value, is_found, f"must be at most {largest}, the largest size of a tensor")


def check_finite(tensors: Mapping[str, np.ndarray], source: str | Path) -> None:
    """Raise `ValueError` naming the tensors that hold NaN or infinity: such a network only computes NaN."""
    broken = [name for name, tensor in tensors.items() if not _is_finite(tensor)]
    if broken:
        raise ValueError(f"{source}: tensors must hold finite numbers, but NaN or infinity is in {listed(broken)}")


def _is_finite(tensor: np.ndarray, step: int = 1 << 24) -> bool:
    # In pieces, as the result of `isfinite` takes memory too.
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
    """Fill the module `shapes` with parameters from `tensors`, by path and cast to `dtype`.

    `tensors` is emptied in the process, so that host memory never holds the network twice. With `shardings`, a tree
    like `shapes`, each device gets only its part of a parameter.

    Raises:
        ValueError: naming `source`, with the number of tensors that are missing, unexpected, or of another shape.
    """
    check_tensors(shapes, tensors, source=source)

    def place(path: tuple, leaf: jax.ShapeDtypeStruct, sharding: Sharding | None = None) -> Array:
        # Reshaped and cast in host memory, where a new shape needs no compilation.
        value = tensors.pop(_key(path)).reshape(leaf.shape).astype(dtype, copy=False)
        if sharding is None:
            return jnp.asarray(value)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: value[index])

    return jax.tree_util.tree_map_with_path(place, shapes, *([] if shardings is None else [shardings]))


def with_single_layers(shapes: PyTree, path: str, depth: int) -> PyTree:
    """The tree `shapes` with the stacked layers at `path` as in the files, one by one, so that errors have their keys."""
    where = operator.attrgetter(path)
    layer = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), where(shapes))
    return eqx.tree_at(where, shapes, [layer] * depth)


def stack_layers(tensors: dict[str, np.ndarray], path: str, depth: int) -> None:
    """Replace `<path>.<i>.<name>` by a stacked `<path>.<name>`, one name at a time to save memory."""
    first = f"{path}.0."
    for name in [key.removeprefix(first) for key in tensors if key.startswith(first)]:
        tensors[f"{path}.{name}"] = np.stack([tensors.pop(f"{path}.{i}.{name}") for i in range(depth)])


def check_tensors(shapes: PyTree[jax.ShapeDtypeStruct], tensors: Mapping[str, np.ndarray], *, source: Path) -> None:
    """Raise `ValueError` listing all errors unless `tensors` are the parameters of `shapes` by path and shape."""
    parameters = {_key(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)}
    wanted = {key: f"float{shape_text(_stored_shape(key, leaf))}" for key, leaf in parameters.items()}
    check_arrays(wanted, {key: _described(tensor) for key, tensor in tensors.items()}, source)


def _key(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _described(tensor: np.ndarray) -> str:
    dtype = "float" if jnp.issubdtype(tensor.dtype, jnp.floating) else tensor.dtype
    return f"{dtype}{shape_text(tensor.shape)}"


def _stored_shape(key: str, parameter: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    # Equinox stores the bias of a convolution as (channels, 1, 1), the files as (channels,).
    is_convolution = key.endswith(".bias") and parameter.shape[1:] == (1, 1)
    return parameter.shape[:1] if is_convolution else parameter.shape
