"""Checking one shard of a data set, and its text features: the files, every record, every number. Nothing is changed."""

import bisect
import contextlib
import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from flowdit.data.captions import CAPTIONS
from flowdit.data.manifest import Manifest, ManifestError, Shard, verify_shards
from flowdit.data.origin import EVERYWHERE, check_origin, key_of
from flowdit.data.record_files import LocalFiles, RecordFiles, check_files
from flowdit.data.records import RecordError
from flowdit.data.schema import CAPTION_FIELDS, LATENTS, Field, LabelField, Schema, record_schema
from flowdit.data.shards import Sums, latent_sums
from flowdit.data.text_cache import CacheManifest, FeatureCache
from flowdit.storage import download, is_remote, reason

CHUNK_BYTES = 2 * 2**20
"""Latents that a thread reads at a time; with its copies in higher precision it needs about ten times that."""
CHUNK_RECORDS = 256


class Problem(NamedTuple):
    """What is wrong with a file of the data set, or with a record of it."""

    file: str
    record: int | None
    problem: str

    def __str__(self) -> str:
        return ": ".join([self.file, *([] if self.record is None else [f"record {self.record}"]), self.problem])


@dataclasses.dataclass
class Findings:
    """What a check of a shard has found. `records` are those without a problem; all sums and counts are over them.

    `keys` has a hash of 16 bytes of the key of each record `keyed`, which are those that have one. `fields` counts the records that have
    a field which either all or none must have. `captions` and `truncated` are counts of the text features.
    """

    keys: list[bytes] = dataclasses.field(default_factory=list)
    keyed: list[int] = dataclasses.field(default_factory=list)
    problems: list[Problem] = dataclasses.field(default_factory=list)
    records: int = 0
    sums: Sums = dataclasses.field(default_factory=dict)
    fields: Counter[str] = dataclasses.field(default_factory=Counter)
    captions: int = 0
    truncated: int = 0


class TextFeatures(NamedTuple):
    """A folder of text features, and its manifest."""

    folder: epath.Path
    manifest: CacheManifest

    def name(self, file: str) -> str:
        """The name of a file in problems."""
        return f"{self.folder.name}/{file}"


class _File(NamedTuple):
    """A local file, its entry in the manifest, and its name in problems."""

    path: Path
    shard: Shard
    name: str


