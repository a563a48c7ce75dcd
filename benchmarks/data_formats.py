"""The same records in each format that `benchmarks.data` compares, and how each is read in batches.

Every reader gives batches of float32 latents and their labels, in the order of the files or shuffled.
"""

import contextlib
import functools
import io
import json
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grain
import numpy as np

Batch = dict[str, np.ndarray]
SHAPE = (16, 32, 32)
"""Of SD3's latents at 256 px, in float16 on disk: 32 KB."""
SHARDS = 8
BATCH = 128
THREADS = 4
"""Of readers in one process; `data.num_threads` has this default."""
WORKERS = 2
BUFFER = 1000
"""Samples that WebDataset shuffles among themselves; it reads the tars in a random order."""


def records(count: int) -> Iterator[tuple[np.ndarray, int]]:
    """Latents that differ in one value, as drawing them all takes longer than reading, and labels."""
    latent = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float16)
    for i in range(count):
        latent[0, 0, 0] = i % 1000
        yield latent, i % 10


def write_all(folder: Path, count: int) -> None:
    """Write `count` records, a multiple of the number of shards, in every format."""
    from safetensors.numpy import save_file

    from flowdit.data.shards import write_shard

    for name in ("flowdit", "npy", "safetensors", "webdataset"):
        (folder / name).mkdir(parents=True)
    each = count // SHARDS
    rows = records(count)
    for shard in range(SHARDS):
        part = [(latent.copy(), label) for latent, label in (next(rows) for _ in range(each))]
        write_shard(
            folder / "flowdit" / f"{shard}.array_record", ({"latent": latent, "label": label} for latent, label in part)
        )
        latents, labels = (np.stack(column) for column in zip(*part, strict=True))
        save_file({"latent": latents, "label": labels}, folder / "safetensors" / f"{shard}.safetensors")
        with tarfile.open(folder / "webdataset" / f"{shard}.tar", "w") as tar:
            for i, (latent, label) in enumerate(part, shard * each):
                np.save(folder / "npy" / f"{i:06d}.npy", latent)
                _add(tar, f"{i:06d}.npy", (folder / "npy" / f"{i:06d}.npy").read_bytes())
                _add(tar, f"{i:06d}.cls", str(label).encode())
    (folder / "npy" / "labels.json").write_text(json.dumps([label for _, label in records(count)]))


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))


class Rows:
    """Random access to single records: `rows[i]` is a latent and a label. torch takes it for a data set."""

    def __init__(self, folder: Path, count: int):
        self.folder, self.count = folder, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        raise NotImplementedError


class NpyRows(Rows):
    """A file for each latent."""

    @functools.cached_property
    def labels(self) -> list[int]:
        return json.loads((self.folder / "npy" / "labels.json").read_text())

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return np.load(self.folder / "npy" / f"{index:06d}.npy"), self.labels[index]


