"""Opening and cropping images: bit depth, transparency, size and size limits."""

import shutil
import struct
import subprocess
import sys
import textwrap
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flowdit.data import images
from flowdit.data.images import SOURCES, center_crop, load_images

GREY = 0
COLOUR = 2
GREY_ALPHA = 4
"""Colour types of PNG."""


def png(values: np.ndarray, colour: int, transparent: bytes = b"", size: tuple[int, int] | None = None) -> bytes:
    """A PNG of unsigned integers (height, width, ...), as Pillow cannot write all 16-bit types."""
    height, width = values.shape[:2]
    big_endian = values.astype(values.dtype.newbyteorder(">"))
    # Width, height, depth; then compression, filter and interlace, all 0.
    header = struct.pack(">IIBB3x", *(size or (width, height)), 8 * values.itemsize, colour)
    chunks = [
        (b"IHDR", header),
        (b"tRNS", transparent),
        (b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in big_endian))),
        (b"IEND", b""),
    ]
    parts = (
        struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks if d or t == b"IEND"
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.fixture
def opened(tmp_path):
    """Open a file of these bytes, or an image saved by Pillow, as `prepare` does."""

    def open_as(content: bytes | Image.Image, suffix: str = ".png", **options) -> np.ndarray:
        shutil.rmtree(tmp_path / "source", ignore_errors=True)
        path = tmp_path / "source" / "class" / f"image{suffix}"
        path.parent.mkdir(parents=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            content.save(path, **options)
        return np.asarray(load_images(str(tmp_path / "source"), 0.0).open(0))

    return open_as


RAMP = np.arange(0, 2**16, 2**8, dtype=np.uint16).reshape(16, 16) + 200
EXPECTED = np.arange(256).reshape(16, 16)


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=-1)


def test_16_bit_images_are_reduced_to_their_upper_eight_bits(opened):
    colour = np.stack([RAMP, RAMP.T, RAMP[::-1]], -1)
    np.testing.assert_array_equal(opened(png(RAMP, GREY)), grey(EXPECTED))
    np.testing.assert_array_equal(opened(png(colour, COLOUR)), np.stack([EXPECTED, EXPECTED.T, EXPECTED[::-1]], -1))
    for mode, order in (("I;16", "<u2"), ("I;16B", ">u2")):
        image = Image.frombytes(mode, (16, 16), RAMP.astype(order).tobytes())
        np.testing.assert_array_equal(opened(image, ".tif"), grey(EXPECTED))


def test_a_rotated_16_bit_image_is_upright(opened):
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    image = Image.frombytes("I;16", (16, 16), RAMP.astype("<u2").tobytes())
    np.testing.assert_array_equal(opened(image, exif=exif), grey(EXPECTED[::-1, ::-1]))


def test_transparent_16_bit_values_are_white(opened):
    clear = np.equal(RAMP, RAMP[3, 4])
    white, alpha = np.where(clear, 255, EXPECTED), np.where(clear, 0, 2**16 - 1).astype(np.uint16)
    value = struct.pack(">H", RAMP[3, 4])
    np.testing.assert_array_equal(opened(png(RAMP, GREY, value)), grey(white))
    np.testing.assert_array_equal(opened(png(np.stack([RAMP, alpha], -1), GREY_ALPHA)), grey(white))
    np.testing.assert_array_equal(opened(png(grey(RAMP), COLOUR, 3 * value)), grey(white))


def test_other_modes_keep_their_colours(opened):
    half = np.kron([[0, 255]], np.ones((8, 4), np.uint8)).astype(np.uint8)
    np.testing.assert_array_equal(opened(Image.fromarray(half).convert("1")), grey(half))
    np.testing.assert_array_equal(opened(Image.fromarray(half)), grey(half))
    palette = Image.fromarray(half // 255).convert("L")
    palette.putpalette([255, 0, 0, 0, 0, 255])
    red_and_blue = np.where(half[..., None] == 0, (255, 0, 0), (0, 0, 255))
    np.testing.assert_array_equal(opened(palette), red_and_blue)
    white_and_blue = np.where(half[..., None] == 0, (255, 255, 255), (0, 0, 255))
    np.testing.assert_array_equal(opened(palette, transparency=0), white_and_blue)
    # The pixel is half transparent.
    veiled = Image.merge("LA", [Image.fromarray(np.zeros_like(half)), Image.fromarray(np.full_like(half, 128))])
    np.testing.assert_array_equal(opened(veiled), np.full((8, 8, 3), 127))
    ink = Image.merge("CMYK", [Image.fromarray(half), *[Image.new("L", (8, 8))] * 3])
    np.testing.assert_array_equal(opened(ink, ".tif"), np.where(half[..., None] == 0, 255, (0, 255, 255)))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_whose_range_is_not_known_are_refused(opened, mode):
    with pytest.raises(
        ValueError, match=rf"image.tif: cannot be read as an image: has pixels of 32 bits \(mode {mode}\)"
    ):
        opened(Image.new(mode, (8, 8)), ".tif")


def test_an_image_that_declares_too_many_pixels_is_named(opened):
    with pytest.raises(
        ValueError, match="image.png: cannot be read as an image: Image size .900000000 pixels. ex"
    ) as error:
        opened(png(RAMP, GREY, size=(30_000, 30_000)))
    assert "\n" not in str(error.value)


def adm_crop(image: Image.Image, size: int) -> Image.Image:
    """`center_crop_arr` of openai/guided-diffusion, unchanged."""
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.Resampling.BOX)
    scale = size / min(*image.size)
    image = image.resize(tuple(round(x * scale) for x in image.size), resample=Image.Resampling.BICUBIC)
    array = np.asarray(image)
    top, left = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return Image.fromarray(array[top : top + size, left : left + size])


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize(("width", "height"), [(16, 16), (20, 16), (37, 91), (256, 33), (7, 50), (301, 300), (640, 80)])
def test_images_are_cropped_as_adm_does(width, height):
    image = noise(width, height)
    np.testing.assert_array_equal(np.asarray(center_crop(image, 16)), np.asarray(adm_crop(image, 16)))


@pytest.mark.parametrize(("width", "height"), [(401, 7), (2, 99), (3000, 37), (1, 500)])
def test_the_square_of_a_very_long_image_is_nearly_the_same(width, height):
    """On noise, where the order of the passes over columns and rows matters most. A shift would change pixels by tens."""
    image = noise(width, height)
    ours, theirs = (np.asarray(crop(image, 16), int) for crop in (center_crop, adm_crop))
    assert ours.shape == (16, 16, 3) and np.abs(ours - theirs).mean() < 1 and np.abs(ours - theirs).max() < 16


def test_a_very_long_image_takes_no_more_memory_than_it_has():
    script = """
        import resource
        from PIL import Image
        from flowdit.data.images import center_crop
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for size in ((20_000, 2), (2, 20_000)):
            assert center_crop(Image.new("RGB", size), 256).size == (256, 256)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    root = Path(images.__file__).parents[2]
    finished = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, cwd=root, check=True
    )
    assert int(finished.stdout) < 50_000  # kilobytes; the full image at that height would be three million


def test_a_registered_source_takes_its_path_and_settings(monkeypatch):
    asked = []
    image_set = load_images("openmoji", 0.0)
    monkeypatch.setitem(SOURCES, "mine", lambda *settings: asked.append(settings) or image_set)
    assert load_images("mine:/data/file:1", 0.1, "captions.jsonl") is image_set
    load_images("mine", 0.2)
    assert asked == [("/data/file:1", 0.1, "captions.jsonl"), ("", 0.2, "")]
    with pytest.raises(
        ValueError, match="^source: must be openmoji, which is embedded, without a path, got 'openmoji:x'"
    ):
        load_images("openmoji:x", 0.0)
