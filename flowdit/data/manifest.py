"""`dataset.json`: contents, origin and hashes of a folder of shards."""

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from etils import epath
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from flowdit.fields import require
from flowdit.hashing import file_sha256, sha256
from flowdit.json_input import STRICT, Count, InputError, Listed, parse_file
from flowdit.storage import connect

FILE_NAME = "dataset.json"
SCHEMA_VERSION = 1
HASH_LIMIT_BYTES = 256 * 2**20
"""Up to this size (about a second of hashing) `verify` compares hashes, above it only sizes."""
MAX_SIDE = 4096
"""Maximum of channels, height and width of latents: sampling allocates arrays of these sizes."""
TERMS = ("license", "attribution")
"""Fields that may be corrected: they are not part of the identity of the data."""
Side = Annotated[int, Field(ge=1, le=MAX_SIDE)]
Split = Literal["train", "validation"]
T = TypeVar("T")


class ManifestError(ValueError):
    """A manifest that cannot be read, or shards that do not match it."""


@dataclass(frozen=True, config=STRICT)
class VaeInfo:
    """The VAE of the latents; models get `(latent - shift) * scale`."""

    name: str
    fingerprint: str
    shift: float
    scale: float
    stride: Count

    @model_validator(mode="after")
    def _check(self) -> "VaeInfo":
        require("scale", self.scale, self.scale != 0, "must not be 0")
        return self


@dataclass(frozen=True, config=STRICT)
class Shard:
    """One ArrayRecord file, named relative to the manifest's folder."""

    file: str
    split: Split
    records: Count
    bytes: Annotated[int, Field(ge=0)]
    sha256: str

    @model_validator(mode="after")
    def _check(self) -> "Shard":
        # A manifest is untrusted: it must not point at files outside its folder.
        is_plain = re.fullmatch(r"[\w-][\w.-]*\.array_record", self.file) is not None
        require("file", self.file, is_plain, "must be a plain file name *.array_record")
        return self


