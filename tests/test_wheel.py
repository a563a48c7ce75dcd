"""The wheel contains configurations, images, the VAE and a feature network, found from any folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hatchling.builders.sdist import SdistBuilder

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = """
import flowdit, flowdit.data.openmoji, flowdit.features.efficientnet, flowdit.models.vae, flowdit.reporting.page, pathlib, sys
assert pathlib.Path(flowdit.__file__).is_relative_to(sys.argv[1]), flowdit.__file__
assert flowdit.data.openmoji.load().tiles.shape[1:] == (64, 64, 3)
assert [flowdit.models.vae.load_vae(name).config.latent_channels for name in ("openmoji", "emoji")] == [16, 4]
assert flowdit.features.efficientnet.load_efficientnet().width == 1280
assert "<style>" in flowdit.reporting.page.make_page([], [], "title", 0)
"""


def python(*arguments: str | Path, folder: Path, path: Path | str = "") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(path), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, unpacked into a separate folder."""
    folder = tmp_path_factory.mktemp("wheel")
    built = python("-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, folder=folder)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = folder.glob("*.whl")
    target = folder / "site"
    done = python("-m", "pip", "install", "--no-deps", "--no-index", "--target", target, wheel, folder=folder)
    assert done.returncode == 0, done.stderr
    return target


def test_emoji_styles_are_in_the_source_archive_and_not_in_the_wheel(installed):
    files = {file.distribution_path for file in SdistBuilder(str(ROOT)).recurse_selected_project_files()}
    assert {"assets/emoji_styles/table.json", "assets/emoji_styles/noto.webp", "tests/test_text_model.py"} <= files
    assert not list(installed.rglob("noto.webp"))


def test_assets_are_found(installed, tmp_path):
    done = python("-P", "-c", SCRIPT, installed, folder=tmp_path, path=installed)
    assert done.returncode == 0, done.stderr


# The entry points of the wheel, their arguments, and a part of their composed configuration.
COMMANDS = {
    "train:stage1": (["experiment=openmoji"], "experiment: openmoji"),
    "train:stage2": (["experiment=openmoji_text"], "encoder: wordllama"),
    "prepare:main": ([], "source: openmoji"),
    "sample:main": ([], "num_images: 1"),
    "report:main": ([], "out: report.html"),
}


@pytest.mark.parametrize("entry_point", COMMANDS)
def test_every_command_composes(installed, tmp_path, entry_point):
    (arguments, words), (module, function) = COMMANDS[entry_point], entry_point.split(":")
    script = f"from flowdit.{module} import {function}; {function}()"
    done = python("-P", "-c", script, *arguments, "--cfg", "all", folder=tmp_path, path=installed)
    assert done.returncode == 0, done.stderr
    assert words in done.stdout
