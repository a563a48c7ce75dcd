"""Shared by all tests of interchange: a run's metadata, valid folders of other projects, settings of torch and diffusers."""

import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from flowdit.checkpoint.meta import read_meta


@pytest.fixture(scope="module")
def meta(whole_run) -> dict[str, Any]:
    return read_meta(whole_run / "6").dump()


@pytest.fixture(scope="session")
def stock(tmp_path_factory) -> Path:
    """Valid folders and a valid file of other projects, from `write_stock`. Tests change copies."""
    pytest.importorskip("torch", reason="needs torch")
    from interop.stock_folders import write_stock

    return write_stock(tmp_path_factory.mktemp("stock"))


@pytest.fixture(autouse=True, scope="module")
def references(tmp_path_factory):
    """One thread for torch, and a place for the code of the folders that diffusers loads, which it puts on the path."""
    if find_spec("torch") is None:
        yield
        return
    import diffusers.utils.dynamic_modules_utils as dynamic_modules
    import torch

    # Synchronising threads at every layer costs more than layers of this size, above all next to other processes.
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_modules, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setattr(sys, "path", [*sys.path])
        yield


@pytest.fixture
def quick():
    """100,000 blocks took 21 s, and a billion never ended."""
    start = time.monotonic()
    yield
    assert time.monotonic() - start < 10