class ShardCheck:
    """Checks shards of the data set in `folder`, each whole in one thread.

    Shards of an object store are copied to the folder `scratch`, and removed from it afterwards.
    """

    def __init__(self, folder: epath.Path, manifest: Manifest, scratch: Path, texts: TextFeatures | None = None):
        self._folder, self._manifest = folder, manifest
        self._scratch, self._texts = scratch, texts
        self._text_shards = {shard.file: shard for shard in texts.manifest.shards} if texts else {}
        fields: dict[str, Field] = {"label": LabelField(manifest.num_classes)} if manifest.class_names else {}
        fields |= CAPTION_FIELDS if manifest.has_captions else {}
        self._denied = [name for name in ("label", *CAPTION_FIELDS) if name not in fields]
        dtype, has_std = manifest.latent_dtype, manifest.has_latent_std
        self._schemas = [record_schema(shape, fields, has_std).of_dtype(dtype) for shape in manifest.bucket_shapes]

    def __call__(self, shard: Shard) -> Findings:
        """Raises `ValueError` in one line if an object store cannot be read."""
        findings = Findings()
        with contextlib.ExitStack() as copies:
            data = self._open(self._folder, shard, shard.file, findings, copies)
            texts = None
            if self._texts is not None:
                entry, name = self._text_shards[shard.file], self._texts.name(shard.file)
                texts = self._open(self._texts.folder, entry, name, findings, copies)
            if data is not None:
                self._check_records(data, texts, findings)
        return findings

    def sample(self, shard: Shard, numbers: Sequence[int], findings: Findings) -> Iterator[tuple[int, dict[str, Any]]]:
        """Some records of a shard, in ascending order, without those that have a problem; no hash is compared."""
        with contextlib.ExitStack() as copies:
            data = self._open(self._folder, shard, shard.file, findings, copies, checks=(_check_container,))
            for records in self._records(data, numbers, findings) if data is not None else ():
                yield from records.items()

    def _open(
        self,
        folder: epath.Path,
        shard: Shard,
        name: str,
        findings: Findings,
        copies: contextlib.ExitStack,
        *,
        checks: Sequence[Callable[[Path, Shard], None]] | None = None,
    ) -> _File | None:
        """The file of a shard after its own checks, or None if its records cannot be read."""
        try:
            path = copies.enter_context(_local_file(folder / shard.file, self._scratch))
        except FileNotFoundError:
            findings.problems.append(Problem(name, None, "is missing"))
            return None
        for check in checks or (_check_bytes, _check_container):
            try:
                check(path, shard)
            except (OSError, ValueError) as problem:
                findings.problems.append(Problem(name, None, reason(problem).removeprefix(f"{path}: ")))
                if check is _check_container:
                    return None
        return _File(path, shard, name)

    def _check_records(self, data: _File, texts: _File | None, findings: Findings) -> None:
        features = None
        if texts is not None and self._texts is not None:
            features = FeatureCache(LocalFiles([texts.path]), self._texts.manifest, [texts.shard.records])
        for records in self._records(data, range(data.shard.records), findings):
            _count(records, data.shard, findings)
            if features is not None and texts is not None:
                _check_texts(features, records, texts, findings)

    def _records(self, data: _File, numbers: Sequence[int], findings: Findings) -> Iterator[dict[int, dict[str, Any]]]:
        """Those of the records `numbers`, in ascending order, that obey all rules, by number and a part at a time."""
        files = RecordFiles(LocalFiles([data.path]), [data.shard.records], lambda record: None)
        for schema, together in self._chunks(data.shard, numbers):
            records: dict[int, dict[str, Any]] = {}
            for number, record in _read_each(files, together, data, findings):
                with _noted(number, data, findings):
                    schema.check(record)
                    _check_denied(record, self._denied)
                    check_origin(record)
                    records[number] = record
            _remove_not_finite(schema, records, data, findings)
            yield records

    def _chunks(self, shard: Shard, numbers: Sequence[int]) -> Iterator[tuple[Schema, Sequence[int]]]:
        """Those of the numbers that are read together, and the schema of their bucket."""
        start = 0
        counts = shard.buckets or (shard.records,)
        for schema, shape, count in zip(self._schemas, self._manifest.bucket_shapes, counts, strict=True):
            size = min(max(CHUNK_BYTES // (2 * int(np.prod(shape))), 1), CHUNK_RECORDS)
            own = numbers[bisect.bisect_left(numbers, start) : bisect.bisect_left(numbers, start + count)]
            for first in range(0, len(own), size):
                yield schema, own[first : first + size]
            start += count


def _check_denied(record: Mapping[str, Any], denied: Sequence[str]) -> None:
    """Raise `RecordError` for a field that the manifest says the data set has not."""
    for name in denied:
        if name in record:
            raise RecordError(
                f"{name}: is in the record, but the manifest has no {'classes' if name == 'label' else 'captions'}"
            )


@contextlib.contextmanager
def _local_file(file: epath.Path, scratch: Path) -> Iterator[Path]:
    """The file itself on a local disk, or a copy. Raises `FileNotFoundError`, or `ValueError` for a store's errors."""
    if not is_remote(file):
        yield Path(file)
        return
    copy = scratch / f"{file.parent.name}-{file.name}"
    try:
        download(file, copy)
        yield copy
    except FileNotFoundError:
        raise
    except OSError as problem:
        raise ValueError(f"{file}: cannot be read: {reason(problem)}") from None
    finally:
        copy.unlink(missing_ok=True)


def _check_bytes(path: Path, shard: Shard) -> None:
    try:
        verify_shards(path.parent, [dataclasses.replace(shard, file=path.name)], hashes=True)
    except ManifestError as problem:
        raise ManifestError(str(problem).removesuffix(": the data changed since it was prepared")) from None


def _check_container(path: Path, shard: Shard) -> None:
    check_files([path], [shard])


@contextlib.contextmanager
def _noted(number: int, file: _File, findings: Findings) -> Iterator[None]:
    """Note an error in a record as a problem."""
    try:
        yield
    except RecordError as error:
        text = str(error)
        findings.problems.append(Problem(file.name, number, text.removeprefix(f"{file.path}: record {number}: ")))


def _read_each(
    files: RecordFiles, numbers: Sequence[int], file: _File, findings: Findings
) -> Iterable[tuple[int, dict[str, Any]]]:
    """The records that can be decoded, by their numbers."""
    try:
        yield from zip(numbers, files.read(numbers), strict=True)
    except RecordError:
        for number in numbers:
            with _noted(number, file, findings):
                yield number, files.read([number])[0]


def _remove_not_finite(schema: Schema, records: dict[int, dict[str, Any]], file: _File, findings: Findings) -> None:
    """Check the numbers of records that have the right shapes, and keep those that pass."""
    try:
        for name in LATENTS:
            if records and name in schema.fields:
                batch = schema.fields[name].stack([record[name] for record in records.values()])
                schema.check_numbers({name: batch})
    except RecordError:
        for number, record in list(records.items()):
            with _noted(number, file, findings):
                del records[number]
                schema.check_numbers(record)
                records[number] = record


def _count(records: Mapping[int, Mapping[str, Any]], shard: Shard, findings: Findings) -> None:
    findings.records += len(records)
    for number, record in records.items():
        findings.fields.update(name for name in EVERYWHERE if name in record)
        if (key := key_of(record)) is not None:
            findings.keys.append(hashlib.blake2b(key, digest_size=16).digest())
            findings.keyed.append(number)
    if records and shard.split == "train":
        latents = np.stack([record["latent"] for record in records.values()], axis=1)  # (channels, records, ...)
        for name, part in latent_sums({"latent": latents}).items():
            findings.sums[name] = findings.sums.get(name, 0) + part


def _check_texts(
    features: FeatureCache, records: Mapping[int, Mapping[str, Any]], file: _File, findings: Findings
) -> None:
    """Check the features of both captions of each record, and that they are those of its captions."""
    for number, record in records.items():
        for which, caption in enumerate(CAPTIONS):
            entry = len(CAPTIONS) * number + which
            with _noted(entry, file, findings):
                ((packed, is_cut),) = features.read_packed([entry], [record[caption]])
                findings.captions += len(packed) > 0
                findings.truncated += is_cut
