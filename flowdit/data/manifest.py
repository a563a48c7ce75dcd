"""`dataset.json`: what a folder of shards holds, how it was made, and the hashes that prove it unchanged."""

import dataclasses
import json
import math
import os
import re
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowdit.hashing import file_sha256, sha256

FILE_NAME = "dataset.json"
SCHEMA_VERSION = 1
HASH_LIMIT_BYTES = 256 * 2**20
"""Up to this size (about a second of hashing) `verify` compares contents, above it sizes."""
MAX_SIDE = 4096
"""Channels, height or width of latents. The model's positions are made before the first record disproves a claim."""

LatentDtype = typing.Literal["float16", "float32"]
Split = typing.Literal["train", "validation"]


class ManifestError(ValueError):
    """A manifest that cannot be read, or shards that do not match it."""


@dataclass(frozen=True)
class VaeInfo:
    """The VAE whose latents these are; models see `(latent - shift) * scale`."""

    name: str
    fingerprint: str
    shift: float
    scale: float
    stride: int


@dataclass(frozen=True)
class Shard:
    """One ArrayRecord file, named relative to the manifest's folder."""

    file: str
    split: Split
    records: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The contents of `dataset.json`. Latents on disk are raw: before the VAE's shift and scale.

    `channel_mean` and `channel_std` are those of the raw latents of the train split, one value a channel. Records have
    a label where there are class names, and captions where `has_captions`.
    """

    latent_shape: tuple[int, int, int]
    latent_dtype: LatentDtype
    has_latent_std: bool
    vae: VaeInfo
    image_size: int
    channel_mean: tuple[float, ...]
    channel_std: tuple[float, ...]
    class_names: tuple[str, ...]
    shards: tuple[Shard, ...]
    license: str
    attribution: str
    has_captions: bool = False
    schema_version: int = SCHEMA_VERSION

    @property
    def id(self) -> str:
        """SHA-256 (hex) over everything in the manifest, the shards' hashes and so their contents included."""
        fields = dataclasses.asdict(self)
        if not self.has_captions:  # ids from before this field was there stay as they are
            del fields["has_captions"]
        canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return sha256(canonical)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def shards_of(self, split: str) -> tuple[Shard, ...]:
        return tuple(shard for shard in self.shards if shard.split == split)

    def num_records(self, split: str) -> int:
        return sum(shard.records for shard in self.shards_of(split))

    @classmethod
    def read(cls, folder: str | Path) -> "Manifest":
        """The manifest in `folder`. Raises `ManifestError` in one line if there is none or it breaks a rule."""
        path = Path(folder) / FILE_NAME
        if not path.is_file():
            missing = f"no {FILE_NAME} in it" if path.parent.is_dir() else "no such folder"
            raise ManifestError(f"{folder}: {missing}; `python -m flowdit.prepare` makes a data set")
        manifest = read_json(path, cls.parse)
        if not manifest.shards:
            raise ManifestError(f"{path}: shards: must be one or more different files, got []")
        return manifest

    @classmethod
    def parse(cls, data: Any) -> "Manifest":
        """The manifest in what came out of JSON. Raises `ManifestError` naming the field that breaks a rule.

        That of a model which was trained elsewhere, in its checkpoint, names no shards.
        """
        manifest = parse_fields(cls, data, SCHEMA_VERSION)
        _check_values(manifest)
        if manifest.shards:
            check_shards(manifest.shards)
        return manifest

    def write(self, folder: str | Path) -> None:
        """Write `dataset.json`; a reader sees the old file or the new one, never half of one."""
        write_json(Path(folder) / FILE_NAME, dataclasses.asdict(self))


Parsed = typing.TypeVar("Parsed")


