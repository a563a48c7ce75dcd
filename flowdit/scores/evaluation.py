"""Scoring a model: every point of a sweep is drawn, its features extracted and compared with those of real images."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from etils import epath
from PIL import Image

from flowdit.checkpoint.meta import package_version
from flowdit.diffusion.sampling import SamplerConfig, check_solved
from flowdit.hashing import fingerprint
from flowdit.inference.sampler import Sampler
from flowdit.processes import from_first
from flowdit.scores.comparison import Comparison
from flowdit.scores.config import EvaluateConfig, Point
from flowdit.scores.extraction import Extraction
from flowdit.scores.generation import Part, PartFiles, See, feature_sets, generate
from flowdit.scores.judge import Scores
from flowdit.scores.results import Result, as_json, from_json
from flowdit.storage import write_whole

logger = logging.getLogger(__name__)

LoadModel = Callable[[float | None], Sampler]
"""Loads the evaluated model with its plain EMA weights, or with an average of this width."""


class Evaluation(NamedTuple):
    """All that the points of a sweep have in common. `sampler` is the model of the first point."""

    config: EvaluateConfig
    load_model: LoadModel
    sampler: Sampler
    comparison: Comparison

    def results(self) -> Iterator[Result]:
        """Yield the result of every point, in order; those that are stored in `out` are read."""
        extraction = Extraction(self.comparison.networks, self.sampler.mesh)
        keep_images = self.config.save_images
        points = self.config.points()
        for width, some in itertools.groupby(points, lambda point: point.ema_width):  # the slowest to change
            sampler = self.sampler if width == points[0].ema_width else self.load_model(width)
            trained = sampler.trained
            see = extraction.from_latents(sampler.vae, trained.mean, trained.scale, keep_images=keep_images)
            for point in some:
                yield self._result(point, sampler, see)

    def _result(self, point: Point, sampler: Sampler, see: See) -> Result:
        solver = sampler.sampler_config(point.sampler)
        images = self._identity_of_images(solver, sampler)
        scores = {"figures": self.comparison.judge.figures, "reference": self.comparison.reference.identity}
        file = Path(self.config.out) / "points" / f"{fingerprint(json.dumps([images, scores]))}.json"
        if (stored := from_first(lambda: _read(file))) is not None:
            return _parsed(stored)
        identity = fingerprint(json.dumps(images))
        files = self._draw(sampler, see, solver, identity)
        if jax.process_index() != 0:
            return Result(point_settings(point, solver), 0.0, {}, None)
        whole = files.read()
        folder = f"images/{identity}" if self.config.save_images else None
        scores = self.comparison.judge.scores(feature_sets(whole))
        result = Result(point_settings(point, solver), float(whole.evaluations.mean()), scores, folder)
        file.parent.mkdir(parents=True, exist_ok=True)
        content = result_json(result) | {"sampler": dataclasses.asdict(solver)}
        write_whole(epath.Path(file), json.dumps(content, indent=1) + "\n")
        if not self.config.keep_features:
            files.remove()
        return result

    def _draw(self, sampler: Sampler, see: See, solver: SamplerConfig, identity: str) -> PartFiles:
        """Draw the images of a point and store their features."""
        config, out = self.config, Path(self.config.out)
        requests = self.comparison.asked.requests
        size = sampler.batch_shape(len(requests), config.batch_size)
        names = [network.name for network in self.comparison.networks]
        files = PartFiles(out / "features" / identity, names, len(requests), size)
        for part in generate(sampler.drawing(solver, config.seed), see, requests, files, size):
            check_solved(part.evaluations, solver)
            if part.images is not None and jax.process_index() == 0:
                _save_images(out / "images" / identity, part)
        return files

    def _identity_of_images(self, solver: SamplerConfig, sampler: Sampler) -> dict[str, Any]:
        """What the features depend on."""
        return {
            "weights": sampler.fingerprint,
            "vae": sampler.vae.fingerprint,
            "sampler": dataclasses.asdict(solver),
            "conditions": self.comparison.asked.identity,
            "seed": self.config.seed,
            "num_images": self.config.num_images,
            "batch_size": sampler.batch_shape(self.config.num_images, self.config.batch_size),
            "features": [network.identity for network in self.comparison.networks],
            "text_encoder": repr(sampler.trained.conditioning.describe()),
            "kept": [self.config.save_images, self.config.keep_features],  # those of other points may be gone
            "compute": [str(sampler.compute.dtype), device_kind(sampler), *self.versions().values()],
        }

    def description(self) -> list[str]:
        """Lines that say what was compared with what."""
        config, sampler = self.config, self.sampler
        guide = "" if config.guide is None else f", guided by {config.guide}"
        return [
            f"step {sampler.trained.step} of {config.checkpoint}{guide}: {config.num_images} images, "
            f"{self.comparison.asked.choice}, seed {config.seed}",
            f"reference: {self.comparison.reference.description}",
        ]

    def versions(self) -> dict[str, str]:
        """The packages that the images depend on."""
        return {name: package_version(name) for name in ("flowdit", "jax", "jaxlib", "equinox", "diffrax")}

    def as_json(self) -> dict[str, Any]:
        """All that the scores depend on, without the points."""
        sampler, mesh = self.sampler, self.sampler.mesh
        floors = {
            name: {
                "identity": network.identity,
                "floor": as_json(self.comparison.judge.floors[name].scores),
                "floor_count": self.comparison.judge.floors[name].count,
                "floor_missing": self.comparison.judge.floors[name].missing,
            }
            for name, network in ((network.name, network) for network in self.comparison.networks)
        }
        return {
            "checkpoint": {
                "name": self.config.checkpoint,
                "step": sampler.trained.step,
                "weights": sampler.fingerprint,
                "guide": self.config.guide,
                "guide_step": None if sampler.guide is None else sampler.guide.step,
            },
            "images": {
                "count": self.config.num_images,
                "seed": self.config.seed,
                "conditions": self.comparison.asked.choice,
                "size": list(sampler.image_size),
                "vae": sampler.vae.fingerprint,
            },
            "reference": {
                "description": self.comparison.reference.description,
                "identity": self.comparison.reference.identity,
                "count": self.comparison.reference.count,
            },
            "features": floors,
            "compute": {
                "dtype": str(sampler.compute.dtype),
                "devices": f"{mesh.devices.size} x {device_kind(sampler)}",
                "processes": jax.process_count(),
                "batch_size": sampler.batch_shape(self.config.num_images, self.config.batch_size),
            },
            "versions": self.versions(),
            "settings": dataclasses.asdict(self.config),
        }


def point_settings(point: Point, solver: SamplerConfig) -> dict[str, Any]:
    """The settings of a point, by the names in `results.COLUMNS`."""
    interval = (solver.guidance_low, solver.guidance_high)
    return {
        "ema_width": point.ema_width,
        "solver": solver.solver,
        "steps": solver.steps,
        "interval": interval,
        "internal_guidance": solver.internal_guidance,
        "guidance": solver.guidance,
    }


def _save_images(folder: Path, part: Part) -> None:
    assert part.images is not None
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in zip(part.numbers, part.images, strict=True):
        Image.fromarray(image).save(folder / f"{number:06d}.png")


def device_kind(sampler: Sampler) -> str:
    """The kind of the devices that images are drawn on."""
    return sampler.mesh.devices.flat[0].device_kind


def _read(file: Path) -> Any:
    """The stored result of a point; None if there is none, or if it cannot be used."""
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        _parsed(stored)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        logger.warning("%s is damaged: its images are drawn again", file)
        return None
    return stored


def _parsed(stored: Mapping[str, Any]) -> Result:
    scores: Scores = {features: from_json(found) for features, found in stored["scores"].items()}
    settings = dict(stored["settings"])
    settings |= {"interval": tuple(settings["interval"])}
    return Result(settings, float(stored["evaluations"]), scores, stored.get("images"))


def result_json(result: Result) -> dict[str, Any]:
    """A point as JSON data."""
    scores = {features: as_json(found) for features, found in result.scores.items()}
    images = {} if result.images is None else {"images": result.images}
    return {"settings": result.settings, "evaluations": result.evaluations, "scores": scores} | images
