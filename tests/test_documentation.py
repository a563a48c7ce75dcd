"""The pages agree with the code: settings, links, tests that are named, commands and Python that are shown."""

import ast
import dataclasses
import functools
import importlib
import importlib.util
import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from test_structure import LAYERS

from flowdit import conditioning, evaluate
from flowdit.config import Config, SampleConfig, register_schemas, resolve
from flowdit.convert import register_schema
from flowdit.data.prepare import PrepareConfig
from flowdit.data.verification import VerifyConfig
from flowdit.inspect import register_schema as register_inspect
from flowdit.inspection.config import InspectConfig
from flowdit.interop import ConvertConfig
from flowdit.overrides import for_hydra
from flowdit.plan import chosen_stage
from flowdit.planning.config import PlanConfig
from flowdit.report import register_schema as register_report
from flowdit.reporting.config import ReportConfig
from flowdit.scores.config import EvaluateConfig
from flowdit.serve import register_schema as register_serve
from flowdit.serving.config import ServeConfig
from flowdit.settings import settings_of
from flowdit.verify import register_schema as register_verify

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "document_config.py"
PAGES = [path for pattern in ("*.md", "docs/**/*.md", "pretrained/*.md") for path in sorted(ROOT.glob(pattern))]
page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


@pytest.fixture(scope="module")
def generator():
    spec = importlib.util.spec_from_file_location("document_config", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_on_configuration_is_current(generator):
    assert generator.PAGE.read_text() == generator.page(), "run: python scripts/document_config.py"


@dataclasses.dataclass
class Described:
    """Some settings.

    Attributes:
        width: pixels of a side,
            a multiple of 8.
    """

    width: int | None = None


@dataclasses.dataclass
class Undescribed(Described):
    height: int = 8


@dataclasses.dataclass
class Outdated(Described):
    """More settings.

    Attributes:
        depth: a field that was removed.
    """


def test_a_field_has_a_row_of_key_type_default_and_description(generator):
    (table,) = generator.sections(Described)
    assert "| `width` | int or null | `null` | Pixels of a side, a multiple of 8. |" in table


@pytest.mark.parametrize(("schema", "field"), [(Undescribed, "height"), (Outdated, "depth")])
def test_fields_and_descriptions_must_be_the_same(generator, schema, field):
    with pytest.raises(ValueError, match=f"^{schema.__name__}: .* {field}$"):
        list(generator.sections(schema))


def test_the_table_of_layers_is_that_of_the_imports():
    named: dict[str, int] = {}
    for number, modules in re.findall(r"^\| (\d+) \| (`.*?) \|", (ROOT / "docs" / "architecture.md").read_text(), re.M):
        named |= {module.partition(".")[0]: int(number) for module in re.findall(r"`(\w[\w.]*)`", modules)}
    assert named == LAYERS


BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return BLOCK.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """The anchors of the headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@page
def test_links_resolve(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if not link.startswith("http"):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


@page
def test_files_and_tests_that_are_named_exist(page):
    for name, test in re.findall(r"`([\w/]*test_\w+\.py)(?:::(\w+))?`", prose(page)):
        found = [path for path in (ROOT / "tests").rglob("test_*.py") if path.as_posix().endswith(f"/{name}")]
        assert len(found) == 1, name
        assert not test or f"def {test}(" in found[0].read_text(), f"{name}::{test}"


@page
def test_prose_fits_120_characters(page):
    if page.name != "configuration.md":  # written by a script
        lines = BLOCK.sub("", page.read_text()).splitlines()
        assert [line for line in lines if len(line) > 120 and not line.startswith("|")] == []


TRAINING = {"train-stage1": "config", "train-stage2": "config_stage2"}
SCHEMAS = {"config": Config, "config_stage2": Config, "sample": SampleConfig}
SCHEMAS |= {"prepare": PrepareConfig, "convert": ConvertConfig, "plan": PlanConfig}
SCHEMAS |= {"evaluate": EvaluateConfig, "report": ReportConfig, "serve": ServeConfig}
DATA_SCHEMAS = {"verify": VerifyConfig, "inspect": InspectConfig}
"""Of the commands in `flowdit.data_configs`."""
SCHEMAS |= DATA_SCHEMAS
REQUIRED = {
    "sample": ["checkpoint=x"],
    "evaluate": ["checkpoint=x"],
    "serve": ["checkpoint=x"],
    "convert": ["source=x", "target=y"],
    "prepare": [],
    "plan": ["topology=v5e:1"],
    "report": ["run=x"],
    "verify": ["data=x"],
    "inspect": ["data=x"],
}
SETTINGS = {name: settings_of(schema) for name, schema in SCHEMAS.items()}
COMMAND = re.compile(
    r"\btrain_(stage[12])\.py|python -m flowdit\.(\w+)|(?:^|again\.sh |(=\"))flowdit ([\w-]+)|launch/(slurm|mpirun)\.sh"
)
# The one adds settings to the package, which its commands use; the other quotes a command that is refused.
SHOWN = [each for each in PAGES if each.name not in ("extending.md", "decisions.md")]


def command_lines(page: Path) -> Iterator[tuple[str, list[str]]]:
    """The commands of flowdit on a page, as the name of the YAML file and the settings.

    Those within a line of text, and those that resume a run, may leave out the settings that a command needs.
    """
    blocks = [code.replace("\\\n", " ") for _, language, code in BLOCK.findall(page.read_text()) if not language]
    inline = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(page))]
    for line in [*"\n".join(blocks).splitlines(), *inline]:
        command = COMMAND.search(line)
        if command is None:
            continue
        stage, module, quote, name, script = command.groups()
        name = "train-stage1" if script else f"train-{stage}" if stage else module or name
        given = line[command.end() :].partition('"')[0] if quote else line[command.end() :]
        arguments = [a for a in shlex.split(given, comments=True) if "=" in a]
        if "--multirun" in line:  # the first run of a sweep
            arguments = [a.replace("${hydra:job.num}", "0").partition(",")[0] for a in arguments]
        may_be_partial = bool(script) or line in inline or "train.is_restore=true" in arguments
        yield TRAINING.get(name, name), [*(REQUIRED.get(name, ["data.path=x"]) if may_be_partial else []), *arguments]


@functools.cache
def check_command(name: str, arguments: tuple[str, ...]) -> None:
    """Compose and check a command; cached, as many commands are on several pages."""
    file = name
    if name == "plan":  # reads the files of the training commands, with settings of its own
        register_schemas(PlanConfig)
        file = TRAINING[f"train-stage{chosen_stage(arguments)}"]
        arguments = ("data.path=x", *arguments)
    module = "flowdit.data_configs" if name in DATA_SCHEMAS else "flowdit.configs"
    with initialize_config_module(module, version_base="1.3"):
        config = resolve(compose(file, for_hydra(arguments, SETTINGS[name])), SCHEMAS[name])
    register_schemas()
    config.check()
    if isinstance(config, Config):
        conditioning.check(config)


@pytest.mark.parametrize("page", SHOWN, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_compose(page):
    register_schemas()
    register_schema()
    evaluate.register_schema()
    register_report()
    register_serve()
    register_verify()
    register_inspect()
    for name, arguments in command_lines(page):
        if arguments:
            check_command(name, tuple(arguments))


@page
def test_settings_that_are_named_exist(page):
    known = {key for settings in SETTINGS.values() for key in settings}
    for code in re.findall(r"`([^`]+)`", prose(page)):
        for key in re.findall(r"(?:^|\s)((?:train|data|model|text|optim|mesh|wandb)\.[a-z_.]+)=", code):
            assert key in known or page.name in ("CHANGELOG.md", "extending.md"), key


@page
def test_python_is_valid_and_its_imports_exist(page):
    for _, language, code in BLOCK.findall(page.read_text()):
        for node in ast.walk(ast.parse(textwrap.dedent(code))) if language == "python" else ():
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flowdit"):
                path = f"{node.module}.py".replace(".", "/", node.module.count("."))
                if f"`{path}`:" not in page.read_text():  # the page itself adds it
                    module = importlib.import_module(node.module)
                    assert all(hasattr(module, name.name) for name in node.names), ast.unparse(node)
