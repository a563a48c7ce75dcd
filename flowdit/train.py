"""`python train_stage1.py` and `train_stage2.py`: train a model into `train.checkpoint_dir`."""

from __future__ import annotations

import os

# Before JAX starts: several programs can share a GPU, and its memory does not fragment. User settings take precedence.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("TF_GPU_ALLOCATOR", "cuda_malloc_async")

import hydra
import jax
from omegaconf import DictConfig

from flowdit import conditioning
from flowdit.command import run_command, tell_processes_apart, user_errors
from flowdit.config import Config, register_schemas, resolve
from flowdit.processes import join_processes
from flowdit.training.loop import train


@hydra.main(version_base="1.3", config_path="configs", config_name="config")
@user_errors()
def _stage1(composed: DictConfig) -> None:
    _train(composed, "ccdit")


@hydra.main(version_base="1.3", config_path="configs", config_name="config_stage2")
@user_errors()
def _stage2(composed: DictConfig) -> None:
    _train(composed, "pixart")


def _train(composed: DictConfig, model: str) -> None:
    config: Config = resolve(composed, Config)
    kinds = [kind for kind, conditioned in conditioning.KINDS.items() if conditioned.model == model]
    if (kind := conditioning.kind_of(config)) not in kinds:
        raise ValueError(f"conditioning: must be {' or '.join(kinds)} with this command, got {kind}")
    conditioning.check(config)
    config.check()
    join_processes(config.mesh)
    tell_processes_apart(jax.process_index(), jax.process_count())
    train(config)


def stage1() -> None:
    """Train the class-conditional or the unconditional model."""
    register_schemas()
    run_command(_stage1)


def stage2() -> None:
    """Train the text-conditional model."""
    register_schemas()
    run_command(_stage2)
