"""Hints about a source and requests for images from Python: checked like those of the commands."""

import numpy as np
import pytest
from interop.small_models import DEFAULT_TEXT, STOCK_CLASS, converted, random_model, saved

from flowdit.config import SampleConfig
from flowdit.inference.sampler import Drawn, Sampler
from flowdit.interop import ConvertConfig, conversion, convert, load, read_source
from flowdit.interop.metadata import ForeignConfig
from flowdit.sample import chosen_prompts

FIELDS = [
    ("prediction", "epsilon", "prediction: must be one of velocity, noise, got 'epsilon'"),
    ("format", "foo", "format: must be one of dit, sit, pixart, got 'foo'"),
    ("interpolation_scale", -1.0, "interpolation_scale: must be a number above 0, got -1.0"),
    ("interpolation_scale", float("nan"), "interpolation_scale: must be a number above 0, got nan"),
    ("max_length", -4, "max_length: must be a whole number above 0, got -4"),
    ("num_heads", 0, "num_heads: must be a whole number above 0, got 0"),
    ("latent_size", True, "latent_size: must be a whole number above 0, got True"),
    ("weights", "best", "weights: must be one of ema, model, got 'best'"),
]


@pytest.fixture(scope="module")
def sources(meta, tmp_path_factory) -> dict[str, str]:
    """A class and a text model of a run."""
    root = tmp_path_factory.mktemp("sources")
    models = {"class": STOCK_CLASS, "text": DEFAULT_TEXT}
    return {name: saved(random_model(meta, model), root / f"{name}.safetensors") for name, model in models.items()}


@pytest.mark.parametrize(("field", "value", "message"), FIELDS)
def test_hints_are_checked_by_every_entry_point(sources, tmp_path, field, value, message):
    hints = {} if field == "weights" else {field: value}
    ways = [
        lambda: load(sources["class"], **{field: value}),
        lambda: convert(ConvertConfig(source=sources["class"], target=str(tmp_path / "out"), **{field: value})),
        lambda: read_source(sources["class"], value if field == "weights" else "ema", ForeignConfig(**hints)),
    ]
    for way in ways:
        with pytest.raises(ValueError) as caught:
            way()
        assert str(caught.value) == message
    assert not list(tmp_path.iterdir())


def test_unknown_setting(sources):
    with pytest.raises(ValueError, match="^predict: no such setting, must be one of format, prediction, latent_size, "):
        load(sources["class"], predict="noise")
    sampler = load(sources["class"])
    for name in ("label", "out", "save_latents"):
        for draw in (sampler.draw, sampler.sample):
            with pytest.raises(ValueError, match=f"^{name}: no such setting, must be one of labels, prompts, "):
                draw(**{name: "dog"})


def asked(monkeypatch, sampler: Sampler, **settings) -> list[str]:
    """The captions of the images that `sample` would draw, without drawing them."""

    def batches(self, requests, *_):
        yield Drawn(np.zeros((len(requests), 8, 8, 3), np.uint8), np.zeros(0), np.zeros(0), list(range(len(requests))))
        captions.extend(requests.captions)

    captions: list[str] = []
    monkeypatch.setattr(Sampler, "batches", batches)
    assert len(sampler.sample(**settings)) == len(captions)
    return captions


@pytest.mark.parametrize(
    ("labels", "names"),
    [("dog", ["dog"]), (3, ["sun"]), (("dog", 3), ["dog", "sun"]), (np.asarray([0, 1]), ["cat", "dog"])],
)
def test_labels_that_are_not_a_list(sources, monkeypatch, labels, names):
    """One label is one image, in Python and on the command line."""
    sampler = load(sources["class"])
    assert asked(monkeypatch, sampler, labels=labels) == names
    assert sampler.requests(1, {"labels": SampleConfig(checkpoint="here", labels=labels).labels}).captions == names


def test_one_prompt_is_one_prompt(sources, monkeypatch):
    sampler = load(sources["text"])
    monkeypatch.setattr(type(sampler.trained.conditioning), "_warn_of_truncation", lambda *_: None)  # loads an encoder
    assert asked(monkeypatch, sampler, prompts="red apple") == ["red apple"]
    assert asked(monkeypatch, sampler, prompts=2024, num_images=2) == ["2024", "2024"]
    assert chosen_prompts(SampleConfig(checkpoint="here", prompts="red apple")) == ["red apple"]
    assert SampleConfig(prompts=[2024]).prompts == SampleConfig(prompts=2024).prompts == ["2024"]


def test_one_prompt_for_the_image_of_the_card(sources, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(conversion, "draw_grid", lambda sampler, path, prompts: asked.append(prompts))
    options = {"own_class": True, "image": "draw", "prompts": "red apple"}
    converted(sources["text"], tmp_path / "out", to="diffusers", **options)
    assert asked == [["red apple"]]
