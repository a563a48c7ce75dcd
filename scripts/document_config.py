"""Write docs/configuration.md from the dataclasses, their docstrings and the YAML groups.

    python scripts/document_config.py

Every field is described in an `Attributes:` section of the docstring of its class.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

import flowdit.configs
from flowdit.config import Config, SampleConfig, register_schemas
from flowdit.data.prepare import PrepareConfig
from flowdit.data.verification import VerifyConfig
from flowdit.diffusion.auxiliary import AUXILIARY, AuxiliaryLoss
from flowdit.inspection.config import InspectConfig
from flowdit.interop import ConvertConfig
from flowdit.planning.config import PlanConfig
from flowdit.reporting.config import ReportConfig
from flowdit.scores.config import EvaluateConfig
from flowdit.serving.config import ServeConfig
from flowdit.settings import default, described_fields, in_yaml, own_subclasses, type_name

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
GROUPS = Path(flowdit.configs.__file__).parent
COMMANDS = {
    "Training": ("`train_stage1.py` and `train_stage2.py`", Config),
    "Sampling": ("`python -m flowdit.sample`", SampleConfig),
    "Evaluating": ("`python -m flowdit.evaluate`", EvaluateConfig),
    "The page": ("`python -m flowdit.serve`", ServeConfig),
    "Planning": ("`python -m flowdit.plan`, besides those of training", PlanConfig),
    "Reports": ("`python -m flowdit.report`", ReportConfig),
    "Preparing data": ("`python -m flowdit.prepare`", PrepareConfig),
    "Verifying data": ("`python -m flowdit.verify`", VerifyConfig),
    "Inspecting data": ("`python -m flowdit.inspect`", InspectConfig),
    "Converting": ("`python -m flowdit.convert`", ConvertConfig),
}
INTRODUCTION = """# Configuration

