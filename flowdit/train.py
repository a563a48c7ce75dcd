"""`python train_stage1.py` and `train_stage2.py`: train a model into `train.checkpoint_dir`."""

from __future__ import annotations

import os

# Before JAX starts: several programs can share a GPU, and its memory does not fragment. User settings take precedence.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("TF_GPU_ALLOCATOR", "cuda_malloc_async")

import logging
import shlex
import sys

import hydra
from etils import epath
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from flowdit import conditioning
from flowdit.checkpoint.files import CheckpointError, list_steps
from flowdit.checkpoint.meta import RunMeta, newest_meta, verified_meta
from flowdit.checkpoint.restore import find_newest
from flowdit.command import Command, Unfinished, join_others, run_command
from flowdit.composition import continued, naming_the_preset, typed_overrides
from flowdit.config import Config, refuse_unknown, register_schemas, resolve
from flowdit.hardware import keep_freed_memory
from flowdit.models.config import MODELS
from flowdit.processes import from_first
from flowdit.sized import PRESETS, choose_sizes
from flowdit.supervisor import LOST
from flowdit.sweep import ends_sweep, job
from flowdit.training.loop import train
from flowdit.training.resume import PROCESS_FIELDS, is_in_use, require_run, run_folder

logger = logging.getLogger(__name__)

STAGE1 = Command(
    name="train-stage1",
    script="python train_stage1.py",
    config_name="config",
    schema=Config,
    folder="train.checkpoint_dir",
    summary="Train a class-conditional DiT, or an unconditional one with conditioning=none.",
    examples=(
        "experiment=small data.path=data/mine",
        "data.path=data/mine model/size=b train.batch_size=256 train.gradient_accum=2",
        "train.is_restore=true train.checkpoint_dir=checkpoints",
    ),
    hidden=("text.", "train.init_time", "train.init_shared_map", "train.init_class", "train.sample_prompts")
    + (
        "data.text_cache",
        "data.long_caption_prob",
        "data.tag_dropout",
        "model.micro_conditioning",
        "model.null_tokens",
    ),
)
STAGE2 = Command(
    name="train-stage2",
    script="python train_stage2.py",
    config_name="config_stage2",
    schema=Config,
    folder="train.checkpoint_dir",
    summary="Train a text-conditional transformer of PixArt-alpha's architecture.",
    examples=(
        "experiment=small_text data.path=data/mine",
        "data.path=data/mine train.batch_size=256 train.gradient_accum=8 wandb.enabled=false",
        "data.path=data/mine train.init_from=checkpoints train.checkpoint_dir=checkpoints_text",
        "train.is_restore=true train.checkpoint_dir=checkpoints_text",
    ),
    hidden=("train.sample_labels",),
)
COMMANDS = {"ccdit": STAGE1, "pixart": STAGE2}
"""The training commands by the network that they train."""


@hydra.main(version_base="1.3", config_path="configs", config_name="config")
@job
def _stage1(composed: DictConfig) -> None:
    _train(composed, "ccdit")


@hydra.main(version_base="1.3", config_path="configs", config_name="config_stage2")
@job
def _stage2(composed: DictConfig) -> None:
    _train(composed, "pixart")


def _train(composed: DictConfig, network: str) -> None:
    keep_freed_memory()
    refuse_unknown(composed, Config)
    folder = run_folder(composed.train.checkpoint_dir)
    join_others(composed, ends_gracefully=True)
    if composed.train.is_restore is None:
        composed.train.is_restore = from_first(lambda: is_in_use(folder))
    is_restore = bool(composed.train.is_restore)
    with naming_the_preset(is_restore):
        config = _configured(composed, network, _stored_meta(folder) if is_restore else None)
        found = None
        if is_restore and from_first(lambda: bool(list_steps(folder))):
            found = find_newest(folder)
            config = _configured(composed, network, verified_meta(folder / str(found.step)))
        elif is_restore:
            logger.info("%s has no checkpoint: the run starts again, with the settings of the command line", folder)
        is_complete = train(config, found, _resume_command(network, folder))
    if not is_complete and (config.train.requeue or ends_sweep()):
        raise Unfinished(LOST if config.train.requeue else 0)


def _stored_meta(folder: epath.Path) -> RunMeta | None:
    """The newest intact metadata of a run, None before its first checkpoint. Raises `ValueError` if there is no run."""
    require_run(folder)
    if not list_steps(folder):
        return None
    return newest_meta(folder) or verified_meta(folder / str(find_newest(folder).step))  # the error of all steps


def _configured(composed: DictConfig, network: str, stored: RunMeta | None) -> Config:
    """The checked settings of a new run, or of the `stored` one with what is typed on the command line."""
    if stored is not None:
        folder = composed.train.checkpoint_dir
        if (theirs := stored.config.model.name) != network:
            command = _resume_command(theirs, folder)
            raise CheckpointError(
                f"train.checkpoint_dir: {folder} holds a run of the other stage, resume it with {command}"
            )
        composed = continued(stored.config, folder, typed_overrides())
    config: Config = resolve(composed, Config)
    preset = HydraConfig.get().runtime.choices.get("experiment")
    if preset is not None and stored is None and type(config.model) is not MODELS[network]:
        (other,) = COMMANDS.keys() - {network}
        raise ValueError(f"experiment={preset}: is a preset of the other stage, of {COMMANDS[other].script}")
    kinds = [kind for kind, conditioned in conditioning.KINDS.items() if conditioned.model == network]
    if (kind := conditioning.kind_of(config)) not in kinds:
        raise ValueError(f"conditioning: must be {' or '.join(kinds)} with this command, got {kind}")
    conditioning.check(config)
    config.check()
    if stored is None and preset in PRESETS:
        choose_sizes(config, typed_overrides())
    return config


def _resume_command(network: str, folder: epath.PathLike) -> str:
    """The command line that resumes the run in `folder`: its configuration is in its checkpoints."""
    command = COMMANDS[network]
    program = command.script if sys.argv[0].endswith(".py") else f"flowdit {command.name}"
    not_stored = [override for override in typed_overrides() if override.partition("=")[0] in PROCESS_FIELDS]
    settings = ["train.is_restore=true", f"train.checkpoint_dir={folder}", *not_stored]
    return shlex.join([*program.split(), *settings])


def stage1() -> None:
    """Train the class-conditional or the unconditional model."""
    register_schemas()
    run_command(_stage1, STAGE1)


def stage2() -> None:
    """Train the text-conditional model."""
    register_schemas()
    run_command(_stage2, STAGE2)
