"""The embedded VAE of the emoji in eight styles: what it loses of held-out pictures, and of fields of one colour."""

import jax
import jax.numpy as jnp
import numpy as np

from flowdit.data.emoji_styles import STYLES, load_pictures, load_sheet
from flowdit.models.vae import AutoencoderKL, load_vae

COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "black": (0, 0, 0), "grey": (0.5, 0.5, 0.5)}


@jax.jit
def reconstruct(vae: AutoencoderKL, images):
    """Images with values in [0, 1], channels first, through latents in float16, as they are stored."""
    stored = lambda image: vae.encode(2 * image - 1).mean.astype(jnp.float16).astype(jnp.float32)
    return jax.vmap(lambda image: jnp.clip(vae.decode(stored(image)), -1, 1) / 2 + 0.5)(images)


def test_reconstructions_of_every_style():
    vae, held_out = load_vae("emoji"), [picture for picture in load_pictures() if picture.held_out]
    psnr = {}
    for style in STYLES:
        tiles = [picture.tile for picture in held_out if picture.style == style][:12]
        images = load_sheet(style)[tiles].transpose(0, 3, 1, 2).astype(np.float32) / 255
        errors = np.square(reconstruct(vae, images) - images).mean(axis=(1, 2, 3))
        psnr[style] = float(-10 * np.log10(errors).mean())
    assert np.mean(list(psnr.values())) >= 29 and min(psnr.values()) >= 26, psnr


def test_fields_of_one_colour():
    images = jnp.stack(
        [jnp.full((3, 64, 64), jnp.asarray(colour, jnp.float32)[:, None, None]) for colour in COLOURS.values()]
    )
    errors = np.abs(reconstruct(load_vae("emoji"), images) - images).max(axis=(1, 2, 3))
    assert errors.max() < 0.1, dict(zip(COLOURS, errors, strict=True))


def test_latents_are_of_unit_scale():
    vae, images = load_vae("emoji"), load_sheet("noto")[:64].transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
    latents = jax.jit(jax.vmap(lambda image: vae.encode(image).mean))(images)
    assert np.all((latents.std(axis=(0, 2, 3)) > 0.5) & (latents.std(axis=(0, 2, 3)) < 2))
    assert vae.config.stride == 4
