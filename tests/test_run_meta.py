"""Checkpoint metadata: those of old checkpoints are read, and wrong ones are refused in one line."""

import dataclasses
import functools
import json
from pathlib import Path

import pytest

from flowdit.checkpoint.files import CheckpointError
from flowdit.checkpoint.meta import RunMeta, run_meta
from flowdit.conditioning.meta import ConditioningMeta, EncoderMeta
from flowdit.config import Config, TrainConfig
from flowdit.data.loader import DataConfig
from flowdit.models.config import DiTConfig, PixArtConfig
from flowdit.optim import OptimConfig
from flowdit.training.resume import check_same_run

PRETRAINED = Path(__file__).parents[1] / "pretrained" / "openmoji" / "meta" / "metadata"
ENCODER = {"name": "wordllama", "fingerprint": "0" * 16, "dtype": "float32", "max_length": 6, "width": 24}


@pytest.fixture
def stored() -> dict:
    """Of a checkpoint from before there were kinds of conditioning, text models and auxiliary losses."""
    return json.loads(PRETRAINED.read_text())


def as_json(content: dict) -> dict:
    return json.loads(json.dumps(content))


def test_an_old_checkpoint_has_defaults_for_what_came_later(stored):
    assert not {"text", "prediction", "source"} & stored.keys() and "conditioning" not in stored["config"]
    meta = RunMeta.parse(stored)
    assert (meta.text, meta.prediction, meta.source, meta.config.conditioning) == (None, "velocity", None, None)
    assert (meta.step, meta.run_id, meta.versions) == (stored["step"], stored["run_id"], stored["versions"])
    assert meta.config.model.depth == 8 and meta.config.data.max_bad_records == 0
    assert list(meta.latent_mean) == stored["latent_mean"] and meta.manifest_id == meta.manifest.ids[1]


def test_what_is_dumped_is_what_was_stored(stored):
    meta = RunMeta.parse(stored)
    dumped = as_json(meta.dump())
    assert RunMeta.parse(dumped) == meta and as_json(RunMeta.parse(dumped).dump()) == dumped
    assert dumped.keys() - stored.keys() == {"text"} and stored.keys() <= dumped.keys()
    for key in stored.keys() - {"config", "manifest"}:
        assert dumped[key] == stored[key]
    assert dumped["manifest"] == stored["manifest"] | {"has_captions": False}
    assert joined(dumped["config"], stored["config"]) == dumped["config"]


def joined(whole: dict, part: dict) -> dict:
    """`whole` with the values of `part`, at any depth."""
    values = {name: joined(whole[name], value) if isinstance(value, dict) else value for name, value in part.items()}
    return whole | values


@pytest.mark.parametrize(
    ("text", "model"),
    [
        (None, DiTConfig(value_residual=True)),
        (EncoderMeta(**ENCODER), PixArtConfig(micro_conditioning=True, null_tokens=6)),
    ],
    ids=["labels", "text"],
)
def test_a_new_run_comes_back_whole(stored, text, model):
    manifest = RunMeta.parse(stored).manifest
    train = TrainConfig(sample_labels=["cat", 3], latent_mean=[0.5] * 16)
    config = Config(model=model, train=train, data=DataConfig(path="data/mine"))
    meta = run_meta(config, manifest, ConditioningMeta(text=text), [0.5] * 16, [2.0] * 16)
    meta = dataclasses.replace(meta, step=7)
    auxiliary = as_json(dataclasses.asdict(config))["auxiliary"]  # kept as it is stored
    expected = dataclasses.replace(meta, config=dataclasses.replace(config, auxiliary=auxiliary))
    assert RunMeta.parse(as_json(meta.dump())) == expected
    assert meta.dump()["config"] == as_json(dataclasses.asdict(config))
    assert meta.dump()["text"] == (text and ENCODER)
    assert set(meta.dump()) == set(stored) | {"text"}


def test_a_model_from_elsewhere_says_so(stored):
    meta = RunMeta.parse(stored | {"prediction": "noise", "source": "original DiT or SiT"})
    assert (meta.prediction, meta.source) == ("noise", "original DiT or SiT")
    assert as_json(meta.dump()).items() >= {"prediction": "noise", "source": "original DiT or SiT"}.items()


def test_keys_of_later_versions_are_passed_over(stored):
    assert RunMeta.parse(stored | {"colour": "red"}) == RunMeta.parse(stored)


