"""Evaluations between training steps: validation loss, previews, scores, a profiler window.

The loop calls each evaluation that is due. To add one, write an `Evaluation` in a new file and build it in
`make_evaluations` (docs/extending.md).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

from etils import epath
from jax.sharding import Mesh

from flowdit.conditioning import Conditioning
from flowdit.config import Config
from flowdit.data.mixture import DataSet
from flowdit.diffusion.objective import FlowMatching
from flowdit.models.compute import Compute
from flowdit.tracking import Tracker
from flowdit.training.evaluations.base import Evaluation, Report
from flowdit.training.evaluations.best import find_metric
from flowdit.training.evaluations.preview import Preview
from flowdit.training.evaluations.profile import Profile
from flowdit.training.evaluations.scores import Scores
from flowdit.training.evaluations.validation import Validation

__all__ = ["Evaluation", "Preview", "Profile", "Report", "Scores", "Validation", "closing", "make_evaluations"]


@contextlib.contextmanager
def closing(evaluations: Iterable[Evaluation], tracker: Tracker) -> Iterator[None]:
    """Close the evaluations at the end of a run, also after an error."""
    try:
        yield
    finally:
        for evaluation in evaluations:
            with tracker.warns_only(evaluation.folder):
                evaluation.close()


def make_evaluations(
    config: Config, data: DataSet, mesh: Mesh, conditioning: Conditioning, objective: FlowMatching, compute: Compute
) -> list[Evaluation]:
    """Build the evaluations that the configuration enables. Raises `ValueError` for invalid settings."""
    train = config.train
    evaluations: list[Evaluation] = []
    if data.validation is not None and train.validate_every:
        validation = Validation(
            train=train,
            data=data.validation,
            mesh=mesh,
            encode=conditioning.encode,
            objective=objective,
            compute=compute,
            seed=config.seed,
            parts=[part.name for part in data.manifest.validation_parts],
        )
        evaluations.append(validation)
    if train.sample_every:
        requests = conditioning.previews(train, data.validation or data.train)
        preview = Preview(
            train=train,
            requests=requests,
            mesh=mesh,
            manifest=data.manifest,
            objective=objective,
            compute=compute,
            seed=config.seed,
        )
        evaluations.append(preview)
    if train.scores.every:
        evaluations.append(Scores(config, mesh, data.manifest, conditioning, objective, compute))
    if train.profile:
        evaluations.append(Profile(epath.Path(train.checkpoint_dir), *train.profile))
    find_metric(train, evaluations)
    return evaluations
