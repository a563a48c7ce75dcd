"""The check of the VAE on the user's images: figures, sheet, warning, and that it changes nothing."""

import dataclasses
from pathlib import Path

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from test_identity import interrupt

from flowdit.data import openmoji
from flowdit.data.images import open_image
from flowdit.data.manifest import Manifest, verify
from flowdit.data.preparation import passes
from flowdit.data.prepare import prepare
from flowdit.data.sources import open_images
from flowdit.data.vae_check import psnr
from flowdit.models.vae import load_vae, to_pixels


@pytest.fixture
def checked(config):
    return dataclasses.replace(config, vae_check=6, records_per_shard=None)


def check_lines(messages):
    return [line for line in messages() if line.startswith(("VAE check", "vae:"))]


def reconstruction(vae, image):
    signed = jnp.asarray(image, np.float32).transpose(2, 0, 1) / 127.5 - 1
    latent = eqx.filter_jit(vae.encode)(signed).mean.astype(np.float16).astype(np.float32)
    return np.asarray(to_pixels(eqx.filter_jit(vae.decode)(latent))).transpose(1, 2, 0)


def test_psnr_is_that_of_eight_bit_images():
    black, grey = np.zeros((2, 4, 4, 3), np.uint8)
    grey[:] = 51
    assert psnr(black, grey) == psnr(grey, black) == pytest.approx(20 * np.log10(5))
    assert psnr(grey, grey) == 100


def test_mean_and_worst_image_are_printed_and_shown_with_a_warning(checked, source, messages):
    for path in source.rglob("*.png"):  # so that no image is cropped
        Image.open(path).resize((16, 16)).save(path)
    prepare(checked)
    vae = load_vae("openmoji")
    found = open_images(checked)
    rows = [row for unit in found.units() for _, row in found.read(unit)][::4]  # six evenly spread images
    before = {row.key: np.asarray(open_image(row.image)) for row in rows}
    after = {name: reconstruction(vae, before[name]) for name in before}
    values = {name: psnr(before[name], after[name]) for name in before}
    worst = min(values, key=values.__getitem__)
    line, warning = check_lines(messages)
    assert f"on 6 images: mean PSNR {np.mean(list(values.values())):.1f} dB, worst {values[worst]:.1f} dB" in line
    assert f"({worst})" in line and line.endswith(f"{checked.out}/vae_check.png")
    assert (
        warning.startswith(f"vae: {np.mean(list(values.values())):.1f} dB is below 24: ") and "vae=<folder" in warning
    )
    sheet = np.asarray(Image.open(Path(checked.out) / "vae_check.png"))
    shown = sheet[4 : 4 + 128, 4 : 4 + 256]  # the first pair, after a margin
    expected = np.concatenate([before[worst], after[worst]], 1).repeat(8, 0).repeat(8, 1)
    assert np.abs(shown.astype(int) - expected).mean() < 2


def test_images_like_those_of_the_vae_give_no_warning(checked, source, messages):
    paths = sorted(source.rglob("*.png"))
    for path, tile in zip(paths, openmoji.load().tiles[::90], strict=False):
        Image.fromarray(tile).save(path)
    prepare(dataclasses.replace(checked, image_size=64))
    (line,) = check_lines(messages)
    assert float(line.split("mean PSNR ")[1].split()[0]) > 24


def test_the_data_set_does_not_depend_on_it(checked, messages):
    plain = prepare(dataclasses.replace(checked, out=checked.out + "-plain", vae_check=0))
    assert check_lines(messages) == [] and not Path(checked.out + "-plain", "vae_check.png").exists()
    assert prepare(checked) == plain
    assert len(check_lines(messages)) == 2
    files, others = (
        {path.name: path.read_bytes() for path in Path(out).iterdir() if path.name != "vae_check.png"}
        for out in (checked.out, checked.out + "-plain")
    )
    assert files == others


def test_it_runs_once_even_if_there_are_few_images_or_large_ones(checked, messages, monkeypatch):
    checked = dataclasses.replace(checked, records_per_shard=4, vae_check=1000, batch_size=5)
    interrupt(checked, monkeypatch)
    prepare(checked)
    prepare(checked)
    lines = check_lines(messages)
    assert len(lines) == 2 and lines[0].startswith("VAE check on 24 images")


def test_a_run_with_other_settings_that_begins_meanwhile_keeps_the_folder(checked, monkeypatch):
    other = dataclasses.replace(checked, dtype="float32", vae_check=0)
    monkeypatch.setattr(passes, "check_vae", lambda *args, **options: prepare(other))
    problem = "was claimed by another run with dtype='float32', this run has 'float16': give another folder$"
    with pytest.raises(ValueError, match=f"^out: {checked.out} {problem}"):
        prepare(checked)
    verify(checked.out, Manifest.read(checked.out), hashes=True)
    assert Manifest.read(checked.out).latent_dtype == "float32"


def test_unreadable_images_are_skipped(checked, source, messages):
    checked = dataclasses.replace(checked, max_rejected=1.0, batch_size=2)
    found = open_images(checked)
    for row in [row for unit in found.units() for _, row in found.read(unit)][:12:4]:  # three of the six
        (source / row.key).write_bytes(row.image[:-100])
    prepare(checked)
    assert check_lines(messages)[0].startswith("VAE check on 3 images")
