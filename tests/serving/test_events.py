"""What the page and its API call, without a browser. It needs gradio: `make test-browser`."""

import asyncio
import dataclasses

import jax
import pytest
from runs import REPOSITORY

import flowdit
from flowdit.inference.sampler import Sampler
from flowdit.serving.config import ServeConfig
from flowdit.serving.draws import Models
from flowdit.serving.turns import Turns
from flowdit.sharding import MeshConfig, make_mesh

pytestmark = pytest.mark.browser
QUICK = {"label": "heart", "solver": "euler", "steps": 1}


@pytest.fixture(scope="module")
def models() -> Models:
    return Models(
        [flowdit.load(str(REPOSITORY / "pretrained" / "openmoji"))], ServeConfig(checkpoint="x", max_images=4, frames=0)
    )


@pytest.fixture
def events(models):
    from flowdit.serving.events import Events

    return Events(models, Turns(4, 4), ["model"])


async def last_line(stream) -> str:
    line = ""
    async for parts in stream:
        line = parts[0]
    return line


def test_two_visitors_drop_the_same_file(events, models, tmp_path):
    ((picture,),) = models.draw(QUICK).run(lambda fraction: None)
    file = tmp_path / "image.png"
    file.write_bytes(picture.png)

    async def both() -> list[str]:
        return await asyncio.gather(*(last_line(events.dropping(["seed"])(None, str(file))) for _ in range(2)))

    assert all("1 image in " in line for line in asyncio.run(both()))


@pytest.mark.parametrize("path", [None, "gone.png"])
def test_a_drop_without_a_file_is_one_line(events, path):
    line = asyncio.run(last_line(events.dropping(["seed"])(None, path)))
    assert "fd-error" in line and "recipe: the file cannot be read, drop it again: " in line


def test_an_error_in_the_solver_is_one_line(models):
    """Too few steps for the tolerance are found while the draw runs."""
    import gradio  # pyright: ignore[reportMissingImports]

    from flowdit.serving.events import Events

    trained = models.samplers[0].trained
    solver = dataclasses.replace(trained.config.train.sampler, solver="heun", steps=1, rtol=1e-6)
    config = dataclasses.replace(trained.config, train=dataclasses.replace(trained.config.train, sampler=solver))
    sampler = Sampler(trained._replace(config=config), make_mesh(MeshConfig(), jax.local_devices()[:1]))
    events = Events(Models([sampler], models.config), Turns(4, 4), ["model"])
    with pytest.raises(gradio.Error) as problem:
        asyncio.run(events.draw_result({"label": "heart"}, "ann"))
    assert problem.value.message.startswith("steps: must be more for rtol=1e-06, got 1")
    line = asyncio.run(last_line(events.drawing(["label"])(None, "heart")))
    assert "fd-error" in line and "steps: must be more for rtol=1e-06, got 1" in line
