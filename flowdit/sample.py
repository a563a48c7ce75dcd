"""`python -m flowdit.sample checkpoint=checkpoints [labels=[...] | prompt=... | prompts=[...] ...]`: sample PNGs."""

from __future__ import annotations

from flowdit.cli import start

if __name__ == "__main__":
    start("sample")

import logging
from typing import Any

import hydra
import jax
from omegaconf import DictConfig

from flowdit.command import Command, join_others, run_command
from flowdit.config import SampleConfig, as_list, register_schemas, resolve
from flowdit.fields import about, called, listed
from flowdit.inference.prompt_file import read_prompts
from flowdit.inference.sample_folder import check_folder, write_samples
from flowdit.inference.sampler import check_settings
from flowdit.interop.loading import load
from flowdit.processes import from_first, require_equal
from flowdit.sharding import MeshConfig, make_mesh
from flowdit.sweep import job

# By its name, as this module is `__main__` when it is run.
logger = logging.getLogger("flowdit.sample")

COMMAND = Command(
    name="sample",
    script="python -m flowdit.sample",
    config_name="sample",
    schema=SampleConfig,
    folder="out",
    summary="Sample images from a trained model: PNGs, a grid and samples.json in the folder `out`.",
    examples=(
        "checkpoint=checkpoints num_images=4",
        "checkpoint=checkpoints/4000 labels=[heart,country-flag] guidance=[1,3,6]",
        'checkpoint=checkpoints prompt="a red apple, flat style"',
    ),
)


def chosen_prompts(config: SampleConfig) -> list[str] | None:
    """The given prompts, or those in the file. Raises `ValueError` for a file without prompts."""
    if config.prompt is not None:
        return [config.prompt]
    return config.prompts if config.prompts_file is None else read_prompts(config.prompts_file)


@hydra.main(version_base="1.3", config_path="configs", config_name="sample")
@job
def _sample(composed: DictConfig) -> None:
    config: SampleConfig = resolve(composed, SampleConfig)
    config.check()
    join_others(composed)
    check_settings(config.num_images, config.seed, config.batch_size)
    from_first(lambda: [str(path) for path in check_folder(config)])
    prompts = chosen_prompts(config)
    require_equal({"prompts": prompts})  # a file may differ
    arguments: dict[str, Any] = {"labels": config.labels, "prompts": prompts}
    arguments["negative_prompt"] = config.negative_prompt
    with about("checkpoint"):
        mesh = make_mesh(MeshConfig()) if jax.process_count() > 1 else None
        hints: dict[str, Any] = {"vae": config.vae, "text_encoder": config.text_encoder, "ema_width": config.ema_width}
        sampler = load(config.checkpoint, mesh=mesh, guide=config.guide, **hints)
    if config.image_size is not None:
        sides = as_list(config.image_size) or []
        sampler = sampler.at_size(sides[0], sides[-1])
    solvers = [sampler.sampler_config(fields) for fields in config.samplers()]
    with called({"prompts": "prompt"} if config.prompt is not None else {}):
        requests = sampler.requests(config.num_images, arguments)
    if prompts:
        count = f"{len(prompts)} prompts" if len(prompts) > 1 else "1 prompt"
        logger.info("%s: %s", count, listed([repr(prompt) for prompt in prompts]))
    guidance = ", ".join(f"{solver.guidance:g}" for solver in solvers)
    settings = f"{solvers[0].solver}, {solvers[0].steps} steps, guidance {guidance}"
    internal = solvers[0].internal_guidance
    settings += "" if internal == 1 else f", internal guidance {internal:g}"
    settings += f" by {config.guide} (step {sampler.guide.step})" if sampler.guide is not None else ""
    logger.info("step %d: %d images, %s", sampler.trained.step, len(requests) * len(solvers), settings)
    logger.info("samples: %s", write_samples(sampler, requests, solvers, config))


def main() -> None:
    register_schemas()
    run_command(_sample, COMMAND)


if __name__ == "__main__":
    main()
