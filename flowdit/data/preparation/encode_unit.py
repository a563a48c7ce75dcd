"""The second pass: a unit of work becomes one shard of each split, written whole or not at all.

What is written depends on the unit, the selection and the settings only, so that a unit may be done again at any time.
"""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
from jaxtyping import UInt8

from flowdit.data.encode_images import EncodeBatch, Encoded, latent_encoder
from flowdit.data.images import ImageError, cover_crop, open_image, seen_part
from flowdit.data.manifest import Bucket, Split
from flowdit.data.preparation.scan import content_hash, shown_key, weight
from flowdit.data.preparation.selection import Chosen, read_chosen
from flowdit.data.preparation.spool import Spool
from flowdit.data.preparation.threads import read_ahead
from flowdit.data.progress import advance
from flowdit.data.rejected import Rejected
from flowdit.data.shards import Tally, read_sidecar, write_encoded
from flowdit.data.sources.base import Row, Source, Unit, is_held_out
from flowdit.fields import about
from flowdit.models.vae import AutoencoderKL, load_vae

SPLITS: tuple[Split, ...] = get_args(Split)


def splits_of(unit: Unit) -> tuple[Split, ...]:
    """The splits of which a unit has rows."""
    return SPLITS if unit.split is None else (unit.split,)


def is_finished(folder: Path, unit: Unit) -> bool:
    """Whether all shards of a unit are written."""
    return all(read_sidecar(folder / unit.file(split)) is not None for split in splits_of(unit))


@dataclass(frozen=True)
class EncodeSettings:
    """What a record depends on, beside its image.

    `sizes` are those of the buckets, or the one size of all images; `bucket_of` has their numbers for the buckets in
    the units' files. `kept_columns` are copied to the records.
    """

    vae: str
    vae_fingerprint: str
    sizes: tuple[Bucket, ...]
    bucket_of: tuple[int, ...]
    has_buckets: bool
    class_names: tuple[str, ...]
    has_captions: bool
    kept_columns: tuple[str, ...]
    held_out_fraction: float
    batch_size: int
    max_pixels: int
    dtype: str
    posterior_std: bool
    hflip: bool


class Done(NamedTuple):
    """The result of a unit: its images, and those of them that cannot be read."""

    images: int
    rejected: tuple[Rejected, ...]


@functools.lru_cache(1)
def vae_by_name(name: str) -> AutoencoderKL:
    """The VAE, loaded once in a process. Raises `ValueError` if it cannot be."""
    with about("vae"):
        return load_vae(name)


@dataclass(frozen=True)
class EncoderMaker:
    """Makes the function that encodes a unit, in any process."""

    source: Source
    folder: Path
    settings: EncodeSettings

    def __call__(self) -> "UnitEncoder":
        vae = vae_by_name(self.settings.vae)
        if vae.fingerprint != self.settings.vae_fingerprint:
            raise ValueError(f"vae: {self.settings.vae} is another network on this machine than where the run began")
        return UnitEncoder(self.source, self.folder, self.settings, latent_encoder(vae, self.settings.batch_size))


