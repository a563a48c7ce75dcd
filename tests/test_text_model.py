"""`python -m benchmarks text_model`: what is asked for, how images are judged, and a whole run that goes on after a kill."""

import functools
import json
from collections import Counter

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from benchmarks import emoji_judge, emoji_prompts, text_model
from benchmarks.emoji_judge import Judge, load_real
from benchmarks.emoji_prompts import FREE, IMAGES
from flowdit.data import openmoji
from flowdit.data.emoji_styles import STYLES, load_pictures, load_sheet
from flowdit.features.base import Extracted, FeatureNetwork

PICTURES = load_pictures()
read_once = functools.cache(load_sheet)
PAIRS = [picture for picture in PICTURES if picture.held_out == "pair"]


def test_prompts_are_chosen_by_names_and_equally_from_all_styles():
    asked = text_model.ask(PICTURES, STYLES, 100)
    assert asked == text_model.ask(PICTURES[::-1], STYLES, 100)
    for name, held_out in (("training", ""), ("held_out", "pair")):
        prompts, pictures = asked.grids[name]
        assert {picture.held_out for picture in pictures} == {held_out}
        assert Counter(picture.style for picture in pictures) == dict.fromkeys(STYLES, 3)
        assert len({picture.subject["hexcode"] for picture in pictures}) == 24 == len(set(prompts))
    for pair, trained in zip(asked.grids["held_out"].pictures, asked.grids["companions"].pictures, strict=True):
        assert pair.subject is trained.subject and pair.style != trained.style and not trained.held_out
    assert len(set(FREE)) == 24
    assert [len(part.prompts) for part in asked.table.values()] == [100, 100]
    assert len(asked.every()) == 4 * 24 * IMAGES + 200
    assert all(prompt.endswith(" style") for prompt in asked.table["held-out pairs"].prompts)


@pytest.mark.parametrize("styles", [STYLES, ("openmoji",)])
def test_kernel_distances_are_from_pictures_that_are_not_asked_for(styles):
    asked = text_model.ask(PICTURES, styles, 400)
    shown = Counter(picture.subject["hexcode"] for picture in PICTURES if not picture.held_out)
    for name, part in asked.table.items():
        others = asked.others[name]
        assert not {picture.key for picture in part.pictures} & {picture.key for picture in others}
        assert {picture.held_out for picture in others} == {picture.held_out for picture in part.pictures}
        assert {picture.style for picture in others} == {picture.style for picture in part.pictures} == set(styles)
        other_styles = [shown[each.subject["hexcode"]] - (not each.held_out) for each in part.pictures]
        assert min(other_styles) >= 3
    if len(styles) > 1:  # 510 pairs
        assert [len(part.prompts) for part in asked.table.values()] == [400, 255]
        assert [len(others) for others in asked.others.values()] == [2000, 255]


def test_a_model_of_one_style_is_asked_for_it_without_its_name():
    asked = text_model.ask(PICTURES, ("openmoji",), 50)
    assert set(asked.grids) == {"training", "free"} and set(asked.table) == {"training prompts"}
    assert {picture.style for picture in asked.grids["training"].pictures} == {"openmoji"}
    assert len(asked.grids["training"].prompts) == 24
    embedded = openmoji.load()
    known = {name for name, is_held_out in zip(embedded.names, embedded.held_out, strict=True) if not is_held_out}
    assert {picture.subject["hexcode"] for picture in asked.pictures() + asked.others["training prompts"]} <= known
    assert not any(prompt.endswith(" style") for prompt in asked.table["training prompts"].prompts)


@pytest.mark.parametrize("arguments", [["style=flat"], ["images=3"], ["batch_size=0"], ["unknown=1"], ["images=many"]])
def test_wrong_settings_are_named(arguments):
    with pytest.raises(ValueError, match=arguments[0].partition("=")[0]):
        text_model.check(["checkpoint", *arguments])


def test_the_checkpoint_may_stand_without_its_name():
    assert text_model.settings_of(["runs/text", "images=30"]) == text_model.Settings("runs/text", images=30)


