"""Measured models and their batch sizes on a GPU, without JAX or torch."""

from typing import NamedTuple

LATENT = (4, 32, 32)
TOKENS = 256
"""Latents of an image of 256 pixels, and patches of 2 x 2."""
SAMPLING_STEPS = 25
NUM_CLASSES = 1000

BYTES_PER_PARAMETER = 26
"""Parameter, two moments and EMA in float32, gradient in float32, copies of both in bfloat16, and 2 to spare."""
BYTES_PER_ACTIVATION = 120
"""Kept for the backward pass for each token, channel and block; the compiler keeps about this without `model.remat`."""
LARGEST_BATCH = 512


class Size(NamedTuple):
    """Blocks, width and heads of a DiT."""

    depth: int
    hidden_dim: int
    num_heads: int

    def batch_size(self, memory: float) -> int:
        """The largest power of two of images whose training step is estimated to fit into `memory` bytes; at least 1."""
        parameters = 18 * self.depth * self.hidden_dim**2  # attention 4, MLP 8, modulation 6
        image = BYTES_PER_ACTIVATION * TOKENS * self.depth * self.hidden_dim
        fits = int((memory - BYTES_PER_PARAMETER * parameters) / image)
        return 1 << (min(max(1, fits), LARGEST_BATCH).bit_length() - 1)


SIZES = {"S/2": Size(12, 384, 6), "B/2": Size(12, 768, 12), "XL/2": Size(28, 1152, 16)}
TINY = Size(1, 32, 2)
"""In place of each in a dry run."""
