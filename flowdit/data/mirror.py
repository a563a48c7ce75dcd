"""Copies of the shards of an object store on the local disk, as ArrayRecord reads local files only."""

import fcntl
import logging
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from etils import epath

from flowdit.data.manifest import HASH_LIMIT_BYTES, ManifestError, Shard, verify_shards
from flowdit.data.progress import progress_bar
from flowdit.fields import FieldError
from flowdit.hashing import file_sha256, fingerprint
from flowdit.storage import download, is_remote, reason

logger = logging.getLogger(__name__)

DOWNLOADS = 4
"""Shards that are downloaded at the same time."""


def local_folder(folder: epath.PathLike, shards: Sequence[Shard], local_dir: str | None) -> Path:
    """The local folder of these shards: `folder`, or one in `local_dir` whose name depends on their contents."""
    if not is_remote(folder):
        return Path(folder)
    contents = fingerprint("".join(f"{shard.file} {shard.sha256}\n" for shard in shards))
    return cache_folder(local_dir) / f"{epath.Path(folder).name}-{contents}"


def cache_folder(local_dir: str | None) -> Path:
    """`local_dir`, or the default one in the user's cache folder."""
    cache = Path(local_dir or os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return cache if local_dir else cache / "flowdit" / "data"


def provide_shards(
    folder: epath.PathLike,
    shards: Sequence[Shard],
    local_dir: str | None,
    *,
    hashes: bool = False,
    limit: int = HASH_LIMIT_BYTES,
) -> Path:
    """Verify the shards of a local folder (`manifest.verify`), or download those that its copy lacks. Returns
    `local_folder`.

    A download is compared with the hash in the manifest, unless damaged records are allowed (`limit` 0). Several
    processes may share a copy: one downloads, the others wait. Raises `ManifestError` for a shard that is missing or
    changed, `FieldError` for a disk that is full or cannot be written.
    """
    local = local_folder(folder, shards, local_dir)
    if not is_remote(folder):
        verify_shards(folder, shards, hashes=hashes, limit=limit)
        return local
    hashes = hashes or sum(shard.bytes for shard in shards) <= limit
    try:
        local.mkdir(parents=True, exist_ok=True)
        with (local / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            missing = [shard for shard in shards if not _is_complete(local / shard.file, shard, hashes)]
            if missing:
                _download_all(epath.Path(folder), local, missing, are_checked=limit > 0)
    except OSError as problem:
        raise FieldError("data.local_dir", f"{local} cannot be written: {reason(problem)}") from None
    return local


def _is_complete(file: Path, shard: Shard, hashes: bool) -> bool:
    if not file.is_file() or file.stat().st_size != shard.bytes:
        return False
    return not hashes or file_sha256(file) == shard.sha256


def _download_all(folder: epath.Path, local: Path, shards: Sequence[Shard], *, are_checked: bool) -> None:
    size, free = sum(shard.bytes for shard in shards), shutil.disk_usage(local).free
    if size > free:
        needed = f"{size / 1e9:.1f} GB are needed for the shards of {folder}"
        raise FieldError("data.local_dir", f"{needed}, {local} has {free / 1e9:.1f} GB free")
    logger.info("%s: copying %d shards, %.1f GB, to %s", folder, len(shards), size / 1e9, local)
    with progress_bar("copying", "shards", len(shards), len(shards)) as progress, ThreadPoolExecutor(DOWNLOADS) as pool:
        for _ in pool.map(lambda shard: _download(folder / shard.file, local / shard.file, shard, are_checked), shards):
            progress.update()


def _download(source: epath.Path, target: Path, shard: Shard, is_checked: bool) -> None:
    """The name of a complete file is its own, so that an interrupted download is not taken for one."""
    partial = target.with_name(f"{target.name}.part")
    fetch_shard(source, partial, shard, is_checked)
    partial.replace(target)


def fetch_shard(source: epath.Path, target: Path, shard: Shard, is_checked: bool) -> None:
    """Copy a shard to a local file, and compare its size and, if it `is_checked`, its hash. Raises `ManifestError`."""
    try:
        download(source, target)
    except FileNotFoundError:
        raise ManifestError(f"{source}: is missing: the data changed since it was prepared") from None
    except OSError as problem:
        raise ManifestError(f"{source}: cannot be copied to {target}: {reason(problem)}") from None
    if (size := target.stat().st_size) != shard.bytes:
        raise ManifestError(f"{source}: must have {shard.bytes} bytes, has {size}")
    if is_checked and (digest := file_sha256(target)) != shard.sha256:
        raise ManifestError(f"{source}: must have sha256 {shard.sha256}, has {digest}")
