"""`python -m flowdit.prepare [source=... out=...]`: from images to ArrayRecord shards of latents and `dataset.json`.

With `text_encoder=...` also a cache of the captions' features, with `features=...` one of feature maps of the images.
"""

from __future__ import annotations

from flowdit.cli import watch_for_signals

if __name__ == "__main__":
    watch_for_signals("prepare")

import hydra
import jax
from omegaconf import DictConfig

from flowdit.command import Command, run_command
from flowdit.config import register_schemas, resolve
from flowdit.data.prepare import PrepareConfig, prepare
from flowdit.sweep import job

COMMAND = Command(
    name="prepare",
    script="python -m flowdit.prepare",
    config_name="prepare",
    schema=PrepareConfig,
    folder="out",
    summary="Turn images into a data set: encode them with a VAE, and write shards of latents and dataset.json to `out`.",
    examples=(
        "",
        "source=images out=data/mine",
        "source=images captions=captions.jsonl out=data/mine image_size=256 "
        "vae=stabilityai/stable-diffusion-3-medium-diffusers",
    ),
    if_stopped="the finished shards are kept, the same command continues",
)


@hydra.main(version_base="1.3", config_path="configs", config_name="prepare")
@job
def _prepare(composed: DictConfig) -> None:
    config = resolve(composed, PrepareConfig)
    if config.engine == "ray":
        jax.config.update("jax_platforms", "cpu")  # other devices are for the workers, which may be on this machine
    prepare(config)


def main() -> None:
    register_schemas()
    run_command(_prepare, COMMAND)


if __name__ == "__main__":
    main()
