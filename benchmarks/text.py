"""The cost of text in a training step: features from the cache or from the frozen encoder in the loop, float32 on the
CPU.

The encoder has T5Gemma-S's shape (8 layers, 512 wide) and random weights; the text model is the demo's.
"""

import contextlib
import dataclasses
import itertools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import equinox as eqx
import jax

from benchmarks.timing import interleave, table
from flowdit.conditioning.base import Batch
from flowdit.conditioning.text import Text, Training
from flowdit.data.captions import TextReader, TokenizedCaptions
from flowdit.data.loader import DataConfig, open_source
from flowdit.data.manifest import Manifest
from flowdit.data.prepare import PrepareConfig, prepare
from flowdit.data.schema import CAPTION_FIELDS, record_schema
from flowdit.data.stream import TrainStream
from flowdit.data.text_cache import open_cache
from flowdit.data.text_features import write_cache
from flowdit.diffusion.objective import FlowMatching
from flowdit.models.config import PixArtConfig
from flowdit.models.pixart import build_pixart
from flowdit.models.t5gemma import T5GemmaEncoder
from flowdit.models.t5gemma_config import T5GemmaConfig
from flowdit.models.text_encoder import TextConfig, TextEncoder, load_text_encoder
from flowdit.optim import OptimConfig, make_optimizer
from flowdit.sharding import MeshConfig, make_mesh, prefetch_to_device
from flowdit.training.step import init_state, make_train_step

BATCH_SIZE = 64
STEPS = 4
LENGTH = 120
DEMO = PixArtConfig(depth=6, hidden_dim=128, num_heads=4)
SMALL = {"num_hidden_layers": 8, "hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8}


def random_encoder() -> TextEncoder:
    """The tokenizer of `wordllama` with a network of T5Gemma-S's shape."""
    words = load_text_encoder(TextConfig("wordllama", LENGTH, "float32"))
    config = T5GemmaConfig(
        **SMALL,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=len(words.network.weight),
        query_pre_attn_scalar=64,
        layer_types=("sliding_attention", "full_attention") * 4,
    )
    shapes = eqx.filter_eval_shape(T5GemmaEncoder, config)
    keys = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves(shapes))))
    network = jax.tree.map(lambda leaf: 0.03 * jax.random.normal(next(keys), leaf.shape), shapes)
    return dataclasses.replace(words, name="random", width=config.hidden_size, network=network)


def training(
    folder: Path, manifest: Manifest, width: int, text: TextReader, encode: Callable[[Batch], Batch]
) -> Callable[[], None]:
    """Return a function that runs `STEPS` steps, from reading shards to new weights."""
    mesh, optimizer = make_mesh(MeshConfig()), make_optimizer(OptimConfig(), num_steps=1000)
    channels = manifest.latent_shape[0]
    objective = FlowMatching(Text(), 0.1, mean=(0.0,) * channels, scale=(1.0,) * channels)
    train_step = make_train_step(optimizer, objective, seed=0)
    build = lambda: init_state(build_pixart(DEMO, channels, width, key=jax.random.key(0)), optimizer)
    state = jax.jit(build)()
    source = open_source(folder, manifest, schema=record_schema(manifest.latent_shape, CAPTION_FIELDS), text=text)

    def run() -> None:
        nonlocal state
        with contextlib.closing(TrainStream(source, seed=0, batch_size=BATCH_SIZE)) as stream:
            for batch, _ in itertools.islice(prefetch_to_device(mesh, stream, encode, ahead=0), STEPS):
                state, metrics = train_step(state, batch)
        jax.block_until_ready((state, metrics))

    return run


def measure() -> str:
    encoder = random_encoder()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "data"
        manifest = prepare(PrepareConfig(out=str(folder)))
        start = time.perf_counter()
        write_cache(folder / "text_features", folder, manifest, encoder)
        caching = time.perf_counter() - start
        cached = open_cache(folder / "text_features", manifest, "train", encoder, 0.5)
        online = TokenizedCaptions(encoder.tokenize, 0.5)
        encode = Text(training=Training(encoder, DataConfig(), make_mesh(MeshConfig()), BATCH_SIZE)).encode
        contenders = {
            "features from the cache": training(folder, manifest, encoder.width, cached, lambda batch: batch),
            "encoder in the loop": training(folder, manifest, encoder.width, online, encode),
        }
        timings = interleave(contenders, rounds=4)
    rows = [
        [kind, t.rate(STEPS * BATCH_SIZE), t.ratio(timings["features from the cache"])] for kind, t in timings.items()
    ]
    rows.append([f"(writing the cache: {caching:.0f} s, {sum(s.records for s in manifest.shards)} records)", "", ""])
    return table([f"batch {BATCH_SIZE}, {LENGTH} tokens", "images/s", "time / cached"], rows)
