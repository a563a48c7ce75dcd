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
MAX_BUCKETS = 256
"""PixArt's tables have about 40; training compiles a step for each."""
MAX_PARTS = 20
PART_RULE = "must be 1 to 40 letters, digits, _ and -, and not t with a digit behind it, as losses by time are named"
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
class Bucket:
    """The size in pixels of the images of one aspect ratio."""

    height: Annotated[int, Field(ge=1, le=2**20)]
    width: Annotated[int, Field(ge=1, le=2**20)]


@dataclass(frozen=True, config=STRICT)
class Part:
    """A part of the validation split: why its records are held out, and how many they are."""

    name: str
    records: Count

    @model_validator(mode="after")
    def _check(self) -> "Part":
        check_part(self.name)
        return self


def check_part(name: Any) -> None:
    """Raise `FieldError` unless `name` can name a part of the validation split: it becomes the name of a loss."""
    is_name = isinstance(name, str) and re.fullmatch(r"(?!t\d)[A-Za-z0-9_-]{1,40}", name, re.ASCII) is not None
    require("name", name, is_name, PART_RULE)


@dataclass(frozen=True, config=STRICT)
class Shard:
    """One ArrayRecord file, named relative to the manifest's folder.

    `buckets` has the number of records of each of the manifest's buckets. Records are sorted by bucket, so that those
    of a bucket follow one another.
    """

    file: str
    split: Split
    records: Count
    bytes: Annotated[int, Field(ge=0)]
    sha256: str
    buckets: Listed[Annotated[int, Field(ge=0)]] = ()

    @model_validator(mode="after")
    def _check(self) -> "Shard":
        # A manifest is untrusted: it must not point at files outside its folder.
        is_plain = re.fullmatch(r"[\w-][\w.-]*\.array_record", self.file) is not None
        require("file", self.file, is_plain, "must be a plain file name *.array_record")
        if self.buckets:
            counted = sum(self.buckets)
            require("buckets", counted, counted == self.records, f"must add up to records={self.records}")
        return self


@dataclass(frozen=True, config=STRICT, kw_only=True)
class Manifest:
    """The contents of `dataset.json`. Latents on disk are raw, without the VAE's shift and scale.

    `channel_mean` and `channel_std` are those of the raw latents of the train split, one value per channel. Records
    have a label if there are class names, and captions if `has_captions`. With `buckets` a latent has the shape of its
    bucket, and `latent_shape` is that of a square image of `image_size`; without, all have `latent_shape`. Data held out
    in several ways have `validation_parts`. In the checkpoint of a model that was trained elsewhere there are no shards.
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
    buckets: Listed[Bucket] = ()
    validation_parts: Listed[Part] = ()

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
        self._check_buckets()
        parts = [part.name for part in self.validation_parts]
        require("validation_parts", parts, len(set(parts)) == len(parts), "must have different names")
        require("validation_parts", len(parts), len(parts) <= MAX_PARTS, f"must be at most {MAX_PARTS}")
        counted, records = sum(part.records for part in self.validation_parts), self.num_records("validation")
        rule = f"must add up to the {records} records of the validation split"
        require("validation_parts", counted, not self.validation_parts or counted == records, rule)
        return self

    def _check_buckets(self) -> None:
        buckets, stride = self.buckets, self.vae.stride
        require("buckets", len(buckets), len(buckets) <= MAX_BUCKETS, f"must be at most {MAX_BUCKETS}")
        for i, bucket in enumerate(buckets):
            sides = (bucket.height, bucket.width)
            fits = all(side % stride == 0 and side // stride <= MAX_SIDE for side in sides)
            rule = f"must have sides that are multiples of vae.stride={stride}, at most {MAX_SIDE * stride}"
            require(f"buckets[{i}]", sides, fits, rule)
            require(f"buckets[{i}]", sides, bucket not in buckets[:i], "must be different from the buckets before it")
        for i, shard in enumerate(self.shards):
            rule = f"must have a count for each of the {len(buckets)} buckets of the data set"
            require(f"shards[{i}].buckets", len(shard.buckets), len(shard.buckets) == len(buckets), rule)

    def of_shard(self, shard: Shard) -> "Manifest":
        """The manifest of one shard alone, without the counts of the whole validation split."""
        return dataclasses.replace(self, shards=(shard,), validation_parts=())

    @property
    def id(self) -> str:
        """The identity of the data, version 2: SHA-256 (hex) over all fields but licence and attribution.

        The hashes of the shards are among them.
        """
        return self.ids[0]

    @property
    def ids(self) -> tuple[str, str]:
        """`id`, and the identity of version 1, over all fields, as in the text caches of earlier versions."""
        fields = as_json(self)
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

    @property
    def bucket_shapes(self) -> tuple[tuple[int, int, int], ...]:
        """The latent shape (channels, height, width) of each bucket; `latent_shape` alone without buckets."""
        channels, stride = self.latent_shape[0], self.vae.stride
        shapes = tuple((channels, bucket.height // stride, bucket.width // stride) for bucket in self.buckets)
        return shapes or (self.latent_shape,)

    def bucket_counts(self, split: str) -> tuple[int, ...]:
        """The records of each bucket of `split`, in the order of `bucket_shapes`."""
        if not self.buckets:
            return (self.num_records(split),)
        counts = [shard.buckets for shard in self.shards_of(split)]
        return tuple(sum(shard[i] for shard in counts) for i in range(len(self.buckets)))

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
        write_json(epath.Path(folder) / FILE_NAME, as_json(self))


def as_json(manifest: Any) -> dict[str, Any]:
    """The fields of a manifest and its shards, without those that came later if they are empty."""
    fields = dataclasses.asdict(manifest)
    for part in (fields, *fields["shards"]):
        for name in ("buckets", "validation_parts"):
            if not part.get(name, True):
                del part[name]
    return fields


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
