"""`python -m flowdit.prepare [source=... out=...]`: from images to ArrayRecord shards of latents and `dataset.json`.

With `text_encoder=...` also a cache of the captions' features.
"""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from flowdit.command import run_command, user_errors
from flowdit.config import register_schemas, resolve
from flowdit.data.prepare import PrepareConfig, prepare


@hydra.main(version_base="1.3", config_path="configs", config_name="prepare")
@user_errors()
def _prepare(composed: DictConfig) -> None:
    prepare(resolve(composed, PrepareConfig))


def main() -> None:
    register_schemas()
    run_command(_prepare)


if __name__ == "__main__":
    main()
