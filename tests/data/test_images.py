"""Opening and cropping images: bit depth, transparency, size and size limits."""

import io
import struct
import subprocess
import sys
import textwrap
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flowdit.data import images
from flowdit.data.images import ImageError, center_crop, cover_crop, image_size, open_image, seen_part

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


def saved(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def opened(content: bytes | Image.Image, kind: str = "PNG", **options) -> np.ndarray:
    """The pixels of a file of these bytes, or of an image saved by Pillow, as `prepare` sees them."""
    data = content if isinstance(content, bytes) else saved(content, kind, **options)
    pixels = np.asarray(open_image(data))
    assert image_size(data) == pixels.shape[:2]
    return pixels


RAMP = np.arange(0, 2**16, 2**8, dtype=np.uint16).reshape(16, 16) + 200
EXPECTED = np.arange(256).reshape(16, 16)


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=-1)


def test_16_bit_images_are_reduced_to_their_upper_eight_bits():
    colour = np.stack([RAMP, RAMP.T, RAMP[::-1]], -1)
    np.testing.assert_array_equal(opened(png(RAMP, GREY)), grey(EXPECTED))
    np.testing.assert_array_equal(opened(png(colour, COLOUR)), np.stack([EXPECTED, EXPECTED.T, EXPECTED[::-1]], -1))
    for mode, order in (("I;16", "<u2"), ("I;16B", ">u2")):
        image = Image.frombytes(mode, (16, 16), RAMP.astype(order).tobytes())
        np.testing.assert_array_equal(opened(image, "TIFF"), grey(EXPECTED))


def test_a_rotated_16_bit_image_is_upright():
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    image = Image.frombytes("I;16", (16, 16), RAMP.astype("<u2").tobytes())
    np.testing.assert_array_equal(opened(image, exif=exif), grey(EXPECTED[::-1, ::-1]))


def test_transparent_16_bit_values_are_white():
    clear = np.equal(RAMP, RAMP[3, 4])
    white, alpha = np.where(clear, 255, EXPECTED), np.where(clear, 0, 2**16 - 1).astype(np.uint16)
    value = struct.pack(">H", RAMP[3, 4])
    np.testing.assert_array_equal(opened(png(RAMP, GREY, value)), grey(white))
    np.testing.assert_array_equal(opened(png(np.stack([RAMP, alpha], -1), GREY_ALPHA)), grey(white))
    np.testing.assert_array_equal(opened(png(grey(RAMP), COLOUR, 3 * value)), grey(white))


def test_other_modes_keep_their_colours():
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
    np.testing.assert_array_equal(opened(ink, "TIFF"), np.where(half[..., None] == 0, 255, (0, 255, 255)))


def marker(data: bytes, code: int) -> slice:
    """Where a JPEG has the segment of this marker."""
    start = data.index(bytes([0xFF, code]))
    return slice(start, start + 2 + int.from_bytes(data[start + 2 : start + 4], "big"))


def test_inks_of_a_jpeg_are_inverted_only_if_it_is_adobes():
    """Adobe stores 255 for no ink, and marks its files; by the standard it is 0."""
    cyan = saved(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG", quality=100)
    np.testing.assert_array_equal(opened(cyan), np.full((16, 16, 3), (0, 255, 255)))
    segment = marker(cyan, 0xEE)
    assert cyan[segment].startswith(b"\xff\xee\x00\x0eAdobe")
    unmarked = cyan[: segment.start] + cyan[segment.stop :]  # so the inks are all but cyan: black
    np.testing.assert_array_equal(opened(unmarked), np.zeros((16, 16, 3)))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_an_image_on_its_side_is_upright(kind):
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, :16] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned to the right: what is left comes to the top
    found = opened(saved(Image.fromarray(pixels), kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {})))
    np.testing.assert_allclose(found, np.moveaxis(pixels, 0, 1), atol=2)


