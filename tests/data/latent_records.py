"""A small data set of random latents, written without any VAE, and a small text encoder."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from tokenizers import Tokenizer, models, pre_tokenizers

from flowdit.data.loader import Source, open_source
from flowdit.data.manifest import Manifest, Shard, Split, VaeInfo
from flowdit.data.records import encode
from flowdit.data.schema import CAPTION_FIELDS, LabelField, record_schema
from flowdit.hashing import file_sha256
from flowdit.models.text_encoder import TextEncoder, TokenTable

LATENT_SHAPE = (4, 2, 2)
NUM_CLASSES = 5


def record_of(index: int) -> dict:
    """A record that can be identified by its values: all are `index`."""
    return {"latent": np.full(LATENT_SHAPE, index, np.float16), "label": index % NUM_CLASSES}


def captioned(index: int) -> dict:
    """`record_of` with captions that name the record and their own length: one word, and one to six words."""
    long = " ".join([f"w{index}", "long", *"abcd"[: index % 5]])
    return record_of(index) | {"short_caption": f"w{index}", "long_caption": long}


def open_labelled(folder: Path, split: Split = "train") -> Source:
    manifest = Manifest.read(folder)
    schema = record_schema(manifest.latent_shape, {"label": LabelField(manifest.num_classes)}, manifest.has_latent_std)
    return open_source(folder, manifest, split, schema=schema)


def open_captioned(folder: Path, text, split: Split = "train") -> Source:
    manifest = Manifest.read(folder)
    return open_source(folder, manifest, split, schema=record_schema(manifest.latent_shape, CAPTION_FIELDS), text=text)


def word_encoder(*, width: int = 3, dtype: str = "bfloat16", max_length: int = 4, seed: int = 0) -> TextEncoder:
    """One token per word; each token has distinct features."""
    words = [f"w{i}" for i in range(200)] + ["long", *"abcd"]
    tokenizer = Tokenizer(models.WordLevel({"": 0} | {word: i for i, word in enumerate(words, 1)}, unk_token=""))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    table = np.random.default_rng(seed).standard_normal((len(words) + 1, width))
    return TextEncoder(
        name="words",
        fingerprint=f"{seed:016x}",
        dtype=dtype,
        max_length=max_length,
        width=width,
        network=TokenTable(jnp.asarray(table, dtype)),
        tokenizer=tokenizer,
        add_special_tokens=False,
        pad_id=0,
    )


def write_dataset(
    folder: Path, shards: dict[Split, list[list[dict]]], has_latent_std: bool = False, has_captions: bool = False
) -> Manifest:
    """Write the records of each shard of each split, and the manifest."""
    folder.mkdir(exist_ok=True)
    entries = []
    for split, parts in shards.items():
        for i, records in enumerate(parts):
            file = f"{split}-{i:05d}-of-{len(parts):05d}.array_record"
            writer = ArrayRecordWriter(str(folder / file), "group_size:1")
            for record in records:
                writer.write(encode(record))
            writer.close()
            size, digest = (folder / file).stat().st_size, file_sha256(folder / file)
            entries.append(Shard(file, split, len(records), size, digest))
    manifest = Manifest(
        latent_shape=LATENT_SHAPE,
        latent_dtype="float16",
        has_latent_std=has_latent_std,
        vae=VaeInfo(name="none", fingerprint="0", shift=0.0, scale=1.0, stride=8),
        image_size=16,
        channel_mean=(0.0,) * 4,
        channel_std=(1.0,) * 4,
        class_names=tuple("abcde"),
        has_captions=has_captions,
        shards=tuple(entries),
        license="",
        attribution="",
    )
    manifest.write(folder)
    return manifest
