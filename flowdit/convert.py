"""`python -m flowdit.convert source=... target=... [to=checkpoint | diffusers | safetensors ...]`: convert a model."""

from __future__ import annotations

from flowdit.cli import watch_for_signals

if __name__ == "__main__":
    watch_for_signals("convert")

import logging

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from flowdit.command import Command, run_command
from flowdit.config import resolve
from flowdit.interop import ConvertConfig, convert
from flowdit.sweep import job

# By its name, as this module is `__main__` when it is run.
logger = logging.getLogger("flowdit.convert")

COMMAND = Command(
    name="convert",
    script="python -m flowdit.convert",
    config_name="convert",
    schema=ConvertConfig,
    folder="target",
    summary="Convert a model between flowdit checkpoints, diffusers folders, safetensors and files of other projects.",
    examples=(
        "source=checkpoints target=mine.safetensors",
        "source=checkpoints target=exported/mine to=diffusers own_class=true",
        "source=DiT-XL-2-256x256.pt target=imported/dit vae=stabilityai/sd-vae-ft-mse",
    ),
)


@hydra.main(version_base="1.3", config_path="configs", config_name="convert")
@job
def _convert(composed: DictConfig) -> None:
    config: ConvertConfig = resolve(composed, ConvertConfig)
    portable = convert(config)
    million = sum(array.size for array in portable.arrays.values()) / 1e6
    logger.info("written: %s (%s, %.1f M parameters, %s)", config.target, config.target_format, million, config.dtype)


def register_schema() -> None:
    """Register the command's dataclass with Hydra."""
    ConfigStore.instance().store(name="convert_schema", node=ConvertConfig)


def main() -> None:
    register_schema()
    run_command(_convert, COMMAND)


if __name__ == "__main__":
    main()
