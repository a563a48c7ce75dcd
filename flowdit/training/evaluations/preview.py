"""Grids of samples during training."""

from __future__ import annotations

import logging

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from flowdit.conditioning import Requests
from flowdit.config import TrainConfig
from flowdit.data.manifest import Manifest
from flowdit.diffusion.objective import FlowMatching
from flowdit.diffusion.sampling import UNSOLVED
from flowdit.image_grid import save_grid
from flowdit.inference.images import load_matching_vae, make_decoder
from flowdit.inference.sampler import batch_shape, make_draw
from flowdit.models.compute import Compute
from flowdit.sharding import batch_shards, make_local_mesh
from flowdit.training.evaluations.base import Evaluation, Report
from flowdit.training.step import TrainState

logger = logging.getLogger(__name__)


class Preview(Evaluation):
    """Draws the same noise and requests every time, so that successive grids differ only by the model."""

    folder = "samples"

    def __init__(
        self,
        train: TrainConfig,
        mesh: Mesh,
        manifest: Manifest,
        objective: FlowMatching,
        compute: Compute,
        requests: Requests,
        seed: int,
    ):
        self.every = train.sample_every
        self._folder = epath.Path(train.checkpoint_dir) / "samples"
        self._captions = requests.captions
        self._seed = seed
        # Padded to a multiple of the devices.
        size = batch_shape(len(requests), len(requests), batch_shards(mesh))
        self._numbers = [min(i, len(requests) - 1) for i in range(size)]
        self._conditions = requests.encode(self._numbers)
        vae = load_matching_vae(manifest.vae.name, manifest)
        self._decode = make_decoder(vae, objective.mean, objective.scale, make_local_mesh())
        self._draw = make_draw(manifest.latent_shape, train.sampler, "velocity", compute, mesh)

    def __call__(self, step: int, state: TrainState) -> Report:
        numbers = np.asarray(self._numbers, np.int32)
        samples = self._draw(state.ema, np.uint32(self._seed), numbers, *self._conditions)
        if jax.process_index() != 0:
            return Report()
        latents = samples.latents
        if (np.asarray(samples.evaluations) == UNSOLVED).any():
            logger.warning("samples: train.sampler.steps is too small for train.sampler.rtol")
        path, count = self._folder / f"{step:08d}.png", len(self._captions)
        save_grid(path, self._decode(np.asarray(latents)[:count], count), self._captions, columns=8)
        return Report(images={"samples": path}, line=f"samples: {path}")