Every key of every command: type, default, meaning. Written by `python scripts/document_config.py` from the dataclasses
that hold the settings; do not edit. Set a key with `key=value` on the command line; `null` means no value. Presets and
other YAML groups, which set several keys, are listed [at the end](#yaml-groups).

"""


def page() -> str:
    """The whole page, as Markdown."""
    parts = [INTRODUCTION]
    for title, (command, schema) in COMMANDS.items():
        parts.append(f"## {title}\n\nKeys of {command}.\n\n")
        parts += sections(schema)
    parts.append("## YAML groups\n\n")
    parts += group_tables()
    return "".join(parts).rstrip("\n") + "\n"


def sections(schema: type, prefix: str = "") -> Iterator[str]:
    """A table of the fields of `schema`, and one for each dataclass among them; subclasses show what they add."""
    known = {field.name for field in dataclasses.fields(Config)} if schema is PlanConfig else set()
    nested = {name: kind for name, kind in nested_classes(schema).items() if name not in known}
    if prefix:
        yield f"### `{prefix.rstrip('.')}`\n\n{introduction(schema)}\n\n"
    fields = [field for field in dataclasses.fields(schema) if field.name not in known]
    fields.sort(key=lambda field: field.name not in inspect.get_annotations(schema))
    yield table(schema, prefix, [field for field in fields if field.name not in nested])
    for subclass in own_subclasses(schema) if prefix else []:
        if added := added_fields(schema, subclass):
            yield f"With `{subclass.__name__}`: {introduction(subclass)}\n\n{table(subclass, prefix, added)}"
    for name, kind in nested.items():
        yield from sections(kind, f"{prefix}{name}.")
    if schema is Config:
        for name, loss in AUXILIARY.items() or [("<name>", AuxiliaryLoss)]:
            yield from sections(loss, f"auxiliary.{name}.")


def nested_classes(schema: type) -> dict[str, type]:
    """The fields that are dataclasses themselves."""
    hints = typing.get_type_hints(schema)
    names = [field.name for field in dataclasses.fields(schema)]
    return {name: hints[name] for name in names if dataclasses.is_dataclass(hints[name])}


def added_fields(base: type, subclass: type) -> list[dataclasses.Field]:
    """The fields of `subclass` that `base` does not have, or that have another default."""
    defaults = {field.name: default(field) for field in dataclasses.fields(base)}
    return [field for field in dataclasses.fields(subclass) if defaults.get(field.name) != default(field)]


def table(schema: type, prefix: str, fields: list[dataclasses.Field]) -> str:
    """The fields as rows of a table. Raises `ValueError` for a field without a description, or an unknown one."""
    hints, described = typing.get_type_hints(schema), {field.name: text for field, text in described_fields(schema)}
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for field in fields:
        stages = [
            text for text in stage_defaults().get(prefix + field.name, []) if not text.endswith(f" {default(field)}")
        ]
        value = "; ".join([default(field), *stages])
        cells = (f"`{prefix}{field.name}`", type_name(hints[field.name]), value, described[field.name])
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n\n"


@functools.cache
def stage_defaults() -> dict[str, list[str]]:
    """Defaults of the training commands that are not those of the dataclasses, by key: "stage 2: `150000`"."""
    register_schemas()
    found: dict[str, list[str]] = {}
    plain = dict(leaves(dataclasses.asdict(Config())))
    for stage, name in ((1, "config"), (2, "config_stage2")):
        with initialize_config_module("flowdit.configs", version_base="1.3"):
            composed = OmegaConf.to_container(compose(name))
        assert isinstance(composed, dict)
        for key, value in leaves(composed):
            if value != plain.get(key, value) and value != "???":
                found.setdefault(key, []).append(f"stage {stage}: `{in_yaml(value)}`")
    return found


def introduction(schema: type) -> str:
    """The docstring up to its section of attributes."""
    return inspect.cleandoc(schema.__doc__ or "").partition("\nAttributes:\n")[0].strip()


def group_tables() -> Iterator[str]:
    """The defaults of the training commands, and one table per group: options, descriptions and changes."""
    yield "What the two training commands choose without overrides:\n\n| command | choices |\n|---|---|\n"
    for command, name in (("train_stage1.py", "config"), ("train_stage2.py", "config_stage2")):
        yield f"| `{command}` | {in_code(changes(GROUPS / f'{name}.yaml', ''))} |\n"
    yield "\n"
    for folder in sorted({file.parent for file in GROUPS.glob("*/**/*.yaml")}):
        group = folder.relative_to(GROUPS).as_posix()
        yield f"### `{group}=...`\n\n| option | what it is | what it changes |\n|---|---|---|\n"
        for file in sorted(folder.glob("*.yaml")):
            yield f"| `{file.stem}` | {comment(file)} | {in_code(changes(file, group)) or 'nothing'} |\n"
        yield "\n"


def comment(file: Path) -> str:
    """The sentences at the top of a file, without commands."""
    lines = [line.removeprefix("#").rstrip() for line in file.read_text().splitlines() if line.startswith("#")]
    prose = [line.strip() for line in lines if not line.startswith(("   ", " @package"))]
    return " ".join(prose).replace("|", "\\|")


def changes(file: Path, group: str) -> Iterator[str]:
    """The options of groups that a file chooses, and the values that it sets, as overrides."""
    content = OmegaConf.to_container(OmegaConf.load(file))
    assert isinstance(content, dict)
    entries = [entry if isinstance(entry, dict) else {"": entry} for entry in content.pop("defaults", [])]
    for name, option in ((name, option) for entry in entries for name, option in entry.items()):
        if not name and group and option != "_self_" and not option.endswith("_schema"):
            yield f"{group}={option}"
        elif name.startswith("override /"):
            yield f"{name.removeprefix('override /')}={option}"
        elif name and option is not None:
            yield f"{group}/{name}={option}".lstrip("/")
    section = {"": "", "experiment": "", "model/size": "model."}.get(group, f"{group}.")
    yield from (f"{section}{name}={in_yaml(value)}" for name, value in leaves(content))


def in_code(items: Iterator[str]) -> str:
    """A list in Markdown."""
    return ", ".join(f"`{item}`" for item in items)


def leaves(tree: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values of a nested dictionary."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
