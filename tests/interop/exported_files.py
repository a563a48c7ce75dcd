"""The two code files of an exported folder, loaded by path: no part of the package may import torch."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import flowdit

EXPORTED = Path(flowdit.__file__).parent / "interop" / "exported"


def load_source(name: str) -> ModuleType:
    """One of the files as a module. As part of the package it would be under run-time type checks."""
    spec = importlib.util.spec_from_file_location(f"exported_{name}", EXPORTED / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


CLASSES_OF = load_source("flowdit_transformer")
FlowDiTPipeline = load_source("pipeline").FlowDiTPipeline