def read_json(path: Path, parse: Callable[[Any], Parsed]) -> Parsed:
    """`parse` of the contents of a JSON file. Raises `ManifestError` in one line that names the file."""
    try:
        return parse(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read: {error.strerror}") from None
    except ManifestError as error:
        raise ManifestError(f"{path}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{path}: is not JSON: {error}") from None


def write_json(path: Path, data: Any) -> None:
    """Write `data` to `path` in one atomic step."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def verify(folder: str | Path, manifest: Manifest, *, hashes: bool = False, limit: int = HASH_LIMIT_BYTES) -> None:
    """Raise `ManifestError` unless every shard is there and unchanged.

    Sizes are always compared; contents (SHA-256) too if `hashes` is set or all shards together have at most `limit` bytes.
    """
    verify_shards(folder, manifest.shards, hashes=hashes, limit=limit)


def verify_shards(folder: str | Path, shards: Sequence[Shard], *, hashes: bool, limit: int = HASH_LIMIT_BYTES) -> None:
    """`verify`, for the shards of any manifest."""
    hashes = hashes or sum(shard.bytes for shard in shards) <= limit
    for shard in shards:
        path = Path(folder) / shard.file
        if not path.is_file():
            raise _changed(path, "is missing")
        if (size := path.stat().st_size) != shard.bytes:
            raise _changed(path, f"must have {shard.bytes} bytes, has {size}")
        if hashes and (digest := file_sha256(path)) != shard.sha256:
            raise _changed(path, f"must have sha256 {shard.sha256}, has {digest}")


def _changed(path: Path, problem: str) -> ManifestError:
    return ManifestError(f"{path}: {problem}: the data changed since it was prepared")


def parse_fields(kind: type[Parsed], data: Any, schema_version: int) -> Parsed:
    """What came out of JSON as `kind`, a dataclass whose fields with a default may be missing.

    Raises `ManifestError` naming the field that is missing, unknown or of another type, or the version.
    """
    version = data.get("schema_version") if isinstance(data, dict) else None
    if isinstance(version, int) and version != schema_version:
        raise ManifestError(f"schema_version: must be {schema_version}, got {version}")
    return _parse(kind, data, "")


def _parse(kind: Any, value: Any, field: str) -> Any:
    """`value`, as it comes out of JSON, as `kind`: a dataclass, a tuple, a literal or a plain type."""
    if dataclasses.is_dataclass(kind):
        return _parse_object(kind, value, field)
    if typing.get_origin(kind) is tuple:
        return _parse_tuple(typing.get_args(kind), value, field)
    if typing.get_origin(kind) is typing.Literal:
        if value not in typing.get_args(kind):
            raise ManifestError(f"{field}: must be one of {', '.join(typing.get_args(kind))}, got {value!r}")
        return value
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise ManifestError(f"{field}: must be {kind.__name__}, got {value!r}")
    return value


def _parse_object(kind: Any, value: Any, field: str) -> Any:
    if not isinstance(value, dict):
        raise ManifestError(f"{field or 'the file'}: must be an object, got {type(value).__name__}")
    hints, prefix = typing.get_type_hints(kind), field and f"{field}."
    required = {f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING}
    for problem, names in (
        ("is missing", required - value.keys()),
        ("is not a known field", value.keys() - hints.keys()),
    ):
        if names:
            raise ManifestError(f"{prefix}{min(names)}: {problem}")
    return kind(**{name: _parse(hints[name], part, f"{prefix}{name}") for name, part in value.items()})


def _parse_tuple(kinds: tuple[Any, ...], value: Any, field: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise ManifestError(f"{field}: must be a list, got {type(value).__name__}")
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(value)
    if len(kinds) != len(value):
        raise ManifestError(f"{field}: must have {len(kinds)} entries, got {len(value)}")
    return tuple(_parse(kind, part, f"{field}[{i}]") for i, (kind, part) in enumerate(zip(kinds, value, strict=True)))


def _check_values(manifest: Manifest) -> None:
    (channels, *sides), names, vae = manifest.latent_shape, manifest.class_names, manifest.vae
    means, stds = len(manifest.channel_mean), len(manifest.channel_std)
    pixels = sorted({vae.stride * side for side in sides})
    fits = any(abs(manifest.image_size - size) < vae.stride for size in pixels)
    rules = (
        ("latent_shape", "must be positive", manifest.latent_shape, min(manifest.latent_shape) > 0),
        ("latent_shape", f"must be at most {MAX_SIDE}", manifest.latent_shape, max(manifest.latent_shape) <= MAX_SIDE),
        ("vae.scale", "must not be 0", vae.scale, vae.scale != 0),
        ("vae.stride", "must be at least 1", vae.stride, vae.stride >= 1),
        # A side that is no multiple of the stride is rounded up or down.
        ("image_size", f"must be vae.stride times a side of latent_shape, {pixels}", manifest.image_size, fits),
        ("channel_mean", f"must have {channels} values", means, means == channels),
        ("channel_std", f"must have {channels} values", stds, stds == channels),
        ("channel_std", "must not be negative", manifest.channel_std, min(manifest.channel_std, default=0) >= 0),
        ("class_names", "must be different names", len(names), _distinct(names) or not names),
    )
    for field, rule, value, holds in rules:
        if not holds:
            raise ManifestError(f"{field}: {rule}, got {value}")


def check_shards(shards: Sequence[Shard]) -> None:
    """Raise `ManifestError` unless they are different files, none empty, within the manifest's folder."""
    names = [shard.file for shard in shards]
    if not _distinct(names):
        raise ManifestError(f"shards: must be one or more different files, got {names}")
    for i, shard in enumerate(shards):
        # A manifest is untrusted: it must not point at files outside its folder.
        if not re.fullmatch(r"[\w-][\w.-]*\.array_record", shard.file):
            raise ManifestError(f"shards[{i}].file: must be a plain file name *.array_record, got {shard.file!r}")
        if shard.records < 1:
            raise ManifestError(f"shards[{i}].records: must be at least 1, got {shard.records}")


def _distinct(names: Sequence[str]) -> bool:
    return 0 < len(names) == len(set(names))
