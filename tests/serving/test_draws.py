"""Draws of the page without its page: settings and limits, turns, recipes, the same pixels as `Sampler.draw`."""

import asyncio
import dataclasses
import io
import json
import struct
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runs import call

import flowdit
from flowdit import sample
from flowdit.conditioning.none import Unconditional
from flowdit.diffusion.watch import UNWATCHED
from flowdit.fields import FieldError
from flowdit.inference.recipe import MOST_BYTES, SIGNATURE, differences, read_recipe, redraw
from flowdit.inference.sampler import Sampler
from flowdit.serving.config import ServeConfig
from flowdit.serving.draws import Models, check_pair
from flowdit.serving.server import MOST_UPLOADED, BodyLimit
from flowdit.serving.turns import Turns

QUICK = {"solver": "euler", "steps": 2}


@pytest.fixture(scope="module")
def models(whole_run) -> Models:
    config = ServeConfig(checkpoint="x", max_images=4, max_steps=20, max_prompt=50, frames=3)
    return Models([flowdit.load(str(whole_run / "6"))], config)


@pytest.fixture(scope="module")
def drawn(models):
    """Three images of a class."""
    told = []
    settings = {"label": "dog", "count": 3, "seed": 7, "guidance": 2.5, "guidance_high": 0.9, **QUICK}
    (pictures,) = models.draw(settings).run(told.append)
    assert told and max(told) == pytest.approx(1)
    return pictures


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def test_the_page_draws_what_the_sampler_draws(models, drawn):
    options = {"labels": ["dog"], "num_images": 3, "seed": 7, "guidance": 2.5, "guidance_high": 0.9, **QUICK}
    (images,) = models.samplers[0].draw(**options)
    for image, picture in zip(images, drawn, strict=True):
        np.testing.assert_array_equal(pixels(picture.png), image)
        with Image.open(io.BytesIO(picture.path)) as path:
            assert path.size == (3 * 64, 64)


def test_a_recipe_in_a_png_gives_the_image_again(models, drawn, whole_run):
    recipe = read_recipe(drawn[2].png)
    assert recipe == drawn[2].recipe == read_recipe(recipe.dump().encode())
    assert (recipe.caption, recipe.number, recipe.seed, recipe.request) == ("dog", 2, 7, {"labels": 1})
    work = models.redraw(recipe)
    ((again,),) = work.run(lambda fraction: None)
    assert again.png == drawn[2].png and work.notes == ["Same model, versions and device as in the recipe."]
    other = flowdit.load(str(whole_run / "6"))  # as in another process
    np.testing.assert_array_equal(redraw(other, recipe).images[0], pixels(drawn[2].png))


def test_a_sample_of_the_command_holds_its_recipe(models, whole_run):
    settings = ("labels=[sun,dog]", "num_images=3", "batch_size=4", "seed=9", "solver=euler", "steps=2", "out=images")
    assert call(sample.main, f"checkpoint={whole_run / '6'}", *settings).status == 0
    file = Path("images/0005_dog.png")  # the second of the second batch
    ((again,),) = models.redraw(read_recipe(file.read_bytes())).run(lambda fraction: None)
    np.testing.assert_array_equal(pixels(again.png), pixels(file.read_bytes()))


