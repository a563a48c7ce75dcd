"""Rules for the code: allowed imports, lengths of functions and files, forbidden names."""

import ast
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "flowdit"
FILES = sorted(PACKAGE.rglob("*.py"))
ALL_FILES = [
    *FILES,
    *(path for name in ("tests", "benchmarks", "scripts") for path in sorted((ROOT / name).rglob("*.py"))),
]

# Imports go downwards only: a module may import from its own layer and from lower ones.
LAYERS = {
    "arrays": 0,
    "errors": 0,
    "stores": 0,
    "storage": 0,
    "line_files": 0,
    "hashing": 0,
    "fields": 0,
    "power_ema": 0,
    "supervisor": 0,
    "cli": 0,
    "settings": 0,
    "json_input": 0,
    "sharding": 0,
    "fsdp": 0,
    "joining": 0,
    "leaving": 0,
    "processes": 0,
    "hardware": 0,
    "image_grid": 0,
    "canvas": 0,
    "models": 1,
    "features": 1,
    "data": 2,
    "diffusion": 3,
    "optim": 4,
    "muon": 4,
    "tracking": 4,
    "config": 5,
    "score_config": 5,
    "train_config": 5,
    "stored_config": 5,
    "command_help": 5,
    "overrides": 6,
    "command": 6,
    "sweep": 6,
    "conditioning": 6,
    "checkpoint": 7,
    "inference": 8,
    "scores": 8,
    "training": 9,
    "interop": 10,
    "planning": 10,
    "reporting": 10,
    "inspection": 10,
    "serving": 10,
    "composition": 11,
    "sized": 11,
    "train": 11,
    "sample": 11,
    "serve": 11,
    "prepare": 11,
    "evaluate": 11,
    "plan": 11,
    "report": 11,
    "convert": 11,
    "verify": 11,
    "inspect": 11,
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
def test_a_trained_model_is_read_without_training_code(part):
    for path in (PACKAGE / part).glob("*.py"):
        assert not {name for name in imported_modules(path) if name.startswith("training")}, path


@pytest.mark.parametrize("path", [f for f in FILES if f.name != "__init__.py"], ids=module_name)
def test_imports_go_downwards(path):
    upwards = {name for name in imported_modules(path) if layer(name) > layer(module_name(path))}
    assert not upwards


def places(rule: Callable[[ast.AST], bool], files: Iterable[Path]) -> list[str]:
    """Where in the files a rule holds, as `file:line`."""
    nodes = ((path, node) for path in files for node in ast.walk(ast.parse(path.read_text())))
    return [f"{path.relative_to(ROOT)}:{node.lineno}" for path, node in nodes if rule(node)]


def test_functions_fit_a_screen():
    def is_long(node: ast.AST) -> bool:
        return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno >= 60

    assert places(is_long, FILES) == []


def test_assignments_are_not_packed():
    """Three or more values assigned in one line; two may belong together, as height and width do."""

    def is_packed(node: ast.AST) -> bool:
        if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Tuple):
            return False
        names = [ast.unparse(name) for name in node.targets[0].elts]
        values = [ast.unparse(value) for value in node.value.elts] if isinstance(node.value, ast.Tuple) else []
        return min(len(names), len(values)) >= 3 and sorted(names) != sorted(values)  # the same names again: a rotation

    assert places(is_packed, ALL_FILES) == []


def test_long_calls_name_their_arguments():
    """Not those of functions that take any number of arguments of one kind."""
    trees = [ast.walk(ast.parse(path.read_text())) for path in ALL_FILES]
    variadic = {n.name for tree in trees for n in tree if isinstance(n, ast.FunctionDef) and n.args.vararg}

    def is_unnamed(node: ast.AST) -> bool:
        return isinstance(node, ast.Call) and len(node.args) >= 7 and getattr(node.func, "id", "") not in variadic

    assert places(is_unnamed, ALL_FILES) == []


def test_the_formatter_is_not_switched_off():
    marks = [f"# fmt: {word}" for word in ("skip", "off")]
    assert [path for path in ALL_FILES if any(mark in path.read_text() for mark in marks)] == []


def test_files_are_short():
    assert {f.name: n for f in FILES if (n := len(f.read_text().splitlines())) > 350} == {}


def test_no_utils_modules():
    names = {f.stem for f in FILES}
    assert not names & {"utils", "util", "helpers", "misc", "common"}


def test_only_sharding_and_fsdp_name_mesh_axes():
    for path in FILES:
        if module_name(path) in ("sharding", "fsdp"):
            continue
        nodes = list(ast.walk(ast.parse(path.read_text())))
        assert "fsdp" not in {n.value for n in nodes if isinstance(n, ast.Constant)}, path
        imported = {alias.name for n in nodes if isinstance(n, ast.ImportFrom) for alias in n.names}
        assert not imported & {"PartitionSpec", "NamedSharding"}, path


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
        allowed = {"torch"} if module_name(path) == "models.torch_files" else set()
        if "exported" in path.parts:  # copied into exported folders, never imported here
            assert "flowdit" not in roots, path
        else:
            assert not roots & {"torch", "diffusers", "transformers"} - allowed, path
