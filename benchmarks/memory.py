"""Memory that the compiler reserves for a training step of stage 2, by number of micro-batches; nothing is run.

The text model of size S/2 on SD3 latents at 256 px, 120 tokens of T5Gemma-2B, float32, micro-batches of 8.
"""

import jax
import jax.numpy as jnp

from benchmarks.timing import table
from flowdit.conditioning.text import Text
from flowdit.diffusion.objective import FlowMatching
from flowdit.models.config import PixArtConfig
from flowdit.models.pixart import build_pixart
from flowdit.optim import OptimConfig, make_optimizer
from flowdit.training.step import init_state, make_train_step

LATENT = (16, 32, 32)
LENGTH = 120
WIDTH = 2304
MICRO_BATCH = 8
MODEL = PixArtConfig(depth=12, hidden_dim=384, num_heads=6, remat="dots")


def reserved(gradient_accum: int, micro_batch: int = MICRO_BATCH) -> list[str]:
    """Megabytes of the batch, and of the step's temporaries."""
    size = gradient_accum * micro_batch
    batch = {
        "latent": jax.ShapeDtypeStruct((size, *LATENT), jnp.float32),
        "text_features": jax.ShapeDtypeStruct((size, LENGTH, WIDTH), jnp.bfloat16),
        "text_mask": jax.ShapeDtypeStruct((size, LENGTH), jnp.bool_),
    }
    optimizer = make_optimizer(OptimConfig(), num_steps=10)
    state = jax.eval_shape(lambda: init_state(build_pixart(MODEL, LATENT[0], WIDTH, key=jax.random.key(0)), optimizer))
    objective = FlowMatching(Text(), 0.1, mean=(0.0,) * LATENT[0], scale=(1.0,) * LATENT[0])
    step = make_train_step(optimizer, objective, 0, gradient_accum)
    memory = step.lower(state, batch).compile().memory_analysis()
    inputs = sum(leaf.size * leaf.dtype.itemsize for leaf in batch.values())
    return [f"{size}", f"{gradient_accum}", f"{inputs / 1e6:.0f}", f"{memory.temp_size_in_bytes / 1e6:.0f}"]


def measure() -> str:
    rows = [reserved(accum) for accum in (1, 2, 4, 16)] + [reserved(1, 4 * MICRO_BATCH)]
    return table(["batch", "micro-batches", "batch itself, MB", "temporaries, MB"], rows)