def test_what_differs_from_a_recipe_is_said(models, drawn, whole_run):
    recipe, sampler = drawn[0].recipe, models.samplers[0]
    assert differences(recipe, sampler, recipe.batch) == []
    versions = recipe.origin.versions | {"jax": "0.1"}
    origin = dataclasses.replace(recipe.origin, versions=versions, device="8 x TPU v9")
    found = differences(dataclasses.replace(recipe, origin=origin), sampler, 64)
    assert [line.split(",")[0] for line in found] == ["device 8 x TPU v9", "jax 0.1", f"a batch of {recipe.batch}"]
    (weights,) = differences(recipe, flowdit.load(str(whole_run / "4")), recipe.batch)
    assert weights.startswith(f"weights {recipe.origin.weights} of step 6, here ") and weights.endswith(" of step 4")
    guided = Sampler(sampler.trained, guide=flowdit.load(str(whole_run / "4")).trained)
    (weights,) = differences(recipe, guided, recipe.batch)
    assert weights.endswith(f", here {sampler.fingerprint}-{flowdit.load(str(whole_run / '4')).fingerprint} of step 6")
    large = dataclasses.replace(recipe, batch=2**20)  # beyond the limit it is drawn in a smaller batch
    assert "a batch of 1048576, here 4" in models.redraw(large).notes[0]


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({}, "label: must be given"),
        ({"label": "unicorn"}, "label: must be in [0, 4) or a class name (cat, dog, heart, sun), got 'unicorn'"),
        ({"label": "dog", "count": 5}, "count: must be in [1, 4], got 5"),
        ({"label": "dog", "count": 1.5}, "count: must be a whole number, got 1.5"),
        ({"label": "dog", "seed": -1}, "seed: must be in [0, 2**32), got -1"),
        ({"label": "dog", "steps": 21}, "steps: must be at most 20, got 21"),
        ({"label": "dog", "steps": True}, "steps: must be a finite number, got True"),
        ({"label": "dog", "guidance": float("nan")}, "guidance: must be a finite number, got nan"),
        ({"label": "dog", "steps": 10**400}, "steps: must be a finite number, got 1000"),
        ({"label": "dog", "guidance": 10**400}, "guidance: must be a finite number, got 1000"),
        ({"label": "dog", "seed": 10**400}, "seed: must be a whole number, got 1000"),
        ({"label": "dog", "time_shift": 2.5}, "time_shift: must be that of the model, 1.0, got 2.5"),
        ({"label": "dog", "guidance": "high"}, "guidance: must be a finite number, got 'high'"),
        ({"label": "dog", "guidance_low": 0.9, "guidance_high": 0.1}, "guidance_low/guidance_high: must satisfy"),
        ({"label": "dog", "solver": "magic"}, "solver: must be one of euler, heun, midpoint, dopri5, tsit5"),
        ({"label": "dog", "solver": "heun", "rtol": 0.1}, "rtol: must be null, got 0.1"),
        ({"label": "d" * 51}, "label: must be at most 50 characters long"),
        ({"label": ["dog"] * 9}, "label: must be one text or number"),
        ({"label": "dog", "prompt": "a dog"}, "prompt: no such setting, must be one of label, seed, count"),
    ],
)
def test_a_bad_setting_is_one_line_before_any_work(models, settings, line):
    with pytest.raises(ValueError) as problem:
        models.draw(settings)
    assert str(problem.value).startswith(line) and "\n" not in str(problem.value)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", "must be a PNG with a recipe, or a recipe as JSON"),
        (b"\xff\xfe", "must be a PNG with a recipe, or a recipe as JSON"),
        (b"[" * MOST_BYTES, "must be a PNG with a recipe, or a recipe as JSON"),
        (b" " * (MOST_BYTES + 1), f"must be at most {MOST_BYTES} bytes long"),
        (b"{}", "recipe: is missing"),
        (SIGNATURE, "this PNG has no recipe"),
        (SIGNATURE + chunk(b"IHDR", b"\xff" * 13) * 2000, "this PNG has no recipe"),
        (SIGNATURE + b"\xff\xff\xff\xfftEXtflowdit\0" + b"[" * 200_000, f"must be at most {MOST_BYTES} bytes long"),
        (SIGNATURE + chunk(b"zTXt", b"flowdit\0\0" + zlib.compress(b"[" * 10**7)), "this PNG has no recipe"),
    ],
)
def test_a_dropped_file_is_untrusted(content, line):
    with pytest.raises(FieldError, match="^recipe: ") as problem:
        read_recipe(content)
    assert line in str(problem.value)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"seed": 2**32}, "seed: "),
        ({"number": 2**31}, "number: "),
        ({"request": {"labels": [0, 1]}}, "label: must be one text or number"),
        ({"request": {}}, "must ask for one image, asks for "),
        ({"request": {"labels": 4}}, "must be in [0, 4) or a class name"),
        ({"sampler": {"steps": 10**9}}, "recipe.sampler.steps: must be at most 20"),
        ({"sampler": {"method": "euler"}}, "recipe.sampler.method: no such setting, must be one of solver, steps"),
        ({"sampler": {"guidance": 10**400}}, "recipe.sampler.guidance: must be a finite number, got 1000"),
        (
            {"sampler": {"steps": 2, "time_shift": 2.5}},
            "recipe.sampler.time_shift: must be that of the model, 1.0, got 2.5",
        ),
        ({"sampler": {"guidance": None}}, "recipe.sampler.guidance: must be a finite number, got None"),
        ({"more": 1}, "more: is not a known field"),
    ],
)
def test_a_recipe_is_checked_like_any_settings(models, drawn, changes, line):
    with pytest.raises(ValueError) as problem:
        models.redraw(read_recipe(json.dumps(json.loads(drawn[0].recipe.dump()) | changes).encode()))
    assert line in str(problem.value) and "\n" not in str(problem.value)


