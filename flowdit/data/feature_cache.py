"""Reading a cache of feature maps: a folder with the shards of a data set's training split, and `features.json`.

Record i of a shard holds the map of the image that record i of the data shard of the same name shows, float16 (rows,
columns, width), and a key of that record. A cache belongs to one feature network and one data set; any other is refused,
as maps of other images or of another network give plausible losses but wrong models.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from etils import epath
from jaxtyping import Float16
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from flowdit.data.manifest import HASH_LIMIT_BYTES, Manifest, Shard, check_different, read_manifest
from flowdit.data.origin import key_of
from flowdit.data.plan import former_ids
from flowdit.data.record_files import RecordFiles, ShardFiles
from flowdit.data.records import RecordError
from flowdit.data.schema import FeatureMapField
from flowdit.data.shard_cache import open_shards, provide
from flowdit.data.shard_pool import ShardPool
from flowdit.json_input import STRICT, Listed
from flowdit.storage import connect

FILE_NAME = "features.json"
SCHEMA_VERSION = 1
MAP = "feature_map"
"""The name of the maps in a batch."""
KEY_BYTES = 8
Side = Annotated[int, Field(ge=1, le=1024)]
Width = Annotated[int, Field(ge=1, le=2**16)]


@dataclass(frozen=True, config=STRICT, kw_only=True)
class FeatureManifest:
    """The contents of `features.json`.

    `identity` names everything of the network that changes a map (`FeatureNetwork.map_identity`), `shape` is (rows,
    columns, width), and `data` the id of the data set's manifest, of either version. The shards correspond to those of the
    training split.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    network: str
    identity: str
    shape: tuple[Side, Side, Width]
    dtype: Literal["float16"] = "float16"
    data: str
    shards: Annotated[Listed[Shard], Field(min_length=1)]

    @model_validator(mode="after")
    def _check(self) -> "FeatureManifest":
        check_different(self.shards)
        return self

    def check_made_from(self, folder: epath.Path, manifest: Manifest, former: Sequence[str] = ()) -> None:
        """Raise `ValueError` with the difference unless these are maps of that data set.

        `former` are ids that the data set had before (`plan.former_ids`).
        """
        if self.data not in (*manifest.ids, *former):
            problem = f"must be {manifest.id} as in this run, got {self.data}"
            raise ValueError(f"{folder / FILE_NAME}: id of the data set: {problem}")
        parallel = [(shard.file, shard.records) for shard in manifest.shards_of("train")]
        if [(shard.file, shard.records) for shard in self.shards] != parallel:
            rule = "must be those of the data set's training split, with as many records"
            raise ValueError(f"{folder / FILE_NAME}: shards: {rule}")


def image_key(record: Mapping[str, Any]) -> bytes:
    """8 bytes that identify the image that a record shows, of which a mirrored copy is another.

    Raises `RecordError` for a record of a data set of an earlier version, which does not name its image.
    """
    key = key_of(record)
    if key is None:
        raise RecordError("key: is missing, so its image is not known: prepare the data set again")
    content = record.get("content_hash", b"")
    return hashlib.blake2b(key + b"\0" + bytes(content), digest_size=KEY_BYTES).digest()


class FeatureMaps:
    """The maps of the training split of a data set. Thread-safe."""

    def __init__(self, files: ShardFiles, cache: FeatureManifest, counts: Sequence[int]):
        self.files, self.field = files, FeatureMapField(cache.shape)
        self._files = RecordFiles(files, counts, self._check)

    def __len__(self) -> int:
        return len(self._files)

    def read(
        self, indices: Sequence[int], records: Sequence[Mapping[str, Any]]
    ) -> Float16[np.ndarray, "n rows columns dim"]:
        """The maps of `records`, those of the data set at `indices`.

        Raises `RecordError` naming file and record if a map is damaged or of another image.
        """
        entries = self._files.read(indices)
        for index, entry, record in zip(indices, entries, records, strict=True):
            self._files.locate(index, _check_key, entry["key"], record)
        maps = self.field.stack([entry["map"] for entry in entries])
        try:
            self.field.check_numbers(maps)
        except RecordError:
            for index, entry in zip(indices, entries, strict=True):
                self._files.locate(index, self.field.check_numbers, entry["map"])
        return maps

    def _check(self, entry: Mapping[str, Any]) -> None:
        if missing := {"key", "map"} - entry.keys():
            raise RecordError(f"{min(missing)}: is missing, the record has {str(sorted(entry))[:200]}")
        try:
            self.field.check(entry["map"])
        except RecordError as error:
            raise RecordError(f"map: {error}") from None


def _check_key(key: Any, record: Mapping[str, Any]) -> None:
    expected = image_key(record)
    if not isinstance(key, bytes) or key != expected:
        shown = key[:20].hex() if isinstance(key, bytes) else type(key).__name__
        raise RecordError(f"key: must be {expected.hex()} for the record of the data, got {shown}: another image")


def read_features(folder: epath.PathLike) -> FeatureManifest:
    """The manifest of a cache. Raises `ValueError` in one line if there is none, or it is invalid."""
    folder = connect(folder)
    if not (folder / FILE_NAME).is_file():
        raise ValueError(f"{folder} has no {FILE_NAME}; `python -m flowdit.prepare features=...` makes it")
    return read_manifest(FeatureManifest, folder / FILE_NAME)


def open_features(
    folder: epath.PathLike,
    manifest: Manifest,
    *,
    data: epath.PathLike,
    local_dir: str | None = None,
    pool: ShardPool | None = None,
    verify_hashes: bool = False,
    hash_limit: int = HASH_LIMIT_BYTES,
) -> FeatureMaps:
    """Open the maps in `folder` for the training split of the data set in `data`, which has this manifest.

    Raises `ValueError` with one line if there is no cache, it was made from other data, or a shard is missing or changed
    (hashes are compared as in `manifest.verify`). Shards of an object store are copied to `local_dir` (`data.mirror`), or
    read by way of `pool`.
    """
    folder = connect(folder)
    cache = read_features(folder)
    cache.check_made_from(folder, manifest, former_ids(data))
    options = {"hashes": verify_hashes, "limit": hash_limit}
    files = open_shards(provide(folder, cache.shards, local_dir, pool, **options), cache.shards, pool, **options)
    return FeatureMaps(files, cache, [shard.records for shard in cache.shards])
