"""The error line of a rule: the component names its field, what holds it adds the rest of the key."""

import pytest

from flowdit.config import Config, TrainConfig
from flowdit.diffusion.sampling import SamplerConfig
from flowdit.fields import FieldError, called, require, require_choice, under


def message(action) -> str:
    with pytest.raises(FieldError) as caught:
        action()
    return str(caught.value)


def test_each_level_adds_its_own_part_of_the_key():
    sampler = SamplerConfig(steps=0)
    train = TrainConfig(sampler=sampler)
    assert message(sampler.check) == "steps: must be at least 1, got 0"
    assert message(train.check) == "sampler.steps: must be at least 1, got 0"
    assert message(Config(train=train).check) == "train.sampler.steps: must be at least 1, got 0"


def test_a_rule_that_holds_says_nothing_and_one_that_does_not_says_the_value():
    require("side", 8, True, "must be even")
    require_choice("kind", "a", ("a", "b"))
    assert message(lambda: require("side", 7, False, "must be even")) == "side: must be even, got 7"
    assert message(lambda: require_choice("kind", "c", ("a", "b"))) == "kind: must be one of a, b, got 'c'"
    assert len(message(lambda: require("side", [0] * 10**6, False, "must be even"))) < 200


def test_fields_are_renamed_where_the_key_has_another_name():
    def refuse() -> None:
        with called({"encoder": "text_encoder"}):
            require("encoder", "", False, "must be given")

    def refuse_another() -> None:
        with called({"encoder": "text_encoder"}):
            require("width", 0, False, "must be given")

    assert message(refuse) == "text_encoder: must be given, got ''"
    assert message(refuse_another) == "width: must be given, got 0"


def test_other_errors_pass_as_they_are():
    with pytest.raises(ValueError, match="^no field$"), under("train."), called({"no field": "x"}):
        raise ValueError("no field")
