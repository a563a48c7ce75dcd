"""flowdit: flow-matching Diffusion Transformers in JAX and Equinox, from latents to pictures."""

__version__ = "0.1.0"
