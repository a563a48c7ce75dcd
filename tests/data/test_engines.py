"""Settings of the engines, the loop, and what is said where Ray cannot be used."""

import importlib
import os
import sys
import time

import pytest
from ray_tests import SquareMaker

from flowdit.data import preparation
from flowdit.data.preparation.engines import RayConfig, check_engine, open_engine
from flowdit.fields import FieldError


def test_the_loop_does_items_in_order_with_one_worker(tmp_path):
    with open_engine("loop", RayConfig()) as engine:
        assert list(engine.run(SquareMaker(tmp_path), [1, 2])) == [(1, os.getpid()), (4, os.getpid())]
        assert list(engine.run(pytest.fail, [])) == []  # no worker is made for nothing
        with pytest.raises(FieldError, match="^dtype: must be finite, got -1$"):
            list(engine.run(SquareMaker(tmp_path), [-1]))


@pytest.mark.parametrize(
    ("address", "line"),
    [
        ("127.0.0.1:9", "no Ray cluster answers at 127.0.0.1:9: .*refused"),
        ("nowhere", "must be host:port, ray://host:port or auto, got 'nowhere'"),
    ],
)
def test_a_cluster_that_is_not_there_is_named_within_seconds(address, line):
    importlib.import_module("flowdit.data.preparation.ray_engine")
    start = time.monotonic()
    with pytest.raises(FieldError, match=f"^ray.address: {line}"), open_engine("ray", RayConfig(address=address)):
        pass
    assert time.monotonic() - start < 10


def test_a_missing_ray_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "flowdit.data.preparation.ray_engine", raising=False)
    monkeypatch.delattr(preparation, "ray_engine", raising=False)
    line = r"^engine: ray is not installed: pip install 'flowdit\[ray\]'"
    with pytest.raises(ValueError, match=line), open_engine("ray", RayConfig()):
        pass


@pytest.mark.parametrize(
    ("engine", "config", "line"),
    [
        ("dask", RayConfig(), "engine: must be one of loop, ray, got 'dask'"),
        ("ray", RayConfig(workers=0), "ray.workers: must be at least 1, got 0"),
        (
            "ray",
            RayConfig(gpus_per_worker=1.5),
            "ray.gpus_per_worker: must be a fraction of 1 or a whole number, got 1.5",
        ),
        ("ray", RayConfig(tpus_per_worker=-1), "ray.tpus_per_worker: must be at least 0, got -1"),
    ],
)
def test_invalid_settings_of_engines(engine, config, line):
    with pytest.raises(FieldError) as error:
        check_engine(engine, config)
    assert str(error.value) == line
