"""Resizing compared with Pillow and with TensorFlow 1, whose formula is written out here."""

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from PIL.Image import Resampling

from flowdit.features.resize import resize, resize_as_tensorflow1


def random_images(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (2, height, width, 3), np.uint8)


@pytest.mark.parametrize("sizes", [(64, 64, 224, 224), (256, 200, 112, 96), (31, 50, 50, 31), (40, 40, 40, 40)])
def test_resize_is_pillows(sizes):
    height, width, new_height, new_width = sizes
    images = random_images(height, width)
    images[0, :5] = 255  # beside noise: overshoots are cut
    expected = np.stack(
        [np.asarray(Image.fromarray(i).resize((new_width, new_height), Resampling.BICUBIC)) for i in images]
    )
    ours = np.asarray(resize(jnp.asarray(images), new_height, new_width))
    differences = np.abs(ours - expected)
    assert differences.max() <= 1 and (differences > 0).mean() < 1e-3


@pytest.mark.parametrize("sizes", [(64, 48, 299), (512, 300, 299), (299, 299, 299), (1, 2, 8)])
def test_resize_is_tensorflow1s(sizes):
    height, width, size = sizes
    images = random_images(height, width).astype(np.float64)

    def interpolated(x: np.ndarray, axis: int) -> np.ndarray:
        where = np.arange(size) * (x.shape[axis] / size)
        low = np.floor(where).astype(int)
        high = np.minimum(low + 1, x.shape[axis] - 1)
        share = np.moveaxis((where - low)[:, None, None, None], 0, axis)
        return np.take(x, low, axis) * (1 - share) + np.take(x, high, axis) * share

    expected = interpolated(interpolated(images, 2), 1)
    ours = resize_as_tensorflow1(jnp.asarray(images, jnp.uint8), size)
    np.testing.assert_allclose(ours, expected, atol=0.01)
