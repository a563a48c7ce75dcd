"""`python -m flowdit.verify data=...`: check that a data set is what its manifest says.

The exit status is 0 if it is, 1 if there are problems, and 2 if it cannot be checked.
"""

from __future__ import annotations

from flowdit.cli import watch_for_signals

if __name__ == "__main__":
    watch_for_signals("verify")

import logging
import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # JAX is imported, but not used: a busy device must not be taken

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from flowdit.command import Command, run_command
from flowdit.config import resolve
from flowdit.data.verification import VerifyConfig, verify_data
from flowdit.sweep import job

# By its name, as this module is `__main__` when it is run.
logger = logging.getLogger("flowdit.verify")

COMMAND = Command(
    name="verify",
    script="python -m flowdit.verify",
    config_name="verify",
    configs="flowdit.data_configs",
    schema=VerifyConfig,
    folder="report",
    summary="Check a data set: hashes, every record, statistics and text features against its manifest. Changes nothing.",
    examples=("data=data/mine", "data=s3://bucket/data/mine threads=16 report=problems.jsonl"),
    if_stopped="nothing was changed",
)


@hydra.main(version_base="1.3", config_path="data_configs", config_name="verify")
@job
def _verify(composed: DictConfig) -> None:
    verified = verify_data(resolve(composed, VerifyConfig))
    logger.info(verified.summary)
    if verified.problems:
        sys.exit(1)


def register_schema() -> None:
    """Register the command's dataclass with Hydra."""
    ConfigStore.instance().store(name="verify_schema", node=VerifyConfig)


def main() -> None:
    register_schema()
    run_command(_verify, COMMAND)


if __name__ == "__main__":
    main()