def test_an_animation_is_refused_and_pages_and_previews_are_not():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "green")]
    for kind in ("GIF", "PNG", "WEBP"):
        data = saved(frames[0], kind, save_all=True, append_images=frames[1:], duration=100)
        for function in (open_image, image_size):
            with pytest.raises(ImageError, match="^is animated: 3 frames$"):
                function(data)
    for kind in ("TIFF", "MPO"):
        first = opened(saved(frames[0], kind, save_all=True, append_images=frames[1:]))
        np.testing.assert_allclose(first, np.full((8, 8, 3), (255, 0, 0)), atol=2)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "cannot identify image file"),
        (b"no image", "cannot identify image file"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EOF\n", "cannot identify image file"),  # runs a program
    ],
)
def test_what_is_no_image_has_the_same_reason_each_time(data, reason):
    for function in (open_image, image_size):
        with pytest.raises(ImageError) as error:
            function(data)
        assert str(error.value) == reason


def test_images_cut_short_are_damaged_and_large_ones_are_refused_by_their_header():
    data = saved(noise(64, 48), "JPEG")
    with pytest.raises(ImageError, match="^image file is truncated"):
        open_image(data[: len(data) // 2])
    for function in (open_image, image_size):
        with pytest.raises(ImageError, match="^has 3072 pixels, more than max_pixels=3071$"):
            function(data, 3071)
    assert image_size(data, 3072) == (48, 64)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_whose_range_is_not_known_are_refused(mode):
    with pytest.raises(ImageError, match=rf"^has pixels of 32 bits \(mode {mode}\) with unknown range"):
        opened(Image.new(mode, (8, 8)), "TIFF")


def test_an_image_that_declares_too_many_pixels_is_named():
    with pytest.raises(ImageError, match="^Image size .900000000 pixels. exceeds limit") as error:
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


@pytest.mark.parametrize(("width", "height"), [(640, 480), (100, 300), (37, 91), (33, 16), (5000, 40)])
def test_a_crop_covers_its_size_around_the_centre_and_says_what_is_seen(width, height):
    """Brightness is the place across, then down: a linear ramp stays one, so that the first and last values say where."""
    for axis, length in enumerate((height, width)):
        ramp = np.indices((height, width))[axis] * (255 / (length - 1))
        image = Image.fromarray(ramp.round().astype(np.uint8)).convert("RGB")
        found = np.asarray(cover_crop(image, 32, 64))[..., 0].astype(float)
        assert found.shape == (32, 64)
        part = seen_part((height, width), 32, 64)
        start, size = part[axis], part[axis + 2]
        assert start >= 0 and start + size <= length
        middle = found.mean() / 255 * (length - 1)
        np.testing.assert_allclose(middle, start + (size - 1) / 2, atol=0.02 * length + 1)
        spread = np.ptp(found.mean(1 - axis)) / 255 * (length - 1)
        np.testing.assert_allclose(spread, size * (1 - 1 / found.shape[axis]), atol=0.05 * length + 1)
    height_seen, width_seen = part[2:]
    assert abs(width_seen / height_seen / 2 - 1) < 2 / min(height_seen, width_seen) + 0.01


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


def grey_tiff(values: np.ndarray, bits: int, photometric: int) -> bytes:
    """A TIFF of grey pixels with 12 or 16 bits, which Pillow does not write."""
    data = values.astype("<u2").tobytes()
    if bits == 12:
        pairs = values.reshape(-1, 2).tolist()
        data = b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in pairs)
    height, width = values.shape
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: height, 279: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize(("bits", "photometric"), [(12, 1), (16, 1), (16, 0)])
def test_grey_tiffs_of_more_bits(bits, photometric):
    values = np.array([[0, 2**bits - 1], [2 ** (bits - 1), 2 ** (bits - 2)]], np.uint16)
    found = np.asarray(open_image(grey_tiff(values, bits, photometric)))[..., 0]
    expected = np.array([[0, 255], [128, 64]], np.uint8)
    np.testing.assert_array_equal(found, expected if photometric == 1 else 255 - expected)


def test_a_pgm_of_16_bits():
    values = np.array([[0, 65535], [32768, 16384]], ">u2")
    found = np.asarray(open_image(b"P5 2 2 65535\n" + values.tobytes()))[..., 0]
    np.testing.assert_array_equal(found, [[0, 255], [128, 64]])


def test_large_images_are_read_without_a_warning():
    file = io.BytesIO()
    Image.new("1", (9500, 9500)).save(file, "PNG")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert image_size(file.getvalue()) == (9500, 9500)
