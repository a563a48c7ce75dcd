"""Checking a whole data set against its manifest, in parallel and without changing anything."""

import contextlib
import dataclasses
import itertools
import json
import logging
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np
from etils import epath

from flowdit.data import text_cache
from flowdit.data.manifest import FILE_NAME, Manifest, Shard, read_manifest
from flowdit.data.plan import former_ids
from flowdit.data.preparation.duplicates import HashTable
from flowdit.data.progress import progress_bar
from flowdit.data.shard_check import Findings, Problem, ShardCheck, TextFeatures
from flowdit.data.shards import Sidecar, Sums, channel_statistics
from flowdit.data.text_cache import CacheManifest
from flowdit.fields import FieldError, require
from flowdit.storage import connect, reason, require_local

logger = logging.getLogger(__name__)

TOLERANCE = 1e-6
"""Of statistics, relative to mean and standard deviation: sums of floats depend on their order."""
DEFAULT_CACHE = "text_features"


@dataclasses.dataclass
class VerifyConfig:
    """Settings of `python -m flowdit.verify`.

    Attributes:
        data: folder of the data set, also in an object store (`s3://`, `gs://`), of which a shard per thread is on the
            local disk at a time.
        text_cache: folder of its text features; null: `text_features` in `data`, if there is one.
        threads: shards that are checked at the same time; null: one per core.
        show: problems that are printed; all are counted.
        report: JSON Lines file for all problems, each with `file`, `record` (its number within the file, or null) and
            `problem`; null: none.
    """

    data: str = "???"
    text_cache: str | None = None
    threads: int | None = None
    show: int = 20
    report: str | None = None

    def check(self) -> None:
        """Raise `FieldError` naming the first field that breaks a rule."""
        require("threads", self.threads, self.threads is None or self.threads >= 1, "must be at least 1")
        require("show", self.show, self.show >= 0, "must be 0 (none) or more")
        require_local("report", self.report)


class _Problems:
    """The problems so far: counted, written to `report` as JSON Lines, and the first `show` logged as warnings."""

    def __init__(self, folder: epath.Path, show: int, report: TextIO | None):
        self.count = 0
        self._folder, self._show = folder, show
        self._report = report

    def add(self, problem: Problem) -> None:
        self.count += 1
        if self.count <= self._show:
            logger.warning("%s/%s", self._folder, problem)
        if self._report is not None:
            self._report.write(json.dumps(problem._asdict()) + "\n")


@contextlib.contextmanager
def _opened(report: str | None) -> Iterator[TextIO | None]:
    """The file of the report. It is written line by line, so that a command that is stopped leaves what it found."""
    if report is None:
        yield None
        return
    try:
        file = Path(report).open("w", encoding="utf-8", buffering=1)  # noqa: SIM115
    except OSError as problem:
        raise FieldError("report", f"{report} cannot be written: {reason(problem)}") from None
    with file:
        yield file


class Verified(NamedTuple):
    """The result: the number of problems, and a line about it."""

    problems: int
    summary: str


def verify_data(config: VerifyConfig) -> Verified:
    """Check everything that a data set consists of, and log what is wrong.

    Raises `ValueError` with one line for a folder without a data set, text features of other data, a store that cannot
    be read or a report that cannot be written.
    """
    config.check()
    folder = connect(config.data)
    manifest = Manifest.read(folder)
    with _opened(config.report) as report:
        problems = _Problems(folder, config.show, report)
        texts = _find_texts(folder, manifest, config.text_cache, problems)
        count = sum(shard.records for shard in manifest.shards)
        with (
            tempfile.TemporaryDirectory(prefix="flowdit-verify-") as scratch,
            HashTable(Path(scratch), count) as keys,
        ):
            check = ShardCheck(folder, manifest, Path(scratch), texts)
            totals = _check_shards(check, manifest, config.threads or len(os.sched_getaffinity(0)), keys, problems)
            for problem in itertools.chain(_repeated_keys(manifest, keys), _wrong_totals(manifest, texts, totals)):
                problems.add(problem)
    if problems.count > config.show:
        logger.warning("and %s more problems", f"{problems.count - config.show:,}")
    return Verified(problems.count, _summary(folder, manifest, texts, totals, problems))


def _find_texts(folder: epath.Path, manifest: Manifest, given: str | None, problems: _Problems) -> TextFeatures | None:
    """The text features; None if there are none, or they are of other data, which is a problem."""
    texts_folder = connect(given) if given else folder / DEFAULT_CACHE
    file = texts_folder / text_cache.FILE_NAME
    if not file.is_file():
        require("text_cache", given, not given, f"must be a folder with {text_cache.FILE_NAME}")
        return None
    try:
        texts = TextFeatures(texts_folder, read_manifest(CacheManifest, file))
        texts.manifest.check_made_from(texts_folder, manifest, former_ids(folder))
    except ValueError as problem:
        text = str(problem).removeprefix(f"{file}: ").replace(" as in this run", "")
        problems.add(Problem(f"{texts_folder.name}/{file.name}", None, text))
        return None
    return texts


