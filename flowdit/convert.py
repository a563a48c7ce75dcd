"""`python -m flowdit.convert source=... target=... [to=checkpoint | diffusers | safetensors ...]`: convert a model."""

from __future__ import annotations

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from flowdit.command import run_command, user_errors
from flowdit.config import resolve
from flowdit.interop import ConvertConfig, convert


@hydra.main(version_base="1.3", config_path="configs", config_name="convert")
@user_errors()
def _convert(composed: DictConfig) -> None:
    config: ConvertConfig = resolve(composed, ConvertConfig)
    portable = convert(config)
    for note in portable.notes:
        print(f"note: {note}", flush=True)
    million = sum(array.size for array in portable.arrays.values()) / 1e6
    print(f"{config.target}: {million:.1f} M parameters, {config.to}, {config.dtype}", flush=True)


def register_schema() -> None:
    """Register the command's dataclass with Hydra."""
    ConfigStore.instance().store(name="convert_schema", node=ConvertConfig)


def main() -> None:
    register_schema()
    run_command(_convert)


if __name__ == "__main__":
    main()