@dataclass(frozen=True, config=STRICT, kw_only=True)
class Manifest:
    """The contents of `dataset.json`. Latents on disk are raw, without the VAE's shift and scale.

    `channel_mean` and `channel_std` are those of the raw latents of the train split, one value per channel. Records
    have a label if there are class names, and captions if `has_captions`. In the checkpoint of a model that was trained
    elsewhere there are no shards.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    latent_shape: tuple[Side, Side, Side]
    latent_dtype: Literal["float16", "float32"]
    has_latent_std: bool
    vae: VaeInfo
    image_size: int
    channel_mean: Listed[float]
    channel_std: Listed[Annotated[float, Field(ge=0)]]
    class_names: Listed[str]
    shards: Listed[Shard]
    license: str
    attribution: str
    has_captions: bool = False

    @model_validator(mode="after")
    def _check(self) -> "Manifest":
        channels, *sides = self.latent_shape
        pixels = sorted({self.vae.stride * side for side in sides})
        # A side that is not a multiple of the stride is rounded up or down.
        is_a_side = any(abs(self.image_size - size) < self.vae.stride for size in pixels)
        rule = f"must be vae.stride times a side of latent_shape, {pixels}"
        require("image_size", self.image_size, is_a_side, rule)
        for name, values in (("channel_mean", self.channel_mean), ("channel_std", self.channel_std)):
            require(name, len(values), len(values) == channels, f"must have {channels} values")
        names = self.class_names
        require("class_names", list(names), len(set(names)) == len(names), "must be different names")
        check_different(self.shards)
        return self

    @property
    def id(self) -> str:
        """The identity of the data, version 2: SHA-256 (hex) over all fields but licence and attribution.

        The hashes of the shards are among them.
        """
        return self.ids[0]

    @property
    def ids(self) -> tuple[str, str]:
        """`id`, and the identity of version 1, over all fields, as in the text caches of earlier versions."""
        fields = dataclasses.asdict(self)
        if not self.has_captions:  # ids from before this field do not change
            del fields["has_captions"]
        content = {name: value for name, value in fields.items() if name not in TERMS}
        return _digest(content | {"identity": 2}), _digest(fields)

    def differences(self, other: "Manifest") -> list[str]:
        """The fields in which the data of `other` differ, without licence and attribution."""
        fields = (dataclasses.asdict(self), dataclasses.asdict(other))
        ours, theirs = set(self.shards), set(other.shards)
        names = [name for name in fields[0] if name not in TERMS and fields[0][name] != fields[1][name]]
        changed, all_files = ({shard.file for shard in some} for some in (ours ^ theirs, ours | theirs))
        shards = f"{len(changed)} of {len(all_files)}" if changed else "in another order"
        return [f"shards ({shards})" if name == "shards" else name for name in names]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def shards_of(self, split: str) -> tuple[Shard, ...]:
        return tuple(shard for shard in self.shards if shard.split == split)

    def num_records(self, split: str) -> int:
        return sum(shard.records for shard in self.shards_of(split))

    @classmethod
    def read(cls, folder: epath.PathLike) -> "Manifest":
        """Read the manifest in `folder`. Raises `ManifestError` with one line if it is missing or invalid."""
        path = connect(folder) / FILE_NAME
        if not path.is_file():
            missing = f"no {FILE_NAME} in it" if path.parent.is_dir() else "no such folder"
            raise ManifestError(f"{folder}: {missing}; `python -m flowdit.prepare` makes a data set")
        manifest = read_manifest(cls, path)
        if not manifest.shards:
            raise ManifestError(f"{path}: shards: must be one or more different files, got []")
        return manifest

    def write(self, folder: epath.PathLike) -> None:
        """Write `dataset.json` atomically."""
        write_json(epath.Path(folder) / FILE_NAME, dataclasses.asdict(self))


def _digest(fields: dict[str, Any]) -> str:
    return sha256(json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False))


def read_manifest(kind: type[T], path: epath.Path) -> T:
    """The manifest of a folder of shards. Raises `ManifestError` in one line that names the file."""
    try:
        return parse_file(kind, path)
    except InputError as problem:
        raise ManifestError(str(problem)) from None


def write_json(path: epath.Path, data: Any) -> None:
    """Write `data` to `path` atomically."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def verify(folder: epath.PathLike, manifest: Manifest, *, hashes: bool = False, limit: int = HASH_LIMIT_BYTES) -> None:
    """Raise `ManifestError` unless every shard exists and is unchanged.

    Sizes are always compared; hashes (SHA-256) if `hashes` is set or all shards together have at most `limit` bytes.
    """
    verify_shards(folder, manifest.shards, hashes=hashes, limit=limit)


def verify_shards(
    folder: epath.PathLike, shards: Sequence[Shard], *, hashes: bool, limit: int = HASH_LIMIT_BYTES
) -> None:
    """`verify`, for the shards of any manifest."""
    hashes = hashes or sum(shard.bytes for shard in shards) <= limit
    for shard in shards:
        path = Path(folder) / shard.file  # a local disk: those of an object store are copied (`data.mirror`)
        if not path.is_file():
            raise _changed(path, "is missing")
        if (size := path.stat().st_size) != shard.bytes:
            raise _changed(path, f"must have {shard.bytes} bytes, has {size}")
        if hashes and (digest := file_sha256(path)) != shard.sha256:
            raise _changed(path, f"must have sha256 {shard.sha256}, has {digest}")


def _changed(path: Path, problem: str) -> ManifestError:
    return ManifestError(f"{path}: {problem}: the data changed since it was prepared")


def check_different(shards: Sequence[Shard]) -> None:
    """Raise `FieldError` unless the shards are different files."""
    names = [shard.file for shard in shards]
    require("shards", names, len(set(names)) == len(names), "must be one or more different files")
