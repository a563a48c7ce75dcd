"""The embedded VAE: what it makes of held-out images and plain colours, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowdit.data import openmoji
from flowdit.models.vae import VaeConfig, load_vae


def test_shapes_that_do_not_fit_are_refused():
    vae = load_vae("openmoji")
    with pytest.raises(ValueError, match=r"image must have 3 channels and sides divisible by 8, not \(3, 60, 64\)"):
        vae.encode(jnp.zeros((3, 60, 64)))
    with pytest.raises(ValueError, match=r"image must have 3 channels"):
        vae.encode(jnp.zeros((1, 64, 64)))
    with pytest.raises(ValueError, match=r"latent must have 16 channels, not shape \(4, 8, 8\)"):
        vae.decode(jnp.zeros((4, 8, 8)))


def test_config_is_hashable_and_static():
    vae = load_vae("openmoji")
    assert hash(vae.config) == hash(load_vae("openmoji").config)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(vae))
    assert VaeConfig(block_out_channels=(32, 64, 64)).stride == 4


@jax.jit
def reconstruct(vae, images):
    """Images in [-1, 1], (n, 3, height, width), through the posterior mean and back."""
    return jax.vmap(lambda image: vae.decode(vae.encode(image).mean))(images).clip(-1, 1)


@pytest.fixture(scope="module")
def held_out():
    """Held-out images and what the embedded network makes of them, (n, 3, 64, 64) in [0, 1]."""
    data = openmoji.load()
    images = data.tiles[data.held_out].transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
    return (images + 1) / 2, (np.asarray(reconstruct(load_vae("openmoji"), images)) + 1) / 2


def test_embedded_network_reaches_25_db_on_held_out_images(held_out):
    images, reconstructions = held_out
    assert len(images) > 80
    errors = np.square(reconstructions - images).mean((1, 2, 3))
    assert (-10 * np.log10(errors)).mean() >= 25


def test_embedded_network_keeps_chroma(held_out):
    images, reconstructions = held_out
    rgb_to_chroma = np.array([[-0.169, -0.331, 0.5], [0.5, -0.419, -0.081]], np.float32)
    error, signal = (np.einsum("ij,bjhw->bihw", rgb_to_chroma, x) for x in (reconstructions - images, images))
    assert np.sqrt(np.square(error).mean()) < 0.02
    # A grey reconstruction would have the whole signal as its error.
    assert np.sqrt(np.square(error).mean()) < 0.25 * np.sqrt(np.square(signal).mean())


def square_of(colour):
    """What the embedded network makes of a 32x32 square of one colour on white: its colour in the middle, [0, 1]."""
    image = np.ones((1, 3, 64, 64), np.float32)
    image[:, :, 16:48, 16:48] = 2 * np.array(colour, np.float32)[:, None, None] - 1
    return (np.asarray(reconstruct(load_vae("openmoji"), image))[0, :, 24:40, 24:40].mean((1, 2)) + 1) / 2


@pytest.mark.parametrize("channel", [0, 1, 2], ids=["red", "green", "blue"])
def test_embedded_network_keeps_pure_hues(channel):
    # No image has fully saturated colours, so they come back paler, but the hue must hold.
    back = square_of(np.eye(3)[channel])
    others = np.delete(back, channel)
    assert back[channel] > others.max() + 0.5
    assert np.ptp(others) < 0.15


@pytest.mark.parametrize("code", ["ea5a47", "5c9e31", "1e50a0"], ids=["red", "green", "blue"])
def test_embedded_network_brings_the_colours_of_the_images_back(code):
    colour = np.array(list(bytes.fromhex(code))) / 255
    np.testing.assert_allclose(square_of(colour), colour, atol=0.1)