def changed(stored: dict, path: str, value) -> dict:
    inner = stored
    *parents, last = path.split(".")
    for name in parents:
        inner = inner[name]
    inner[last] = value
    return stored


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("format", 2, "format: must be 1, got 2"),
        ("step", -1, "step: must be greater than or equal to 0, got -1"),
        ("step", "4", "step: must be a valid integer, got '4'"),
        ("run_id", None, "run_id: must be a valid string, got None"),
        ("manifest_id", ["x" * 100_000], "manifest_id: must be a valid string, got ['xxx"),
        ("latent_mean", [0.0], "latent_mean: must hold 16 numbers, got [0.0]"),
        ("latent_scale", [float("nan")] * 16, "latent_scale[0]: must be a finite number, got nan"),
        ("latent_scale", ["1"] * 100_000, "latent_scale[0]: must be a valid number, got '1'"),
        ("prediction", "x" * 100_000, "prediction: must be 'velocity' or 'noise', got 'xxx"),
        ("text", 3, "text: must be an object, got 3"),
        ("text", ENCODER | {"width": "24"}, "text.width: must be a valid integer, got '24'"),
        ("text", {"name": "t5"}, "text.fingerprint: is missing"),
        ("manifest", [], "manifest: must be an object, got []"),
        (
            "manifest.latent_shape",
            [16, 10**9, 8],
            "manifest.latent_shape[1]: must be less than or equal to 4096, got 1",
        ),
        ("manifest.image_size", 3, "manifest.image_size: must be vae.stride times a side of latent_shape, [64], got 3"),
        ("manifest.vae.stride", 0, "manifest.vae.stride: must be greater than or equal to 1, got 0"),
        ("manifest.colour", "red", "manifest.colour: is not a known field"),
        ("config", None, "config: must be a configuration of flowdit ("),
        ("config", [1], "config: must be a configuration of flowdit ("),
        (
            "config.model.depth",
            "deep",
            "config.model.depth: Value 'deep' of type 'str' could not be converted to Integer",
        ),
        ("config.model.colour", "red", "config.model.colour: Key 'colour' not in 'DiTConfig'"),
        ("config.model.depth", "${oc.env:HOME}", "config.model.depth: While dereferencing interpolation"),
        ("config.model", "${oc.env:HOME}", "config: must be a configuration of flowdit ("),
    ],
)
def test_wrong_metadata_are_one_line_with_key_rule_and_value(stored, path, value, told):
    with pytest.raises(CheckpointError) as caught:
        RunMeta.parse(changed(stored, path, value))
    line = str(caught.value)
    assert line.startswith(told) and len(line) < 400 and "\n" not in line


@pytest.mark.parametrize("content", [None, [], "text", {}, {"format": 1}])
def test_other_json_is_no_metadata(content):
    with pytest.raises(CheckpointError, match=r"^(must be an object, got |\w+: is missing)"):
        RunMeta.parse(content)


def test_nothing_in_a_configuration_is_interpolated(stored):
    """Not the environment of whoever loads a checkpoint, and not a prompt that holds such signs."""
    for path, value in (
        ("config.train.checkpoint_dir", "${oc.env:HOME}"),
        ("config.wandb.project", "\\${seed}"),
        ("config.train.sample_prompts", ["${5}", "a \\\\${seed} b"]),
    ):
        meta = RunMeta.parse(changed(stored, path, value))
        *parts, name = path.removeprefix("config.").split(".")
        assert getattr(functools.reduce(getattr, parts, meta.config), name) == value


def test_a_run_of_an_earlier_version_continues_on_data_with_a_corrected_licence(stored):
    before = RunMeta.parse(stored)
    data = dataclasses.replace(before.manifest, license="MIT", attribution="by us")
    now = dataclasses.replace(before, manifest=data, manifest_id=data.id)
    assert before.manifest_id != now.manifest_id and check_same_run(before, now) == []
    other = dataclasses.replace(data, class_names=data.class_names[::-1])
    with pytest.raises(ValueError, match="^data.path: the data set must be the one .*, got another class_names: "):
        check_same_run(before, dataclasses.replace(now, manifest=other))


def test_only_a_run_with_muon_keeps_its_choice_of_matrices(stored):
    """A setting that AdamW does not read may be mended."""

    def changes(name: str) -> list[str]:
        before, now = (
            dataclasses.replace(
                meta, config=dataclasses.replace(meta.config, optim=OptimConfig(name, muon_modulation=on))
            )
            for meta, on in ((RunMeta.parse(stored), False), (RunMeta.parse(stored), True))
        )
        return check_same_run(before, now)

    assert changes("adamw") == ["changed since the checkpoint: optim.muon_modulation: False -> True"]
    with pytest.raises(ValueError, match="^optim.muon_modulation: must be False as in the checkpoint to resume"):
        changes("muon")