@dataclasses.dataclass
class _Totals:
    """Sums over the findings of all shards. `sums` are those of the train split.

    `has_all_records` says that they are over all records, `is_intact` that there was no problem.
    """

    records: int = 0
    sums: Sums = dataclasses.field(default_factory=dict)
    fields: Counter[str] = dataclasses.field(default_factory=Counter)
    captions: int = 0
    truncated: int = 0
    has_all_records: bool = True
    is_intact: bool = True

    def add(self, shard: Shard, findings: Findings) -> None:
        self.records += findings.records
        self.fields += findings.fields
        self.captions += findings.captions
        self.truncated += findings.truncated
        self.has_all_records &= findings.records == shard.records
        self.is_intact &= not findings.problems
        for name, part in findings.sums.items():
            self.sums[name] = self.sums.get(name, 0) + part


def _check_shards(check: ShardCheck, manifest: Manifest, threads: int, keys: HashTable, problems: _Problems) -> _Totals:
    """Check all shards, in parallel, and note keys and problems in the order of the manifest."""
    totals, shards = _Totals(), manifest.shards
    count = sum(shard.records for shard in shards)
    first = 0  # position of a shard's first record in the whole data set
    # Threads, as most of the time is spent in reading, hashing and numpy, which run beside one another.
    pool = ThreadPoolExecutor(threads, thread_name_prefix="verify")
    try:
        with progress_bar("verifying", "records", count, count) as progress:
            for shard, findings in zip(shards, pool.map(check, shards), strict=True):
                for problem in findings.problems:
                    problems.add(problem)
                totals.add(shard, findings)
                hashes = np.frombuffer(b"".join(findings.keys), np.uint64).reshape(-1, 2)
                keys.add(hashes, first + np.array(findings.keyed, np.int64))
                first += shard.records
                progress.update(shard.records)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return totals


def _repeated_keys(manifest: Manifest, keys: HashTable) -> Iterator[Problem]:
    """Records with the key of an earlier one."""
    ends = np.cumsum([shard.records for shard in manifest.shards])

    def place(index: int) -> tuple[str, int]:
        shard = manifest.shards[position := int(np.searchsorted(ends, index, side="right"))]
        return shard.file, int(index - ends[position] + shard.records)

    for repeats in keys.repeats():
        for index, first in zip(repeats.positions.tolist(), repeats.firsts.tolist(), strict=True):
            (file, record), (first_file, number) = place(index), place(first)
            yield Problem(file, record, f"key: must be unique, {first_file} record {number} has the same")


def _wrong_totals(manifest: Manifest, texts: TextFeatures | None, totals: _Totals) -> Iterator[Problem]:
    """What the manifests say and the records do not, as far as all records could be read."""
    for name, count in totals.fields.items():
        if count < totals.records:
            yield Problem(FILE_NAME, None, f"{name}: all records or none must have it, {count} of {totals.records} do")
    if totals.has_all_records:
        yield from _wrong_statistics(manifest, totals)
    if texts is None or not totals.is_intact:
        return
    for name in ("captions", "truncated"):
        stored, counted = getattr(texts.manifest, name), getattr(totals, name)
        if stored != counted:
            problem = f"{name}: must be {counted} as in its records, got {stored}"
            yield Problem(texts.name(text_cache.FILE_NAME), None, problem)


def _wrong_statistics(manifest: Manifest, totals: _Totals) -> Iterator[Problem]:
    if not totals.sums:
        return
    found = channel_statistics([Sidecar(totals.records, 1, "", totals.sums)])
    scale = np.abs(manifest.channel_mean) + manifest.channel_std
    for name, values in zip(("channel_mean", "channel_std"), found, strict=True):
        stored = np.array(getattr(manifest, name))
        difference = np.abs(values - stored)
        wrong = difference > TOLERANCE * (scale + TOLERANCE)
        if wrong.any():
            i = int(np.argmax(difference))
            text = f"{name}: {wrong.sum()} of {len(wrong)} differ from the records, channel {i} has {stored[i]:.6g}"
            yield Problem(FILE_NAME, None, f"{text}, the records {values[i]:.6g}")


def _summary(
    folder: epath.Path, manifest: Manifest, texts: TextFeatures | None, totals: _Totals, problems: _Problems
) -> str:
    shards = (*manifest.shards, *(texts.manifest.shards if texts else ()))
    size = sum(shard.bytes for shard in shards) / 1e6
    count = sum(shard.records for shard in manifest.shards)
    if problems.count == 0:
        features = " with their text features" if texts else ""
        return f"{folder}: intact: {count:,} records{features} in {len(shards)} files, {size:,.1f} MB"
    found = f"{problems.count:,} problems" if problems.count > 1 else "1 problem"
    return f"{folder}: not intact: {found}; {totals.records:,} of {count:,} records are in order"
