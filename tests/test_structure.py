"""Rules for the code: allowed imports, lengths of functions and files, forbidden names."""

import ast
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "flowdit"
FILES = sorted(PACKAGE.rglob("*.py"))

# Imports go downwards only: a module may import from its own layer and from lower ones.
LAYERS = {
    "errors": 0,
    "hashing": 0,
    "fields": 0,
    "json_input": 0,
    "sharding": 0,
    "processes": 0,
    "hardware": 0,
    "models": 1,
    "data": 2,
    "diffusion": 3,
    "training.optim": 4,
    "training.tracking": 4,
    "config": 5,
    "command": 5,
    "conditioning": 6,
    "checkpoint": 7,
    "inference": 8,
    "training": 9,
    "interop": 10,
    "train": 11,
    "sample": 11,
    "prepare": 11,
    "convert": 11,
}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def layer(module: str) -> int:
    parts = module.split(".")
    return LAYERS[".".join(parts[:2])] if ".".join(parts[:2]) in LAYERS else LAYERS[parts[0]]


def imported_modules(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("flowdit."):
            base = node.module.removeprefix("flowdit.")
            inner = [f"{base}.{alias.name}" for alias in node.names]
            is_module = [(PACKAGE / (name.replace(".", "/") + ".py")).exists() for name in inner]
            names |= {name if found else base for name, found in zip(inner, is_module, strict=True)}
        elif isinstance(node, ast.ImportFrom) and node.module == "flowdit":
            names |= {alias.name for alias in node.names}
    return names


@pytest.mark.parametrize("part", ["checkpoint", "inference", "interop"])
def test_a_finished_model_is_read_without_what_trains(part):
    for path in (PACKAGE / part).glob("*.py"):
        assert not {name for name in imported_modules(path) if name.startswith("training")}, path


def functions(path: Path) -> list[tuple[str, int]]:
    nodes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    return [(f"{module_name(path)}:{n.name}", n.end_lineno - n.lineno + 1) for n in nodes]


@pytest.mark.parametrize("path", [f for f in FILES if f.name != "__init__.py"], ids=module_name)
def test_imports_go_downwards(path):
    upwards = {name for name in imported_modules(path) if layer(name) > layer(module_name(path))}
    assert not upwards


def test_functions_are_short():
    lengths = [length for path in FILES for _, length in functions(path)]
    over_40 = [named for path in FILES for named in functions(path) if named[1] > 40]
    assert statistics.median(lengths) <= 10
    assert len(over_40) <= 0.02 * len(lengths), over_40
    assert max(lengths) <= 60


def test_files_are_short():
    assert {f.name: n for f in FILES if (n := len(f.read_text().splitlines())) > 350} == {}


def test_no_utils_modules():
    names = {f.stem for f in FILES}
    assert not names & {"utils", "util", "helpers", "misc", "common"}


def test_only_sharding_names_mesh_axes():
    for path in FILES:
        if module_name(path) in ("sharding", "config"):
            continue
        constants = {n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)}
        assert "fsdp" not in constants, path


def test_nothing_unpickles_but_the_records():
    for path in FILES:
        imports = {
            alias.name for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Import) for alias in n.names
        }
        assert "pickle" not in imports or module_name(path) == "data.records", path


def test_torch_is_imported_only_where_its_files_are_read_or_for_diffusers_itself():
    for path in FILES:
        tree = ast.parse(path.read_text())
        roots = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        roots |= {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
        allowed = {"torch"} if module_name(path) == "interop.torch_files" else set()
        if "exported" in path.parts:  # copied into exported folders, never imported here
            assert "flowdit" not in roots, path
        else:
            assert not roots & {"torch", "diffusers", "transformers"} - allowed, path
