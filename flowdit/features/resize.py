"""Resizing 8-bit images inside a jitted function, with the results of Pillow or of TensorFlow 1.

Both are separable, so a resize is two products with small matrices that are computed here by NumPy. Source of the
first: Pillow's `Resample.c`; of the second: TensorFlow's `resize_bilinear_op.cc`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8


def cubic(x: np.ndarray, a: float) -> np.ndarray:
    """The cubic convolution kernel (Keys 1981) of parameter `a` at distances `x` in pixels."""
    x = np.abs(x)
    near, far = ((a + 2) * x - (a + 3)) * x**2 + 1, (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def antialiased(size: int, new_size: int) -> Float[np.ndarray, "new_size size"]:
    """The matrix of an antialiased bicubic resize: for fewer pixels the kernel is stretched over those that it averages."""
    scale = size / new_size
    stretch = max(scale, 1.0)
    centres = (np.arange(new_size) + 0.5) * scale
    first = np.maximum((centres - 2 * stretch + 0.5).astype(int), 0)
    end = np.minimum((centres + 2 * stretch + 0.5).astype(int), size)
    pixels = np.arange(size)[None]
    weights = cubic((pixels + 0.5 - centres[:, None]) / stretch, a=-0.5)
    weights = np.where((pixels >= first[:, None]) & (pixels < end[:, None]), weights, 0.0)
    return weights / weights.sum(1, keepdims=True)


def interpolated(size: int, new_size: int) -> Float[np.ndarray, "new_size size"]:
    """The matrix of PyTorch's bicubic interpolation: not antialiased, a sharper kernel, the border repeated."""
    where = (np.arange(new_size) + 0.5) * size / new_size - 0.5
    matrix = np.zeros((new_size, size))
    for offset in range(-1, 3):
        pixel = np.floor(where) + offset
        column = np.clip(pixel, 0, size - 1).astype(int)
        np.add.at(matrix, (np.arange(new_size), column), cubic(where - pixel, a=-0.75))
    return matrix


def resize(images: UInt8[Array, "n height width 3"], height: int, width: int) -> Float[Array, "n {height} {width} 3"]:
    """Bicubic as in Pillow: antialiased, along rows then columns, each rounded to 8 bits. Integers in [0, 255].

    Pillow computes with integers, so a sum that is nearly between two of them may differ by 1. From version 13 on it
    begins with the columns where that is faster; that case, never of square images, is not followed.
    """
    if images.shape[1:3] == (height, width):
        return images.astype(jnp.float32)
    rows = _fixed_point(antialiased(images.shape[1], height))
    columns = _fixed_point(antialiased(images.shape[2], width))
    across = _to_8_bits(_along_rows(images.astype(jnp.float32), columns))
    return _to_8_bits(_along_columns(across, rows))


def resize_as_tensorflow1(images: UInt8[Array, "n height width 3"], size: int) -> Float[Array, "n {size} {size} 3"]:
    """Bilinear as in TensorFlow 1 with `align_corners=False`: pixels at their corners, no antialiasing, no rounding."""
    across = _along_rows(images.astype(jnp.float32), _at_corners(images.shape[2], size))
    return _along_columns(across, _at_corners(images.shape[1], size))


def _at_corners(size: int, new_size: int) -> Float[np.ndarray, "new_size size"]:
    position = np.arange(new_size, dtype=np.float32) * np.float32(size / new_size)
    low = position.astype(int)
    high = np.minimum(low + 1, size - 1)
    share = (position - low)[:, None]
    return np.eye(size)[low] * (1 - share) + np.eye(size)[high] * share


def _fixed_point(weights: np.ndarray) -> np.ndarray:
    """Weights rounded as Pillow's, which have 22 bits behind the point."""
    return np.round(weights * 2**22) / 2**22


def _along_rows(images: Float[Array, "n height width 3"], matrix: np.ndarray) -> Float[Array, "n height new_width 3"]:
    return _product("nhwc,vw->nhvc", images, matrix)


def _along_columns(
    images: Float[Array, "n height width 3"], matrix: np.ndarray
) -> Float[Array, "n new_height width 3"]:
    return _product("nhwc,uh->nuwc", images, matrix)


def _product(axes: str, images: Array, matrix: np.ndarray) -> Array:
    return jnp.einsum(axes, images, jnp.asarray(matrix, jnp.float32), precision=jax.lax.Precision.HIGHEST)


def _to_8_bits(images: Float[Array, "n height width 3"]) -> Float[Array, "n height width 3"]:
    return jnp.clip(jnp.floor(images + 0.5), 0, 255)