class Thumbnails(eqx.Module):
    """A stand-in for a feature network: how often each colour has each of 8 levels, and the pixels of 4x4 areas."""

    def __call__(self, images):
        levels = jax.nn.one_hot(images // 32, 8).mean((1, 2)).reshape(len(images), -1)
        areas = images.astype(jnp.float32).reshape(len(images), 4, 16, 4, 16, 3).mean((2, 4)) / 255
        return Extracted(jnp.concatenate([levels, areas.reshape(len(images), -1)], 1), None)


def thumbnails(name: str) -> FeatureNetwork:
    return FeatureNetwork(name, Thumbnails(), 72, f"thumbnails for {name}")


@pytest.fixture
def few_pictures(monkeypatch):
    """Pictures of 60 subjects with held-out pairs, and small feature networks."""
    subjects = set(sorted({picture.subject["hexcode"] for picture in PAIRS})[::6])
    few = [picture for picture in PICTURES if picture.subject["hexcode"] in subjects]
    monkeypatch.setattr(text_model, "load_pictures", lambda: few)
    monkeypatch.setattr(emoji_judge, "load_sheet", read_once)
    monkeypatch.setattr(emoji_judge, "judging_network", lambda: thumbnails("emoji"))
    monkeypatch.setattr(emoji_judge, "STYLE_WIDTH", 24)
    monkeypatch.setattr(emoji_judge, "distance_network", lambda: thumbnails("efficientnet"))
    return few


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A folder for features, computed once for all tests."""
    return str(tmp_path_factory.mktemp("cache"))


def test_a_model_that_copies_pictures_is_told_from_one_that_draws_others(few_pictures, cache):
    asked = text_model.ask(few_pictures, STYLES, 40)
    pairs, others = asked.table["held-out pairs"].pictures, asked.others["held-out pairs"]
    judge = Judge(load_real(few_pictures, cache), asked.pictures())
    copied = judge.row("copied", judge.real.images(pairs), pairs, others)
    assert copied.near.value >= copied.nearest.value > 0.1
    assert abs(copied.kid.value) < 3 * copied.kid.error
    wrong = judge.row("wrong", judge.real.images(pairs[5:] + pairs[:5]), pairs)
    assert wrong.nearest.value < copied.nearest.value and wrong.style.value < copied.style.value
    white = np.full((2 * len(pairs), 64, 64, 3), 255, np.uint8)
    empty = judge.row("white", white[: len(pairs)], pairs, others)
    assert empty.kid.value > copied.kid.value + 5 * empty.kid.error
    assert judge.row("white", white, pairs, repeats=2).kid is None


def test_chance_is_the_mean_over_all_other_names(few_pictures, cache):
    judge = Judge(load_real(few_pictures, cache), [])
    some = [picture for picture in few_pictures if not picture.held_out][:8]
    images = judge.real.images(some)
    rows = [judge.row("others", images, some[i:] + some[:i]) for i in range(1, len(some))]
    chance = judge.chance("chance", some)
    for found, wanted in ((chance.style, "style"), (chance.nearest, "nearest"), (chance.near, "near")):
        assert found.value == pytest.approx(np.mean([getattr(row, wanted).value for row in rows]))
    assert 0 < chance.near.value < 1


def test_the_judge_is_not_fitted_to_the_pictures_that_are_asked_for(few_pictures, cache):
    real = load_real(few_pictures, cache)
    asked = [picture for picture in few_pictures if not picture.held_out][:40]
    numbers = [few_pictures.index(picture) for picture in asked]
    changed = real.features.copy()
    changed[numbers] = np.random.default_rng(0).random((len(numbers), changed.shape[1]))
    told = [
        Judge(real._replace(features=features), left_out).row("", real.images(asked), asked)
        for left_out in (asked, [])
        for features in (real.features, changed)
    ]
    assert told[0].style == told[1].style and told[2].style != told[3].style


def test_the_subject_is_looked_for_in_other_styles_only(few_pictures, cache):
    trained = [picture for picture in few_pictures if not picture.held_out]
    judge = Judge(load_real(few_pictures, cache), [])
    assert judge.row("copied", judge.real.images(trained), trained).nearest.value < 0.9


@pytest.mark.slow  # it compiles sampling, VAE and features
def test_a_whole_run_and_one_that_goes_on(whole_text_run, few_pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(emoji_prompts, "PROMPTS", 8)
    monkeypatch.setattr(text_model, "FREE", FREE[:2])
    arguments = [f"checkpoint={whole_text_run}", f"out={tmp_path}", f"cache={tmp_path}/cache", "images=20", "steps=1"]
    arguments += ["solver=euler", "batch_size=32"]
    shown = text_model.measure(*arguments)
    assert shown.count("\n| ") == 13 and "held-out pairs: real pictures | 20 |" in shown
    assert capsys.readouterr().out.count("drawing") == 5  # of 26 x 4 + 2 x 20 images
    grids = {name: (tmp_path / name).read_bytes() for name in ("training.png", "held_out.png", "free.png")}
    content = json.loads((tmp_path / "table.json").read_text())
    assert [row["images"] for row in content["rows"] if row["kid"]][::3] == ["training prompts", "held-out pairs"]
    assert Image.open(tmp_path / "held_out.png").width == 4 + 10 * 132
    parts = sorted((tmp_path / "images").glob("*/*.npy"))
    parts[-1].unlink()
    monkeypatch.setattr(text_model, "judged", lambda *given: [])
    text_model.measure(*arguments)
    assert capsys.readouterr().out.count("drawing") == 1
    assert {name: (tmp_path / name).read_bytes() for name in grids} == grids
