"""One compiled step for all runs of a test process that have the same one: tracing takes half of a tiny run's time.

A run still makes and checks its own parts; only the two jitted functions are those of the first run. Runs in processes
of their own share nothing.
"""

import dataclasses
from collections import OrderedDict
from typing import Any

import jax
from jax.sharding import Mesh

from flowdit.conditioning import Conditioning
from flowdit.config import Config
from flowdit.data.manifest import Manifest
from flowdit.diffusion.auxiliary import AUXILIARY
from flowdit.training import setup

MOST = 12
"""Steps that are kept; the least recently used goes first."""
OF_THE_HOST: dict[str, Any] = {
    "is_restore": None,
    "requeue": False,
    "checkpoint_dir": "",
    "save_every": 0,
    "keep_last": 0,
    "keep_every": None,
    "keep_best": None,
    "log_every": 0,
    "validate_every": 0,
    "sample_every": 0,
}
"""Settings of `train` that no compiled function of `make_parts` depends on."""

_make_parts = setup.make_parts
_kept: OrderedDict[tuple, setup.Parts] = OrderedDict()


def make_parts(
    config: Config, manifest: Manifest, conditioning: Conditioning, mesh: Mesh, **options: Any
) -> setup.Parts:
    """`setup.make_parts` with the step, and the initialisation of the state, of an earlier run with the same settings."""
    made = _make_parts(config, manifest, conditioning, mesh, **options)
    if len(manifest.bucket_shapes) > 1:
        return made
    key = _key(config, manifest, made, mesh)
    first = _kept.setdefault(key, made)
    _kept.move_to_end(key)
    while len(_kept) > MOST:
        _kept.popitem(last=False)
    return made._replace(train_step=first.train_step, build_state=first.build_state)


def _key(config: Config, manifest: Manifest, made: setup.Parts, mesh: Mesh) -> tuple:
    """All that the two functions depend on. Where something has no `repr` of its own, the key equals no other."""
    objective = made.objective
    if hasattr(objective.conditioning, "training"):  # the encoder, which is not part of the step
        conditioning = dataclasses.replace(objective.conditioning, training=None)
        objective = dataclasses.replace(objective, conditioning=conditioning)
    train = dataclasses.replace(config.train, **OF_THE_HOST)
    settings = (config.seed, config.model, config.optim, config.auxiliary, train, objective, made.compute)
    shapes = tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(made.template))
    return (repr(settings), manifest.latent_shape, manifest.class_names, mesh, shapes, *AUXILIARY.values())
