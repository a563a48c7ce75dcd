"""`python -m flowdit.serve checkpoint=... [port=7860 compare=...]`: a page to try a model in the browser."""

from __future__ import annotations

from flowdit.cli import watch_for_signals

if __name__ == "__main__":
    watch_for_signals("serve")

import logging
import threading

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from flowdit.command import Command, run_command
from flowdit.config import resolve
from flowdit.fields import about, called
from flowdit.interop.loading import load
from flowdit.serving.config import ServeConfig
from flowdit.serving.draws import Models, check_pair
from flowdit.serving.server import check_installed, serving
from flowdit.sweep import job

# By its name, as this module is `__main__` when it is run.
logger = logging.getLogger("flowdit.serve")

COMMAND = Command(
    name="serve",
    script="python -m flowdit.serve",
    config_name="serve",
    schema=ServeConfig,
    folder="checkpoint",
    summary="Open a page in the browser to try a trained model; on this machine only, unless host is given.",
    examples=(
        "checkpoint=pretrained/openmoji",
        "checkpoint=checkpoints compare=checkpoints/4000 port=8000",
    ),
)


@hydra.main(version_base="1.3", config_path="configs", config_name="serve")
@job
def _serve(composed: DictConfig) -> None:
    config: ServeConfig = resolve(composed, ServeConfig)
    config.check()
    check_installed()
    with serving(load_models(config), config) as address:
        if config.host not in ("127.0.0.1", "localhost", "::1"):
            logger.warning("everyone who reaches %s can draw with this model; there is no password", address)
        logger.info("page: %s (Ctrl-C ends it)", address)
        threading.Event().wait()  # until a signal, which is raised here


def load_models(config: ServeConfig) -> Models:
    """The models of the page, with their VAE and text encoder. Raises `ValueError` for a model that cannot be served."""
    samplers = []
    for field in ("checkpoint", "compare"):
        if (name := getattr(config, field)) is not None:
            with about(field), called({"checkpoint": field}):
                guide = config.guide if field == "checkpoint" else None
                samplers.append(load(name, guide=guide, vae=config.vae, text_encoder=config.text_encoder))
    models = Models(samplers, config)
    if len(samplers) > 1:
        check_pair(*samplers)
    models.check_ready()
    return models


def register_schema() -> None:
    """Register the command's dataclass with Hydra."""
    ConfigStore.instance().store(name="serve_schema", node=ServeConfig)


def main() -> None:
    register_schema()
    run_command(_serve, COMMAND)


if __name__ == "__main__":
    main()
