"""`python -m flowdit.plan experiment=... topology=v5e:4x4`: what a run costs, before paying for it."""

from __future__ import annotations

import sys

from flowdit.cli import watch_for_signals
from flowdit.planning.environment import leave_devices_alone

leave_devices_alone(sys.argv[1:])
if __name__ == "__main__":
    watch_for_signals("plan")

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from flowdit import conditioning
from flowdit.command import Command, run_command
from flowdit.command_help import GROUPS, network
from flowdit.composition import naming_the_preset
from flowdit.config import refuse_unknown, register_schemas, resolve
from flowdit.fields import FieldError, require
from flowdit.models.config import MODELS
from flowdit.planning.chart import save_chart
from flowdit.planning.config import PlanConfig
from flowdit.planning.data import planned_data
from flowdit.planning.planner import Plan, plan, planned_step
from flowdit.planning.report import as_json, assumptions, table
from flowdit.sized import PRESETS
from flowdit.storage import require_local
from flowdit.sweep import job

# By its name, as this module is `__main__` when it is run.
logger = logging.getLogger("flowdit.plan")

COMMAND = Command(
    name="plan",
    script="python -m flowdit.plan",
    config_name="config",
    schema=PlanConfig,
    folder="out",
    summary="Say what a training run costs on machines that are not there: memory, time and price of its own step.",
    examples=(
        "experiment=imagenet256_xl2 topology=v5e:4x4 mesh.fsdp=16 train.batch_size=512 model.remat=dots",
        "experiment=pixart_alpha_256 topology=[v5p:2x2x1,v6e:2x2] mesh.fsdp=4 train.batch_size=128 out=plans/text",
        "experiment=imagenet256_xl2 topology=h100:8 price_per_device_hour=2.5",
    ),
    hidden=(
        *(
            "wandb.",
            "train.sampl",
            "train.score",
            "train.save",
            "train.keep",
            "train.log",
            "train.valid",
            "train.is_restore",
        ),
        *("train.requeue", "train.checkpoint_dir", "train.init", "train.profile", "train.max_skipped", "data.num"),
        *("data.prefetch", "data.verify", "data.long", "data.max", "data.stall", "data.local", "data.text_cache"),
        *("mesh.step_timeout", "mesh.multi", "mesh.coord", "mesh.num", "mesh.process", "mesh.heart", "mesh.init"),
    ),
)
STAGES = {1: "ccdit", 2: "pixart"}
"""The network of each stage."""


@hydra.main(version_base="1.3", config_path="configs", config_name="config")
@job
def _stage1(composed: DictConfig) -> None:
    _plan(composed, 1)


@hydra.main(version_base="1.3", config_path="configs", config_name="config_stage2")
@job
def _stage2(composed: DictConfig) -> None:
    _plan(composed, 2)


def _plan(composed: DictConfig, stage: int) -> None:
    with naming_the_preset(is_restore=False):
        config = _configured(composed, stage)
    data = planned_data(config)
    steps = [planned_step(config, data, topology) for topology in config.topologies()]  # mistakes before compiling
    plans = [plan(config, data, step) for step in steps]
    for line in table(plans, config.train.num_steps):
        logger.info(line)
    lines = assumptions(config, plans, data)
    logger.info("assumptions:")
    for line in lines:
        logger.info("  %s", line)
    if config.out is not None:
        _write(Path(config.out), plans, lines, OmegaConf.to_container(composed))


def _configured(composed: DictConfig, stage: int) -> PlanConfig:
    """The checked settings. A missing `data.path` is allowed: the shapes of the data are assumed then."""
    refuse_unknown(composed, PlanConfig)
    if OmegaConf.is_missing(composed.data, "path"):
        composed.data.path = ""
    config: PlanConfig = resolve(composed, PlanConfig)
    preset = HydraConfig.get().runtime.choices.get("experiment")
    if preset in PRESETS:
        advice = "chooses sizes from the data and the devices of a run; plan the settings that the run prints"
        raise FieldError("experiment", f"{preset} {advice}")
    kinds = [kind for kind, conditioned in conditioning.KINDS.items() if conditioned.model == STAGES[stage]]
    if type(config.model) is not MODELS[STAGES[stage]]:
        raise FieldError("stage", f"{stage} trains {STAGES[stage]}, but these settings have {config.model.name}")
    kind = conditioning.kind_of(config)
    require("conditioning", kind, kind in kinds, f"must be {' or '.join(kinds)} in stage {stage}")
    conditioning.check(config)
    config.check()
    require_local("out", config.out)
    return config


def _write(folder: Path, plans: list[Plan], lines: list[str], settings: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = as_json(plans, lines, settings)
    (folder / "plan.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    written = ["plan.json"]
    if len(plans) > 1:
        save_chart(folder / "plan.png", plans)
        written.append("plan.png")
    logger.info("written: %s in %s", " and ".join(written), folder)


def chosen_stage(arguments: Sequence[str]) -> int:
    """The stage of a command line, as the configuration file depends on it: `stage`, else that of the preset, else 1."""
    given: dict[str, str] = {}
    for argument in arguments:
        key, _, value = argument.partition("=")
        given[key] = value
    if (stage := given.get("stage", "null")) != "null":
        return 2 if stage == "2" else 1  # `PlanConfig.check` refuses others
    preset = GROUPS / "experiment" / f"{given.get('experiment')}.yaml"
    return 2 if preset.is_file() and network(preset) in ("pixart", "mmdit") else 1


def main() -> None:
    register_schemas(PlanConfig)
    run_command(lambda: (_stage1, _stage2)[chosen_stage(sys.argv[1:]) - 1](), COMMAND)


if __name__ == "__main__":
    main()
