"""Scores of samples during training."""

from __future__ import annotations

import functools

import numpy as np
from jax.sharding import Mesh

from flowdit.conditioning import Conditioning
from flowdit.config import Config
from flowdit.data.manifest import Manifest
from flowdit.diffusion.objective import FlowMatching
from flowdit.fields import under
from flowdit.inference.images import load_matching_vae
from flowdit.inference.sampler import batch_shape, make_draw
from flowdit.models.compute import Compute
from flowdit.processes import from_first
from flowdit.scores.comparison import Subject, compare
from flowdit.scores.extraction import Extraction
from flowdit.scores.generation import draw_features, feature_sets, joined
from flowdit.scores.metrics import direction
from flowdit.scores.results import as_json, from_json, shown_score, title
from flowdit.sharding import batch_shards
from flowdit.training.evaluations.base import Evaluation, Report
from flowdit.training.step import TrainState


class Scores(Evaluation):
    """Draws the same noise and requests every time, so that successive scores differ only by the model."""

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        manifest: Manifest,
        conditioning: Conditioning,
        objective: FlowMatching,
        compute: Compute,
    ):
        settings = config.train.scores
        self.every = settings.every
        self._seed, self._count = config.seed, settings.num_images
        with under("train.scores."):
            vae = load_matching_vae(manifest.vae.name, manifest)
            subject = Subject(manifest, conditioning, vae, config.data)
            self._comparison = compare(settings, subject, config.seed)
        spaces = self._comparison.judge.figures.items()
        self.metrics = {_figure(name, space): direction(name) for space, names in spaces for name in names}
        self._size = batch_shape(self._count, settings.batch_size, batch_shards(mesh))
        self._draw = make_draw(manifest.latent_shape, config.train.sampler, "velocity", compute, mesh)
        extraction = Extraction(self._comparison.networks, mesh)
        self._see = extraction.from_latents(vae, objective.mean, objective.scale)

    def __call__(self, step: int, state: TrainState) -> Report:
        draw = functools.partial(self._draw, state.ema, np.uint32(self._seed))
        parts = list(draw_features(draw, self._see, self._comparison.asked.requests, self._size))
        judge = self._comparison.judge
        # The first process for all, as the best checkpoint depends on them.
        found = from_first(lambda: {n: as_json(some) for n, some in judge.scores(feature_sets(joined(parts))).items()})
        figures: dict[str, float] = {}
        shown: list[str] = []
        for features, stored in found.items():
            floor = judge.floors[features].scores
            for name, score in from_json(stored).items():
                figures[_figure(name, features)] = score.value
                real = f" (real images {shown_score(floor[name])})" if name in floor else ""
                shown.append(f"{title(name)} {shown_score(score)}{real}")
        return Report(figures, line=f"scores of {self._count} images: {', '.join(shown)}")


def _figure(metric: str, features: str) -> str:
    return f"scores/{metric}_{features}"