class SafetensorsRows(Rows):
    """Slices of tensors, which are mapped into memory. A process or thread opens the files for itself."""

    def __init__(self, folder: Path, count: int):
        super().__init__(folder, count)
        self._own = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "count": self.count}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        from safetensors import safe_open

        if not hasattr(self._own, "files"):
            paths = [self.folder / "safetensors" / f"{shard}.safetensors" for shard in range(SHARDS)]
            files = [safe_open(path, "numpy") for path in paths]
            self._own.files = [(file.get_slice("latent"), file.get_tensor("label")) for file in files]
        latents, labels = self._own.files[index // (self.count // SHARDS)]
        number = index % (self.count // SHARDS)
        return latents[number : number + 1][0], int(labels[number])


def batch_of(rows: list[tuple[np.ndarray, int]]) -> Batch:
    """Stacked records."""
    latents, labels = zip(*rows, strict=True)
    return {"latent": np.stack(latents).astype(np.float32), "label": np.array(labels, np.int32)}


def in_threads(read: Callable[[list[int]], Batch], count: int, is_shuffled: bool) -> Iterator[Batch]:
    """An epoch by the threads that also read flowdit's batches."""
    order = np.random.default_rng(1).permutation(count) if is_shuffled else np.arange(count)
    batches = order.reshape(-1, BATCH).tolist()
    options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=THREADS)
    yield from grain.MapDataset.source(batches).map(read).to_iter_dataset(options)


def flowdit_shards(folder: Path, count: int, is_shuffled: bool) -> Iterator[Batch]:
    """The training stream, or the same records in their order, with all checks of a training run."""
    from flowdit.data.loader import Source
    from flowdit.data.record_files import LocalFiles
    from flowdit.data.schema import LabelField, record_schema
    from flowdit.data.stream import TrainStream

    paths = [folder / "flowdit" / f"{shard}.array_record" for shard in range(SHARDS)]
    schema = record_schema(SHAPE, {"label": LabelField(10)})
    source = Source(LocalFiles(paths), [count // SHARDS] * SHARDS, schema)
    if not is_shuffled:
        yield from in_threads(source.read_batch, count, is_shuffled)
        return
    stream = TrainStream(source, seed=0, batch_size=BATCH, num_threads=THREADS)
    with contextlib.closing(stream):
        for _ in range(count // BATCH):
            yield next(stream)


def files_in_threads(kind: type[Rows], folder: Path, count: int, is_shuffled: bool) -> Iterator[Batch]:
    """Single records by the threads of this process."""
    rows = kind(folder, count)
    yield from in_threads(lambda batch: batch_of([rows[i] for i in batch]), count, is_shuffled)


def torch_loader(kind: type[Rows], folder: Path, count: int, is_shuffled: bool) -> Iterator[Batch]:
    """Single records by torch's processes."""
    from torch.utils.data import DataLoader

    loader = DataLoader(
        kind(folder, count),  # type: ignore[arg-type]
        batch_size=BATCH,
        shuffle=is_shuffled,
        num_workers=WORKERS,
        collate_fn=batch_of,
    )
    yield from loader


def webdataset_tars(num_workers: int, folder: Path, count: int, is_shuffled: bool) -> Iterator[Batch]:
    """Samples of tars, in this process or in torch's, shuffled within a buffer."""
    from torch.utils.data import DataLoader
    from webdataset.compat import WebDataset

    urls = [str(folder / "webdataset" / f"{shard}.tar") for shard in range(SHARDS)]
    data = WebDataset(urls, shardshuffle=SHARDS if is_shuffled else False, seed=1)
    data = data.shuffle(BUFFER, initial=BUFFER) if is_shuffled else data
    data = data.decode().to_tuple("npy", "cls").batched(BATCH, collation_fn=batch_of)
    yield from DataLoader(data, batch_size=None, num_workers=num_workers)  # type: ignore[arg-type]


READERS: dict[str, Callable[[Path, int, bool], Iterator[Batch]]] = {
    f"flowdit shards, {THREADS} threads": flowdit_shards,
    f".npy files, {THREADS} threads": functools.partial(files_in_threads, NpyRows),
    f".npy files, DataLoader of {WORKERS} workers": functools.partial(torch_loader, NpyRows),
    f"safetensors, {THREADS} threads": functools.partial(files_in_threads, SafetensorsRows),
    f"safetensors, DataLoader of {WORKERS} workers": functools.partial(torch_loader, SafetensorsRows),
    "WebDataset, in the process": functools.partial(webdataset_tars, 0),
    f"WebDataset, DataLoader of {WORKERS} workers": functools.partial(webdataset_tars, WORKERS),
}


def read_epoch(name: str, folder: Path, count: int, is_shuffled: bool) -> dict[str, float]:
    """Read all records once: seconds, and what tells whether each was read once."""
    start = time.perf_counter()
    seen = 0
    checksum = 0.0
    for batch in READERS[name](folder, count, is_shuffled):
        seen += len(batch["label"])
        checksum += float(np.asarray(batch["latent"])[:, 0, 0, 0].sum()) + 1000 * float(
            np.sum(np.asarray(batch["label"]))
        )
    return {"seconds": time.perf_counter() - start, "records": seen, "checksum": checksum}


def main() -> None:
    """Serve one reader, after a line "ready": a line on stdin, "sequential" or "shuffled", is an epoch, answered by a line of JSON."""
    name, folder, count = sys.argv[1:4]
    print("ready", flush=True)  # with all imports
    for line in sys.stdin:
        print(json.dumps(read_epoch(name, Path(folder), int(count), line.strip() == "shuffled")), flush=True)


if __name__ == "__main__":
    main()
