"""Units of work done by two workers of Ray."""

import os
from collections.abc import Iterator

import pytest
from ray_tests import SquareMaker, ray_folder

from flowdit.data.preparation.engines import Engine, RayConfig, open_engine
from flowdit.fields import FieldError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ray_engine() -> Iterator[Engine]:
    with ray_folder(), open_engine("ray", RayConfig(workers=2)) as engine:
        yield engine


def test_ray_does_each_item_once_and_replaces_a_killed_worker(ray_engine, tmp_path, messages):
    found = list(ray_engine.run(SquareMaker(tmp_path), range(12)))
    assert sorted(square for square, _ in found) == [i**2 for i in range(12)]
    assert len({process for _, process in found}) >= 2 and os.getpid() not in dict(found).values()
    assert (tmp_path / "killed").exists()
    assert [line for line in messages() if "a worker was lost" in line]
    assert list(ray_engine.run(pytest.fail, [])) == []


def test_an_error_in_a_worker_of_ray_is_the_same_one(ray_engine, tmp_path):
    with pytest.raises(FieldError, match="^dtype: must be finite, got -1$"):
        list(ray_engine.run(SquareMaker(tmp_path), [1, -1]))


def test_an_item_that_kills_every_worker_ends_the_run(ray_engine, tmp_path):
    with pytest.raises(ValueError, match=r"^ray: 10 workers were lost \(killed, out of memory\) at one unit: 100$"):
        list(ray_engine.run(SquareMaker(tmp_path), [100]))


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (RayConfig(workers=99), r"^ray.workers: 99 with 1 CPU each: Ray has \d+ CPU$"),
        (
            RayConfig(tpus_per_worker=4),
            "^ray.workers: 1 with 1 CPU, 4 TPU each: Ray has .* CPU, 0 TPU$",
        ),
    ],
)
def test_ray_names_what_its_machines_lack(ray_engine, config, line):
    with pytest.raises(FieldError, match=line), open_engine("ray", config):
        pass
