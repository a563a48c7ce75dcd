"""The text of a batch: the choice of captions, and their conversion to arrays.

A record has a short and a long caption; one of them is read each time, chosen by a random number in [0, 1) from the
loader, which also says which of its parts are left out (`drop_tags`). A `TextReader` returns the arrays: token ids for
online encoding (`TokenizedCaptions`), or features from a cache (`flowdit.data.text_cache`).
"""

import hashlib
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float64

from flowdit.data.record_files import ShardFiles
from flowdit.hashing import sha256
from flowdit.models.text_encoder import Tokens

CAPTIONS = ("short_caption", "long_caption")


@runtime_checkable
class TextReader(Protocol):
    """Converts captions to the text arrays of a batch. Thread-safe."""

    counts: "CaptionCounts"

    @property
    def files(self) -> ShardFiles | None:
        """The files that it reads, if any."""
        ...

    def read(
        self, indices: Sequence[int], records: Sequence[Mapping[str, Any]], draws: Float64[np.ndarray, " n"]
    ) -> dict[str, np.ndarray]:
        """`text_mask` bool (n, max_length), all False for a record without any caption, and the masked array.

        `records` are those of the data set at `indices`; `draws` are random numbers in [0, 1), one per record.
        """
        ...


class TokenizedCaptions:
    """Reads `text_ids` int32 (n, max_length) and the mask, for an encoder in the training loop."""

    files = None

    def __init__(self, tokenize: Callable[[Sequence[str]], Tokens], long_caption_prob: float, tag_dropout: float = 0.0):
        self._tokenize = tokenize
        self._long_caption_prob, self._tag_dropout = long_caption_prob, tag_dropout
        self.counts = CaptionCounts()

    def read(
        self, indices: Sequence[int], records: Sequence[Mapping[str, Any]], draws: Float64[np.ndarray, " n"]
    ) -> dict[str, np.ndarray]:
        use_long = choose_long(records, draws, self._long_caption_prob)
        captions = chosen_captions(records, use_long)
        if self._tag_dropout:
            captions = [drop_tags(text, draw, self._tag_dropout) for text, draw in zip(captions, draws, strict=True)]
        tokens = self._tokenize(captions)
        self.counts.add(tokens.truncated)
        return {"text_ids": tokens.ids, "text_mask": tokens.mask}


class CaptionCounts:
    """The number of captions read so far, and of those that were cut. Thread-safe."""

    def __init__(self) -> None:
        self.captions = 0
        self.truncated = 0
        self._lock = threading.Lock()

    def add(self, truncated: Bool[np.ndarray, " n"]) -> None:
        """Count a batch of captions, some of which were cut."""
        with self._lock:
            self.captions += len(truncated)
            self.truncated += int(truncated.sum())


def choose_long(
    records: Sequence[Mapping[str, Any]], draws: Float64[np.ndarray, " n"], long_caption_prob: float
) -> Bool[np.ndarray, " n"]:
    """Whether to read the long caption: if the draw is below `long_caption_prob`, or the short caption is empty."""
    short, long = ([bool(record[name].strip()) for record in records] for name in CAPTIONS)
    return (draws < long_caption_prob) & np.array(long, bool) | ~np.array(short, bool)


def chosen_captions(records: Sequence[Mapping[str, Any]], use_long: Bool[np.ndarray, " n"]) -> list[str]:
    """The long caption of the records where `use_long`, the short one of the others."""
    return [record[CAPTIONS[int(long)]] for record, long in zip(records, use_long, strict=True)]


def drop_tags(caption: str, draw: float, probability: float) -> str:
    """The caption without some of its tags, the parts behind its first comma, each left out with `probability`.

    A name must have no comma of its own, as the part of it behind the comma would be a tag.
    Which ones follows from `draw`, in [0, 1).
    """
    name, *tags = caption.split(",")
    uniform = np.random.default_rng(int(draw * 2**53)).random(len(tags))
    return ",".join([name, *(tag for tag, u in zip(tags, uniform.tolist(), strict=True) if u >= probability)])


def caption_key(*captions: str) -> bytes:
    """8 bytes that identify `captions` (BLAKE2b). The lengths of all but the last separate them."""
    parts = [caption.encode() for caption in captions]
    lengths = b"".join(len(part).to_bytes(8, "little") for part in parts[:-1])
    return hashlib.blake2b(lengths + b"".join(parts), digest_size=8).digest()


def captions_key(captions: Iterable[tuple[str, str]]) -> str:
    """SHA-256 (hex) over the (short, long) captions of a data set."""
    return sha256(caption_key(*pair) for pair in captions)
