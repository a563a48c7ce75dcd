"""The `--help` of a command: its own settings with defaults and meanings, in reading order."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator
from pathlib import Path

from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf

import flowdit.configs
from flowdit.settings import Setting, in_yaml

GROUPS = Path(flowdit.configs.__file__).parent
FOOTER = """\
--cfg job      print the composed configuration
--config-dir   folder with YAML groups of your own
--hydra-help   the other options of Hydra

docs/configuration.md has the same settings with the YAML groups and what each option changes."""


def help_text(
    name: str,
    script: str,
    summary: str,
    examples: tuple[str, ...],
    settings: list[Setting],
    *,
    config: str,
    configs: str,
) -> str:
    """Usage, examples, presets and settings. `config` is the YAML file in the package `configs`, which may change
    defaults.
    """
    with initialize_config_module(configs, version_base="1.3"):
        composed = compose(config)
    return "\n".join(
        [
            f"usage: flowdit {name} key=value ...",
            f"       {script} key=value ...",
            "",
            summary,
            "",
            "examples:",
            *(f"  flowdit {name} {example}" for example in examples),
            *group_lines(composed),
            "",
            *setting_lines(composed, settings),
            FOOTER,
        ]
    )


def group_lines(composed: DictConfig) -> Iterator[str]:
    """The presets of a training command, those of its network, or of both; other commands have none."""
    if "model" not in composed:
        return
    networks = {"ccdit"} if composed.model.name == "ccdit" else {"pixart", "mmdit"}
    networks |= {"pixart", "mmdit"} if "stage" in composed else set()
    yield from ["", "presets and sizes:"]
    for file in sorted((GROUPS / "experiment").glob("*.yaml")):
        chosen = network(file)
        if chosen in networks:
            yield f"  experiment={file.stem:<18} {purpose(file)}"
    sizes = sorted((GROUPS / "model" / "size").glob("*.yaml"), key=lambda file: OmegaConf.load(file).hidden_dim)
    yield f"  model/size={'|'.join(file.stem for file in sizes)}"


def network(file: Path) -> str | None:
    """The network that a preset chooses, itself or through the preset that it extends."""
    content = OmegaConf.to_container(OmegaConf.load(file))
    assert isinstance(content, dict)
    for entry in content.get("defaults", []):
        if isinstance(entry, dict) and "override /model" in entry:
            return entry["override /model"]
        if isinstance(entry, str) and (base := file.with_name(f"{entry}.yaml")).is_file():
            return network(base)
    return None


def purpose(file: Path) -> str:
    """The first sentence of the comment at the top of a preset."""
    lines = [line.removeprefix("#").strip() for line in file.read_text().splitlines() if line.startswith("#")]
    prose = " ".join(line for line in lines if not line.startswith("@package")).removeprefix("Reproduces: ")
    return textwrap.shorten(prose.partition(". ")[0].rstrip("."), 90, placeholder=" ...")


def setting_lines(composed: DictConfig, settings: list[Setting]) -> Iterator[str]:
    """Every setting with the default of this command and its meaning, wrapped to the terminal."""
    width = min(shutil.get_terminal_size().columns, 100)
    section = ""
    yield "settings:"
    for setting in settings:
        if (own := setting.key.rpartition(".")[0]) != section:
            section = own
            yield ""
        missing = OmegaConf.is_missing(OmegaConf.select(composed, own) if own else composed, setting.key.split(".")[-1])
        yield f"  {setting.key}  (must be given)" if missing else f"  {setting.key}={shown_default(composed, setting)}"
        yield textwrap.fill(setting.meaning.replace("`", ""), width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    yield ""


def shown_default(composed: DictConfig, setting: Setting) -> str:
    value = OmegaConf.select(composed, setting.key)
    return in_yaml(OmegaConf.to_container(value) if OmegaConf.is_config(value) else value)
