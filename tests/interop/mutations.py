"""Every way in which one value or one tensor of a file can be wrong, and what reading the file must then give."""

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from flowdit.checkpoint.files import write_checksums

MISSING = object()
VALUES: dict[str, Any] = {
    "missing": MISSING,
    "null": None,
    "list": [],
    "lists": [["x"], [1]],
    "dict": {},
    "dicts": {"x": {"y": [1]}},
    "string": "x",
    "true": True,
    "false": False,
    "zero": 0,
    "minus one": -1,
    "fraction": 0.5,
    "1e30": 1e30,
    "nan": float("nan"),
    "infinity": float("inf"),
    "huge": 10**40,
    "longer than a float": 10**400,
}
TENSORS: dict[str, Callable[[np.ndarray], np.ndarray | None]] = {
    "missing": lambda x: None,
    "scalar": lambda x: np.zeros((), x.dtype),
    "empty": lambda x: np.zeros(0, x.dtype),
    "empty axes": lambda x: np.zeros((0,) * x.ndim, x.dtype),
    "higher rank": lambda x: x[None],
    "lower rank": lambda x: x.reshape(-1) if x.ndim > 1 else np.asarray(x[0]),
    "one row more": lambda x: np.concatenate([x, x[:1]]),
    "whole numbers": lambda x: np.zeros(x.shape, np.int32),
    "booleans": lambda x: np.zeros(x.shape, bool),
    "double": lambda x: x.astype(np.float64),
    "half": lambda x: x.astype(np.float16),
    "nan": lambda x: np.full_like(x, np.nan),
}
Read = Callable[[], Any]
Write = Callable[[Any], None]


class Mutation(NamedTuple):
    """A change of a file: `apply` writes it. An error must contain one of `names`, if there are any."""

    label: str
    apply: Callable[[], None]
    names: tuple[str, ...]


def problem_of(mutation: Mutation, read: Callable[[Path], Any], path: Path) -> str | None:
    """What is wrong with the outcome of reading a changed file: anything but success or one short line."""
    mutation.apply()
    try:
        read(path)
    except ValueError as error:
        line = str(error)
        faults = {
            "is not one short line": "\n" in line or len(line) > 1_500,
            "does not name the file": str(path) not in line,
            f"names none of {mutation.names}": bool(mutation.names) and not any(n in line for n in mutation.names),
        }
        found = [fault for fault, is_found in faults.items() if is_found]
        return f"{mutation.label}: {', '.join(found)}: {line[:300]}" if found else None
    except BaseException as error:
        return f"{mutation.label}: {type(error).__name__}: {str(error)[:300]}"
    return None


# --- JSON ---


def json_mutations(label: str, read: Read, write: Write) -> list[Mutation]:
    """All changes of one value in JSON data."""
    content = read()

    def mutation(path: tuple[str | int, ...], kind: str) -> Mutation:
        # A missing field has a default, which may be found wrong by another one.
        names = () if kind == "missing" else tuple(part for part in path if isinstance(part, str)) or (label,)
        return Mutation(
            f"{label}: {'.'.join(map(str, path))} {kind}", lambda: write(_changed(content, path, VALUES[kind])), names
        )

    return [mutation(path, kind) for path in _paths(content) for kind in VALUES if path or kind != "missing"]


def _paths(content: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The paths of all values; of a list only the first, of a long dict the first three."""
    yield path
    if isinstance(content, dict):
        for name in list(content)[: 3 if len(content) > 100 else None]:
            yield from _paths(content[name], (*path, name))
    elif isinstance(content, list) and content:
        yield from _paths(content[0], (*path, 0))


def _changed(content: Any, path: tuple[str | int, ...], value: Any) -> Any:
    if not path:
        return value
    content = inner = copy.deepcopy(content)
    for part in path[:-1]:
        inner = inner[part]
    if value is MISSING:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return content


def of_json(file: Path) -> list[Mutation]:
    return json_mutations(file.name, lambda: json.loads(file.read_text()), lambda x: _replace(file, json.dumps(x)))


def of_tokenizer(file: Path) -> list[Mutation]:
    """As `of_json`; the library that reads the file names positions and not fields."""
    return [mutation._replace(names=()) for mutation in of_json(file)]


def of_checkpoint(folder: Path) -> list[Mutation]:
    """Of a checkpoint's metadata, with correct checksums."""
    file = folder / "meta" / "metadata"

    def write(content: Any) -> None:
        _replace(file, json.dumps(content))
        write_checksums(folder)

    return json_mutations("metadata", lambda: json.loads(file.read_text()), write)


def of_header(file: Path) -> list[Mutation]:
    """Of flowdit's metadata in the header of a safetensors file."""
    tensors = safetensors.numpy.load_file(file)

    def read() -> Any:
        with safetensors.safe_open(file, "np") as stored:
            return json.loads(stored.metadata()["flowdit"])

    def write(content: Any) -> None:
        safetensors.numpy.save_file(tensors, file, {"flowdit": json.dumps(content)})

    return json_mutations("metadata", read, write)


def _replace(file: Path, text: str) -> None:
    file.write_text(text)


# --- tensors ---


def tensor_mutations(tensors: dict[str, np.ndarray], write: Write) -> list[Mutation]:
    """All changes of one tensor."""

    def mutation(name: str, kind: str) -> Mutation:
        def apply() -> None:
            changed = TENSORS[kind](tensors[name])
            write({n: x for n, x in (tensors | {name: changed}).items() if x is not None})

        return Mutation(f"{name} {kind}", apply, (name, name.removeprefix("model.encoder.")))

    return [mutation(name, kind) for name in tensors for kind in TENSORS]


def of_tensors(file: Path) -> list[Mutation]:
    with safetensors.safe_open(file, "np") as stored:
        metadata = stored.metadata()
    tensors = safetensors.numpy.load_file(file)
    return tensor_mutations(tensors, lambda changed: safetensors.numpy.save_file(changed, file, metadata))


def of_torch(file: Path) -> list[Mutation]:
    """Of a file of tensors by name; each may also have another name."""
    import torch

    tensors = torch.load(file)
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}

    def write(changed: dict[Any, Any]) -> None:
        torch.save({n: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for n, x in changed.items()}, file)

    def renamed(name: Any, value: Any) -> Mutation:
        return Mutation(f"{name!r} added", lambda: write(arrays | {name: value}), (repr(name), str(name)))

    added = [renamed(name, np.zeros(2, np.float32)) for name in (0, (1, 2), None, True, "x" * 10)]
    added += [renamed("x", value) for value in (None, 1, "y", [1], {"z": 2}, 10**5000, np.float32(1))]
    added += [
        Mutation(f"the file is {x!r}", lambda x=x: torch.save(x, file), ()) for x in (None, 1, [], {}, {"ema": {}})
    ]
    return [*tensor_mutations(arrays, write), *added]
