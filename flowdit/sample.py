"""`python -m flowdit.sample checkpoint=checkpoints/<step> [labels=[...] | prompts=[...] ...]`: sample PNGs."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from flowdit.command import run_command, user_errors
from flowdit.config import SampleConfig, register_schemas, resolve
from flowdit.fields import about
from flowdit.inference.sample_folder import check_folder, write_samples
from flowdit.inference.sampler import check_settings
from flowdit.interop.loading import load

# By its name, as this module is `__main__` when it is run.
logger = logging.getLogger("flowdit.sample")


def read_prompts(config: SampleConfig) -> list[str] | None:
    """The given prompts, or those in the file, one per line. Raises `ValueError` for both, or an empty file."""
    if config.prompts_file is None:
        return config.prompts
    if config.prompts is not None:
        raise ValueError(f"prompts_file: must not be given together with prompts, got {config.prompts_file}")
    try:
        lines = Path(config.prompts_file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as problem:
        raise ValueError(f"prompts_file: {config.prompts_file} cannot be read: {problem}") from None
    if not (prompts := [line.strip() for line in lines if line.strip()]):
        raise ValueError("prompts_file: must hold at least one prompt")
    return prompts


@hydra.main(version_base="1.3", config_path="configs", config_name="sample")
@user_errors()
def _sample(composed: DictConfig) -> None:
    config: SampleConfig = resolve(composed, SampleConfig)
    config.check()
    check_settings(config.num_images, config.seed, config.batch_size)
    check_folder(config)
    arguments: dict[str, Any] = {"labels": config.labels, "prompts": read_prompts(config)}
    arguments["negative_prompt"] = config.negative_prompt
    with about("checkpoint"):
        sampler = load(config.checkpoint, vae=config.vae, text_encoder=config.text_encoder)
    solver = sampler.sampler_config(config.sampler_fields())
    requests = sampler.requests(config.num_images, arguments)
    count, step = len(requests), sampler.trained.step
    settings = f"{solver.solver}, {solver.steps} steps, guidance {solver.guidance}"
    logger.info("step %d: %d images, %s", step, count, settings)
    logger.info("samples: %s", write_samples(sampler, requests, solver, config))


def main() -> None:
    register_schemas()
    run_command(_sample)


if __name__ == "__main__":
    main()
