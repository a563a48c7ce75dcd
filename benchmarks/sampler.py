"""Images per second of the embedded model's sampler, with and without decoding to pixels."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import interleave, table
from benchmarks.workload import EMBEDDED, EMBEDDED_LATENT, NUM_CLASSES
from flowdit.diffusion.sampling import SamplerConfig, sample
from flowdit.inference.images import make_decoder
from flowdit.models.dit import build_dit
from flowdit.models.vae import load_vae
from flowdit.sharding import make_local_mesh

BATCH_SIZE = 16
SAMPLER = SamplerConfig(solver="heun", steps=20, guidance=3.0)


def measure() -> str:
    model = build_dit(EMBEDDED, EMBEDDED_LATENT[0], NUM_CLASSES, key=jax.random.key(0))
    noise = jax.random.normal(jax.random.key(1), (BATCH_SIZE, *EMBEDDED_LATENT))
    labels, channels = jnp.arange(BATCH_SIZE), EMBEDDED_LATENT[0]
    null = jnp.full_like(labels, NUM_CLASSES)
    decode = make_decoder(load_vae("openmoji"), (0.0,) * channels, (1.0,) * channels, make_local_mesh())

    @jax.jit
    def draw(model, noise):
        return sample(model, noise, labels, null, SAMPLER)

    contenders = {
        "latents": lambda: jax.block_until_ready(draw(model, noise)),
        "latents and VAE decode": lambda: decode(np.asarray(draw(model, noise).latents), BATCH_SIZE),
    }
    timings = interleave(contenders, rounds=4)
    evaluations = int(draw(model, noise).evaluations[0])
    rows = [[name, t.rate(BATCH_SIZE), t.shown(), t.ratio(timings["latents"])] for name, t in timings.items()]
    title = f"batch {BATCH_SIZE}, {SAMPLER.solver} {SAMPLER.steps} steps, guided ({evaluations} evaluations)"
    return table([title, "images/s", "time per batch", "time / latents alone"], rows)
