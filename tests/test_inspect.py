"""The HTML page about a data set: what it shows, that it loads nothing, and that nothing in a file becomes markup."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from html_page import HOSTILE, Page, assert_loads_nothing
from PIL import Image
from runs import call, error_line

from flowdit.data.manifest import Manifest
from flowdit.data.prepare import PrepareConfig, prepare
from flowdit.inspect import main
from flowdit.inspection.originals import Originals
from flowdit.inspection.survey import Example, chosen_records

SIZES = ((40, 40), (40, 80), (80, 40), (40, 44), (64, 32), (90, 90))
"""(height, width) of the images."""


def picture(height: int, width: int, seed: int) -> Image.Image:
    low = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(low).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Images of three shapes with captions, one of them hostile, two equal, and a file that is no image."""
    folder = tmp_path_factory.mktemp("images")
    lines = []
    for i, size in enumerate(SIZES):
        picture(*size, seed=i).save(folder / f"{i}.png")
        text = HOSTILE if i == 0 else "the same words" if i < 3 else f"picture {i}"
        licence = "CC0" if i % 2 else HOSTILE
        lines.append({"file_name": f"{i}.png", "text": text, "license": licence, "score": 0.5 * i})
    (folder / "broken.png").write_bytes(b"not an image")
    lines.append({"file_name": "broken.png", "text": "", "license": "CC0", "score": 1})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def prepared(source: str, out: Path) -> Path:
    prepare(
        PrepareConfig(
            source=source,
            out=str(out),
            image_size=32,
            buckets="computed",
            bucket_ratios=[0.5, 1.0, 2.0],
            keep_columns=["license", "score"],
            held_out_fraction=0.0,
            license=HOSTILE,
            vae_check=2,
            max_rejected=1.0,
        )
    )
    return out


@pytest.fixture(scope="module")
def data(images, tmp_path_factory) -> Path:
    return prepared(str(images), tmp_path_factory.mktemp("inspected") / "data")


def inspected(tmp_path: Path, *arguments: str) -> Page:
    finished = call(main, f"out={tmp_path / 'page.html'}", *arguments)
    assert (finished.status, "error" in finished.err) == (0, False), finished.err
    return Page((tmp_path / "page.html").read_text())


@pytest.fixture(scope="module")
def page(data, images, tmp_path_factory) -> Page:
    return inspected(tmp_path_factory.mktemp("page"), f"data={data}", f"originals={images}", "num_outliers=2")


def shown(page: Page, kind: str) -> list[str]:
    """The names of the images of a kind."""
    texts = [attributes.get("alt") or "" for name, attributes in page.elements if name == "img"]
    return [text.removeprefix(f"{kind} of ") for text in texts if text.startswith(kind)]


def test_latents_are_shown_beside_their_originals(page):
    names = {f"{i}.png" for i in range(len(SIZES))}
    assert set(shown(page, "original")) == set(shown(page, "decoded latent")) == names
    assert len(shown(page, "original")) == len(SIZES) + 2 + 2, "all, those of the lowest PSNR, and the outliers"
    assert "80 x 40 px" in page.text and " dB" in page.text and "picture 4" in page.text


def test_histograms_tables_and_statistics_are_those_of_the_data(page, data):
    manifest = Manifest.read(data)
    (sides,) = page.chart("Shorter side of the originals")["series"]
    found = {round(x): y for x, y in zip(sides["x"], sides["y"], strict=True) if y}
    assert sum(found.values()) == len(SIZES)
    (ratios,) = page.chart("Aspect ratio")["series"]
    assert sum(y for x, y in zip(ratios["x"], ratios["y"], strict=True) if abs(x) > 0.9) == 3
    assert {"Length of captions", "Latents after shift and scale", "score"} <= {
        chart["title"] for chart in page.data()["charts"]
    }
    assert f"0 {manifest.channel_mean[0]:.4f} {manifest.channel_mean[0]:.4f} {manifest.channel_std[0]:.4f}" in page.text
    assert "48 x 16 0.33 1 0" in page.text and "16 x 48 3.00 2 0" in page.text, "buckets"
    assert "the same words 2" in page.text and "CC0 3 50.0%" in page.text
    assert "the first of them" in page.text and "broken.png" in page.text and "check of the VAE" in page.source