@dataclass(frozen=True)
class UnitEncoder:
    """Encodes units and writes their shards."""

    source: Source
    folder: Path
    settings: EncodeSettings
    encode_batch: EncodeBatch

    def __call__(self, unit: Unit) -> Done:
        """Encode a unit. Raises `ValueError` in one line for bad input, `OSError` if its shards cannot be written."""
        chosen = read_chosen(self.folder, unit)
        rejected: list[Rejected] = []
        with Spool(self.folder) as spool:
            for latents in self._encoded(unit, chosen, rejected):
                spool.add((latents.ready.split, latents.ready.bucket), self._record(latents))
            self._write(unit, spool, rejected)
        return Done(len(chosen.rows), tuple(rejected))

    @functools.cached_property
    def _class_numbers(self) -> dict[str | None, int]:
        return {name: number for number, name in enumerate(self.settings.class_names)}

    def _write(self, unit: Unit, spool: Spool, rejected: list[Rejected]) -> None:
        for number, split in enumerate(splits_of(unit)):
            groups = [(split, bucket) for bucket in range(len(self.settings.sizes))]
            total = Tally()
            for group in groups:
                total.include(spool.tally(group))
            counts = [spool.tally(group).records for group in groups]
            write_encoded(
                self.folder / unit.file(split),
                (record for group in groups for record in spool.records(group)),
                total,
                rejected=() if number else rejected,
                buckets=counts if self.settings.has_buckets else (),
            )

    def _encoded(self, unit: Unit, chosen: Chosen, rejected: list[Rejected]) -> Iterator["_Latents"]:
        """The latents of a unit, in batches of one bucket. The next batch is begun before the last one is waited for."""
        waiting: dict[int, list[_Ready]] = {}
        flying: tuple[list[_Ready], Encoded] | None = None
        for ready in self._ready(unit, chosen):
            if isinstance(ready, Rejected):
                rejected.append(ready)
                advance(1)
                continue
            batch = waiting.setdefault(ready.bucket, [])
            batch += self._copies(ready)
            while len(batch) >= self.settings.batch_size:
                begun = self._begin(batch[: self.settings.batch_size])
                del batch[: self.settings.batch_size]
                yield from self._landed(flying)
                flying = begun
        for _, batch in sorted(waiting.items()):
            if batch:
                begun = self._begin(batch)
                yield from self._landed(flying)
                flying = begun
        yield from self._landed(flying)

    def _begin(self, batch: "list[_Ready]") -> "tuple[list[_Ready], Encoded]":
        return batch, self.encode_batch(np.stack([ready.pixels for ready in batch]))

    def _landed(self, flying: "tuple[list[_Ready], Encoded] | None") -> Iterator["_Latents"]:
        if flying is None:
            return
        batch, encoded = flying
        mean, std = (values.astype(self.settings.dtype) for values in encoded.ready())
        if not (np.isfinite(mean).all() and np.isfinite(std).all()):
            raise ValueError(f"dtype: the VAE's latents must be finite in {self.settings.dtype}: check the VAE")
        yield from map(_Latents, batch, mean, std)
        advance(sum(not ready.mirrored for ready in batch))

    def _copies(self, ready: "_Ready") -> "list[_Ready]":
        if not self.settings.hflip or ready.split != "train":
            return [ready]
        return [ready, ready._replace(pixels=ready.pixels[:, ::-1], mirrored=True)]

    def _ready(self, unit: Unit, chosen: Chosen) -> "Iterator[_Ready | Rejected]":
        """The chosen images, decoded and cropped."""
        places = {row: i for i, row in enumerate(chosen.rows.tolist())}
        if not places:
            return
        seen = 0
        for ready in read_ahead(
            lambda numbered: self._look(unit, numbered[1], chosen, places[numbered[0]]),
            (numbered for numbered in self.source.read(unit, places.keys()) if numbered[0] in places),
            ahead=max(2 * self.settings.batch_size, 16),
            weight=weight,
        ):
            seen += 1
            yield ready
        if seen != len(places):
            raise ValueError(f"source: unit {unit.name} had {len(places)} images at first and now {seen}: it changed")

    def _look(self, unit: Unit, row: Row | Rejected, chosen: Chosen, place: int) -> "_Ready | Rejected":
        """Raises `ValueError` for an image that is not the one of the first pass, as its size may be another."""
        if isinstance(row, Rejected):
            return row
        content = content_hash(row)
        if content != chosen.contents[place].tobytes():
            raise ValueError(f"source: {shown_key(row.key)} changed since it was first read: give another out folder")
        bucket = self.settings.bucket_of[chosen.buckets[place]]
        size = self.settings.sizes[bucket]
        try:
            image = open_image(row.image, self.settings.max_pixels)
            pixels = np.asarray(cover_crop(image, size.height, size.width))
        except ImageError as error:
            return Rejected(shown_key(row.key), str(error))
        held_out = is_held_out(row.key, self.settings.held_out_fraction)
        full = (image.height, image.width)
        fields = {
            **self._condition(row),
            "key": shown_key(row.key),
            "content_hash": content,
            "image_size": np.array(full, np.int32),
            "crop": np.array(seen_part(full, size.height, size.width), np.int32),
            **{f"columns.{name}": row.columns.get(name) for name in self.settings.kept_columns},
        }
        return _Ready(pixels, bucket, unit.split or ("validation" if held_out else "train"), fields)

    def _condition(self, row: Row) -> dict[str, Any]:
        settings = self.settings
        label = {"label": self._class_numbers[row.label]} if settings.class_names else {}
        short, long = row.captions or ("", "")
        return label | ({"short_caption": short, "long_caption": long} if settings.has_captions else {})

    def _record(self, latents: "_Latents") -> dict[str, Any]:
        ready = latents.ready
        std = {"latent_std": latents.std} if self.settings.posterior_std else {}
        return {"latent": latents.mean, **ready.fields, **std, **({"mirrored": True} if ready.mirrored else {})}


class _Ready(NamedTuple):
    """An image that can be encoded, and the fields of its record."""

    pixels: UInt8[np.ndarray, "height width 3"]
    bucket: int
    split: Split
    fields: Mapping[str, Any]
    mirrored: bool = False


class _Latents(NamedTuple):
    ready: _Ready
    mean: np.ndarray
    std: np.ndarray
