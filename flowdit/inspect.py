"""`python -m flowdit.inspect data=... [originals=...]`: one HTML file about a data set."""

from __future__ import annotations

from flowdit.cli import watch_for_signals

if __name__ == "__main__":
    watch_for_signals("inspect")

import logging
import tempfile
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from flowdit.command import Command, run_command
from flowdit.config import resolve
from flowdit.data.manifest import Manifest
from flowdit.inference.images import load_matching_vae
from flowdit.inspection.config import InspectConfig
from flowdit.inspection.leftovers import read_check, read_rejected
from flowdit.inspection.originals import Originals
from flowdit.inspection.page import GENERATOR, Contents, make_page
from flowdit.inspection.pictures import make_pictures
from flowdit.inspection.survey import Surveyor
from flowdit.inspection.tokens import read_tokens
from flowdit.reporting.shell import check_replaceable, write_page
from flowdit.storage import connect
from flowdit.sweep import job

# By its name, as this module is `__main__` when it is run.
logger = logging.getLogger("flowdit.inspect")

COMMAND = Command(
    name="inspect",
    script="python -m flowdit.inspect",
    config_name="inspect",
    configs="flowdit.data_configs",
    schema=InspectConfig,
    folder="out",
    summary="Write one HTML file about a data set: decoded latents, captions, sizes, classes, statistics, outliers.",
    examples=("data=data/mine", "data=data/mine originals=images num_images=64 out=mine.html"),
)


@hydra.main(version_base="1.3", config_path="data_configs", config_name="inspect")
@job
def _inspect(composed: DictConfig) -> None:
    config: InspectConfig = resolve(composed, InspectConfig)
    config.check()
    out = Path(config.out)
    check_replaceable(out, GENERATOR, "a page of flowdit inspect")
    write_page(out, make_page(_contents(config), config.title, config.num_outliers))
    logger.info("written: %s (%.1f MB)", out, out.stat().st_size / 1e6)


def _contents(config: InspectConfig) -> Contents:
    folder = connect(config.data)
    manifest = Manifest.read(folder)
    # Before the records are read, so that mistakes are found first.
    vae = load_matching_vae(config.vae or manifest.vae.name, manifest) if config.num_images else None
    originals = Originals(config.originals) if config.originals and vae else None
    with tempfile.TemporaryDirectory(prefix="flowdit-inspect-") as scratch:
        surveyor = Surveyor(manifest, config.num_images, config.num_outliers)
        survey = surveyor.read(folder, config.max_records, Path(scratch))
    tokens = read_tokens(folder, manifest, config.text_cache, survey.places) if manifest.has_captions else None
    examples = survey.examples
    shown = [*examples, *survey.outliers] if vae else []
    found = originals.find(shown, manifest.vae.stride) if originals else {}
    pictures = make_pictures(manifest, vae, shown, found) if vae and shown else []
    return Contents(
        folder=folder,
        manifest=manifest,
        survey=survey,
        tokens=tokens,
        pictures=pictures[: len(examples)],
        outliers=pictures[len(examples) :],
        rejected=read_rejected(folder),
        vae_check=read_check(folder),
    )


def register_schema() -> None:
    """Register the command's dataclass with Hydra."""
    ConfigStore.instance().store(name="inspect_schema", node=InspectConfig)


def main() -> None:
    register_schema()
    run_command(_inspect, COMMAND)


if __name__ == "__main__":
    main()
