"""What a caller in Python says of a source and asks of a model: checked as the commands check it."""

import numpy as np
import pytest
from interop.small_models import DEFAULT_TEXT, STOCK_CLASS, converted, random_model, saved

from flowdit.config import SampleConfig
from flowdit.interop import ConvertConfig, conversion, convert, from_pretrained, pretrained_model, read_source
from flowdit.interop.metadata import ForeignConfig
from flowdit.interop.portable import to_trained
from flowdit.sample import Drawn, make_requests, read_prompts
from flowdit.training.trained import Trained

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


def trained_of(source: str) -> Trained:
    return to_trained(read_source(source))


@pytest.mark.parametrize(("field", "value", "told"), FIELDS)
def test_what_is_said_of_a_source_is_checked_on_every_way_in(sources, tmp_path, field, value, told):
    said = {} if field == "weights" else {field: value}
    ways = [
        lambda: from_pretrained(sources["class"], **{field: value}),
        lambda: convert(ConvertConfig(source=sources["class"], target=str(tmp_path / "out"), **{field: value})),
        lambda: read_source(sources["class"], value if field == "weights" else "ema", ForeignConfig(**said)),
    ]
    for way in ways:
        with pytest.raises(ValueError) as caught:
            way()
        assert str(caught.value) == told
    assert not list(tmp_path.iterdir())


def test_setting_that_there_is_not(sources):
    with pytest.raises(ValueError, match="^predict: no such setting, must be one of format, prediction, latent_size, "):
        from_pretrained(sources["class"], predict="noise")
    model = from_pretrained(sources["class"])
    for name in ("label", "out", "save_latents"):
        with pytest.raises(ValueError, match=f"^{name}: no such setting, must be one of labels, prompts, "):
            model.sample(**{name: "dog"})


@pytest.mark.parametrize(
    ("labels", "names"),
    [("dog", ["dog"]), (3, ["sun"]), (("dog", 3), ["dog", "sun"]), (np.asarray([0, 1]), ["cat", "dog"])],
)
def test_labels_that_are_no_list(sources, labels, names):
    trained = trained_of(sources["class"])
    assert make_requests(trained, SampleConfig(checkpoint="here", labels=labels)).captions == names


def test_one_label_is_one_picture(sources, monkeypatch):
    asked = []

    def draw_pictures(trained, config, sampler, requests):
        asked.append(requests.captions)
        return Drawn(np.zeros((len(requests.captions), 8, 8, 3), np.uint8), np.zeros(0), 0)

    monkeypatch.setattr(pretrained_model, "draw_pictures", draw_pictures)
    assert len(from_pretrained(sources["class"]).sample(labels="dog")) == 1
    assert asked == [["dog"]]


def test_one_prompt_is_one_prompt(sources):
    trained = trained_of(sources["text"])
    assert read_prompts(trained, SampleConfig(checkpoint="here", prompts="red apple")) == ["red apple"]
    assert SampleConfig(prompts=[2024]).prompts == SampleConfig(prompts=2024).prompts == ["2024"]


def test_one_prompt_for_the_picture_of_the_card(sources, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(conversion, "sample_grid", lambda trained, path, vae, prompts: asked.append(prompts))
    options = {"own_class": True, "picture": "draw", "prompts": "red apple"}
    converted(sources["text"], tmp_path / "out", to="diffusers", **options)
    assert asked == [["red apple"]]
