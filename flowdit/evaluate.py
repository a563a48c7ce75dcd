"""`python -m flowdit.evaluate checkpoint=... reference=... num_images=...`: scores of a trained model."""

from __future__ import annotations

from flowdit.cli import start

if __name__ == "__main__":
    start("evaluate")

import dataclasses
import functools
import json
import logging
from pathlib import Path

import hydra
import jax
from etils import epath
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from flowdit.checkpoint.averages import find_average
from flowdit.checkpoint.restore import newest_intact
from flowdit.checkpoint.sampler_file import write_sampler
from flowdit.command import Command, join_others, run_command
from flowdit.config import resolve
from flowdit.fields import about, require
from flowdit.hardware import keep_freed_memory
from flowdit.inference.sampler import Sampler
from flowdit.interop.hub import find_source
from flowdit.interop.loading import load
from flowdit.scores.chart import save_chart
from flowdit.scores.comparison import Subject, Wanted, compare
from flowdit.scores.config import EvaluateConfig, Point
from flowdit.scores.evaluation import Evaluation, result_json
from flowdit.scores.judge import find_figure
from flowdit.scores.results import Result, best_point, lines
from flowdit.sharding import MeshConfig, make_mesh
from flowdit.storage import write_whole
from flowdit.sweep import job

# By its name, as this module is `__main__` when it is run.
logger = logging.getLogger("flowdit.evaluate")

COMMAND = Command(
    name="evaluate",
    script="python -m flowdit.evaluate",
    config_name="evaluate",
    schema=EvaluateConfig,
    folder="out",
    summary="Score a trained model: draw images, compare their features with those of real images.",
    examples=(
        "checkpoint=checkpoints num_images=1000",
        "checkpoint=checkpoints reference=photos num_images=10000 guidance=[1,1.5,2,3] interval=[[0,1],[0.1,0.7]]",
        "checkpoint=xl2 reference=VIRTUAL_imagenet256_labeled.npz num_images=50000 labels=balanced "
        "features=[inception,dinov2] weights.inception=pt_inception-2015-12-05-6726825d.pth weights.dinov2=dinov2-base",
    ),
    if_stopped="the same command goes on where it was",
)


@hydra.main(version_base="1.3", config_path="configs", config_name="evaluate")
@job
def _evaluate(composed: DictConfig) -> None:
    keep_freed_memory()
    config: EvaluateConfig = resolve(composed, EvaluateConfig)
    config.check()
    join_others(composed)
    evaluation = _prepare(_located(config))
    results = list(evaluation.results())
    if jax.process_index() == 0:
        _report(evaluation, results)


def _located(config: EvaluateConfig) -> EvaluateConfig:
    """The settings with the place of the checkpoint, found once: a run may save another one meanwhile.

    Raises `FieldError` for settings that need a checkpoint of flowdit if the model is another. All processes must call it.
    """
    with about("checkpoint"):
        folder = newest_intact(find_source(config.checkpoint))
    widths = [point.ema_width for point in config.points() if point.ema_width is not None]
    if not (folder / "meta").is_dir():
        rule = "must not be given for a model that is no checkpoint of flowdit"
        require("save_best", config.save_best, not config.save_best, rule)
        require("ema_width", config.ema_width, not widths, rule)
    for width in dict.fromkeys(widths):
        find_average(folder, width)
    return dataclasses.replace(config, checkpoint=str(folder))


def _prepare(config: EvaluateConfig) -> Evaluation:
    """Load the model of the first point, and check all settings before the first image."""
    points = config.points()
    sampler = _load(config, points[0].ema_width)
    for point in points:
        sampler.sampler_config(point.sampler)
    trained = sampler.trained
    subject = Subject(trained.manifest, trained.conditioning, sampler.vae, trained.config.data)
    wanted = Wanted(config.labels, config.given_prompts(), config.negative_prompt)
    comparison = compare(config, subject, config.seed, wanted, config.best)
    return Evaluation(config, functools.partial(_load, config), sampler, comparison)


def _load(config: EvaluateConfig, ema_width: float | None) -> Sampler:
    mesh = make_mesh(MeshConfig()) if jax.process_count() > 1 else None
    hints = {"vae": config.vae, "text_encoder": config.text_encoder, "ema_width": ema_width}
    with about("checkpoint"):
        return load(config.checkpoint, mesh=mesh, guide=config.guide, **hints)


def _report(evaluation: Evaluation, results: list[Result]) -> None:
    """Write `scores.json` and the chart, and the best sampler into the checkpoint if wanted; print the scores last."""
    config, judge = evaluation.config, evaluation.comparison.judge
    first = next(name for names in judge.figures.values() for name in names)
    features, metric = find_figure(judge.figures, config.best or first)
    best = best_point(results, metric, features)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    content = evaluation.as_json() | {"points": [result_json(result) for result in results]}
    content["best"] = {"metric": metric, "features": features, "point": best}
    write_whole(epath.Path(out / "scores.json"), json.dumps(content, indent=1) + "\n")
    written = ["scores.json"]
    if len(results) > 1 and save_chart(out / "scores.png", results, metric, judge.floors, best):
        written.append("scores.png")
    logger.info("written: %s in %s", " and ".join(written), out)
    if config.save_best:
        _save_sampler(evaluation, config.points()[best])
    for line in evaluation.description():
        logger.info(line)
    for name, floor in judge.floors.items():
        for line in lines(results, name, floor, config.num_images, best):
            logger.info(line)


def _save_sampler(evaluation: Evaluation, point: Point) -> None:
    file = write_sampler(evaluation.config.checkpoint, evaluation.sampler.sampler_config(point.sampler))
    others = {"ema_width": point.ema_width, "guide": evaluation.config.guide}
    rest = [f"{name}={value}" for name, value in others.items() if value is not None]
    logger.info("the sampler of the best point: %s%s", file, f" (it does not hold {', '.join(rest)})" if rest else "")


def register_schema() -> None:
    """Register the settings with Hydra, which checks names and types of all overrides against them."""
    ConfigStore.instance().store(name="evaluate_schema", node=EvaluateConfig)


def main() -> None:
    register_schema()
    run_command(_evaluate, COMMAND)


if __name__ == "__main__":
    main()