def test_nothing_in_a_file_becomes_markup_and_nothing_is_loaded(page):
    assert page.text.count("alert(1)") > 3
    assert len(page.scripts) == 2 and not any(name == "img" and a.get("src") == "x" for name, a in page.elements)
    assert_loads_nothing(page)


def test_the_originals_of_a_tar_are_found_by_their_keys(images, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i in range(len(SIZES)):
            content = (images / f"{i}.png").read_bytes()
            for name, data in ((f"{i}.png", content), (f"{i}.json", b'{"text": "x", "license": "CC0", "score": 1}')):
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    data = prepared(str(tmp_path / "a.tar"), tmp_path / "data")
    page = inspected(tmp_path, f"data={data}", f"originals={tmp_path / 'a.tar'}", "num_outliers=0")
    assert len(shown(page, "original")) == len(shown(page, "decoded latent")) == len(SIZES)


def test_an_original_that_changed_or_is_gone_is_not_compared(data, images, tmp_path):
    others = shutil.copytree(images, tmp_path / "others")
    picture(*SIZES[1], seed=9).save(others / "1.png")
    (others / "2.png").unlink()
    (others / "metadata.jsonl").unlink()
    page = inspected(tmp_path, f"data={data}", f"originals={others}", "num_outliers=0")
    assert sorted(shown(page, "original")) == ["0.png", "3.png", "4.png", "5.png"]
    assert "original: has changed since" in page.text and f"original: not in {others}" in page.text


def test_a_key_that_points_outside_of_the_folder_is_not_read(images, tmp_path):
    latent = np.zeros((16, 1, 1), np.float16)
    outside = tmp_path / "secret.png"
    picture(8, 8, seed=0).save(outside)
    for key in (f"../{tmp_path.name}/secret.png", str(outside)):
        example = Example(0.0, "train.array_record", 0, "train", {"key": key, "latent": latent})
        assert Originals(str(images)).find([example], stride=8)[key].pixels is None


def test_without_images_no_vae_is_loaded(tiny_data, tmp_path):
    """Records of an earlier version, of a VAE that is not there."""
    data = shutil.copytree(tiny_data, tmp_path / "data")
    text = (data / "dataset.json").read_text()
    (data / "dataset.json").write_text(text.replace('"name": "openmoji"', '"name": "no/such/vae"'))
    page = inspected(tmp_path, f"data={data}", "num_images=0", "max_records=20")
    assert shown(page, "decoded latent") == []
    assert "from 20 of 56 records" in page.text and "cat" in page.text
    finished = call(main, f"data={data}", f"out={tmp_path / 'other.html'}")
    assert finished.status == 2 and error_line(finished).startswith("error: vae: ")


def test_the_chosen_records_are_evenly_spaced(data):
    manifest = Manifest.read(data)
    (chosen,) = chosen_records(manifest, 3, whole_shards=False)
    assert chosen[1] == [0, 2, 4]
    assert [len(numbers) for _, numbers in chosen_records(manifest, 1, whole_shards=True)] == [6]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("data=nowhere",), "nowhere: no such folder"),
        (("data={data}", "out={data}/dataset.json"), "out: must be a file that ends in .html"),
        (("data={data}", "num_images=-1"), "num_images: must be in [0, 1000], got -1"),
        (("data={data}", "originals=nowhere"), "originals: "),
        (("data={data}", "vae=nowhere"), "vae: "),
    ],
)
def test_mistakes_are_one_line(data, tmp_path, arguments, expected):
    finished = call(main, f"out={tmp_path / 'page.html'}", *[argument.format(data=data) for argument in arguments])
    assert finished.status == 2 and error_line(finished).startswith(f"error: {expected}")
    assert not (tmp_path / "page.html").exists()


def test_another_file_is_not_replaced(data, tmp_path):
    (tmp_path / "page.html").write_text("mine")
    finished = call(main, f"data={data}", f"out={tmp_path / 'page.html'}")
    assert error_line(finished).endswith("exists and is not a page of flowdit inspect: give another name")
