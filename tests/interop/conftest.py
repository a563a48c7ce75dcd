"""What all tests of interchange share: the metadata of a run, and a place for the code that diffusers copies."""

import sys
from pathlib import Path
from typing import Any

import diffusers.utils.dynamic_modules_utils as dynamic_modules
import pytest
from interop.foreign_folders import write_stock

from flowdit.checkpoint.meta import read_meta


@pytest.fixture(scope="module")
def meta(whole_run) -> dict[str, Any]:
    return read_meta(whole_run / "6")


@pytest.fixture(scope="session")
def stock(tmp_path_factory) -> Path:
    """Good folders and a good file of other projects, `write_stock`. Tests change copies."""
    return write_stock(tmp_path_factory.mktemp("stock"))


@pytest.fixture(autouse=True, scope="module")
def module_cache(tmp_path_factory):
    """Where diffusers copies the code of the folders that it loads, which it also puts on the path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_modules, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setattr(sys, "path", [*sys.path])
        yield