def test_two_models_draw_from_the_same_noise(models, whole_run):
    first, second = models.samplers[0], flowdit.load(str(whole_run / "4"))
    check_pair(first, second)
    pair = Models([first, second], models.config)
    ours, theirs = pair.draw({"label": 0, "steps": 1, "solver": "euler", "guidance": 1}).run(lambda fraction: None)
    assert ours[0].png != theirs[0].png and ours[0].recipe.seed == theirs[0].recipe.seed
    ((again,),) = pair.redraw(theirs[0].recipe).run(lambda fraction: None)
    assert again.png == theirs[0].png  # with the model that its recipe names
    with pytest.raises(FieldError, match="^compare: must take labels, as the model of checkpoint, takes no cond"):
        check_pair(first, Sampler(first.trained._replace(conditioning=Unconditional())))


def test_the_compiled_functions_that_are_used_are_kept(models, monkeypatch):
    sampler = Sampler(models.samplers[0].trained)
    monkeypatch.setattr("flowdit.inference.sampler.MOST_COMPILED", 2)
    drawing = lambda steps: sampler._draw_latents(sampler.sampler_config({"steps": steps}), UNWATCHED)
    first, second = drawing(1), drawing(2)
    assert drawing(1) is first
    drawing(3)
    assert drawing(1) is first and drawing(2) is not second


def test_turns_are_taken_in_order_and_refused_beyond_the_limits():
    turns = Turns(max_waiting=2, max_waiting_each=2)
    release, ran = threading.Event(), []
    first = turns.submit("ann", lambda tell: (release.wait(20), ran.append("first")))
    while not first.is_running:
        pass
    second = turns.submit("ann", lambda tell: ran.append("second"))
    with pytest.raises(FieldError, match="^queue: 2 of your draws are waiting or running, which is the most"):
        turns.submit("ann", ran.append)
    third = turns.submit("bob", lambda tell: (tell(0.5), ran.append("third")))
    with pytest.raises(FieldError, match="^queue: 2 draws are waiting, which is the most"):
        turns.submit("eve", ran.append)
    assert [turns.ahead(job) for job in (first, second, third)] == [0, 1, 2]
    turns.leave(second)  # it has not started
    assert turns.ahead(third) == 1
    release.set()
    third.future.result(20)
    assert ran == ["first", "third"] and third.progress == 0.5
    turns.submit("ann", lambda tell: ran.append("next")).future.result(20)
    assert ran[-1] == "next"


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_images", 65), ("max_images", 0), ("port", 70000), ("frames", 1), ("root_path", "here/"), ("max_waiting", 0)],
)
def test_bad_settings_of_the_page(field, value):
    with pytest.raises(FieldError, match=f"^{field}: must "):
        ServeConfig(checkpoint="x", **{field: value}).check()


def test_no_file_is_taken_while_the_uploads_fill_their_folder(tmp_path):
    sent, passed = [], []

    async def app(scope, receive, send):
        passed.append(scope["path"])

    async def send(message):
        sent.append(message)

    def ask(path: str) -> None:
        scope = {"type": "http", "path": path, "headers": [(b"content-length", b"10")]}
        asyncio.run(BodyLimit(app, 100, tmp_path)(scope, None, send))

    ask("/gradio_api/upload")
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(MOST_UPLOADED)
    ask("/gradio_api/upload")
    ask("/gradio_api/queue/join")
    assert passed == ["/gradio_api/upload", "/gradio_api/queue/join"]
    assert sent[0]["status"] == 413 and sent[1]["body"].startswith(b"too many files were dropped in")
