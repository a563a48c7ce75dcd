"""What the features of the default scores cost beside drawing the images, for a DiT-B/2, in one process."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.sizes import NUM_CLASSES, SIZES
from benchmarks.timing import interleave, table
from flowdit.diffusion.sampling import SamplerConfig
from flowdit.features import FeatureWeights, load_features
from flowdit.inference.sampler import make_draw
from flowdit.models.compute import FLOAT32
from flowdit.models.config import DiTConfig
from flowdit.models.dit import build_dit
from flowdit.models.vae import load_vae
from flowdit.scores.extraction import Extraction, on_host
from flowdit.sharding import make_local_mesh

BATCH_SIZE = 2
LATENT = (16, 32, 32)
SAMPLER = SamplerConfig(solver="euler", steps=2, guidance=1.5)
"""Fewer steps than anyone draws with, so that the features weigh more than they do in use."""


def measure() -> str:
    mesh, channels = make_local_mesh(), LATENT[0]
    config = DiTConfig(**SIZES["B/2"]._asdict(), patch_size=2)
    model = build_dit(config, channels, NUM_CLASSES, key=jax.random.key(0))
    draw = make_draw(LATENT, SAMPLER, "velocity", FLOAT32, mesh)
    numbers, labels = np.arange(BATCH_SIZE, dtype=np.int32), jnp.arange(BATCH_SIZE)
    vae, affine = load_vae("openmoji"), ((0.0,) * channels, (1.0,) * channels)
    networks = [load_features("efficientnet", FeatureWeights())]
    see = {
        "drawing and decoding": Extraction([], mesh).from_latents(vae, *affine, keep_images=True),
        "drawing, decoding and features": Extraction(networks, mesh).from_latents(vae, *affine),
    }

    def run(see) -> None:
        samples = draw(model, np.uint32(0), numbers, labels, jnp.full_like(labels, NUM_CLASSES))
        on_host(see(samples.latents), BATCH_SIZE)

    timings = interleave({name: lambda see=some: run(see) for name, some in see.items()}, rounds=3)
    first = timings["drawing and decoding"]
    rows = [[name, t.rate(BATCH_SIZE), t.shown(), t.ratio(first)] for name, t in timings.items()]
    size = " x ".join(map(str, LATENT))
    title = f"DiT-B/2, latents {size}, batch {BATCH_SIZE}, {SAMPLER.solver} {SAMPLER.steps} steps, guided"
    return table([title, "images/s", "time per batch", "time / drawing"], rows)
