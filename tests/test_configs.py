"""Every YAML file composes into a checked configuration, and the documented names exist."""

import functools
import operator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

import flowdit.configs
import flowdit.data_configs
from flowdit import conditioning, evaluate
from flowdit.config import Config, SampleConfig, register_schemas, resolve
from flowdit.convert import register_schema
from flowdit.data.prepare import PrepareConfig
from flowdit.data.verification import VerifyConfig
from flowdit.inspect import register_schema as register_inspect
from flowdit.inspection.config import InspectConfig
from flowdit.interop import ConvertConfig
from flowdit.report import register_schema as register_report
from flowdit.reporting.config import ReportConfig
from flowdit.scores.config import EvaluateConfig
from flowdit.serve import register_schema as register_serve
from flowdit.serving.config import ServeConfig
from flowdit.verify import register_schema as register_verify

FOLDER = Path(flowdit.configs.__file__).parent
DATA_FOLDER = Path(flowdit.data_configs.__file__).parent
GROUP_OPTIONS = sorted(path.relative_to(FOLDER).with_suffix("") for path in FOLDER.glob("*/**/*.yaml"))
COMMAND_SCHEMAS = {
    "sample": SampleConfig,
    "prepare": PrepareConfig,
    "convert": ConvertConfig,
    "evaluate": EvaluateConfig,
    "report": ReportConfig,
    "serve": ServeConfig,
}
DATA_SCHEMAS = {"verify": VerifyConfig, "inspect": InspectConfig}
"""Of the commands in `flowdit.data_configs`."""
SCHEMAS = {"base": Config, "config": Config, "config_stage2": Config, **COMMAND_SCHEMAS}
REQUIRED = {
    "seed": int,
    "conditioning": str,
    "train.num_steps": int,
    "train.batch_size": int,
    "train.gradient_accum": int,
    "train.is_restore": bool,
    "train.checkpoint_dir": str,
    "train.save_every": int,
    "train.log_every": int,
    "train.sample_every": int,
    "train.ema_decay": float,
    "train.compute_dtype": str,
    "data.path": str,
    "data.long_caption_prob": float,
    "data.tag_dropout": float,
    "text.encoder": str,
    "text.max_length": int,
    "text.dtype": str,
    "model.depth": int,
    "model.hidden_dim": int,
    "model.num_heads": int,
    "model.patch_size": int,
    "model.qk_norm": bool,
    "mesh.data": int,
    "mesh.fsdp": int,
    "mesh.tensor": int,
    "wandb.enabled": bool,
    "wandb.mode": str,
    "wandb.project": str,
}
OPTIONAL = {
    "train.latent_mean": [0.5, -0.5],
    "train.latent_scale": "data",
    "train.init_from": "checkpoints/4000",
    "data.text_cache": "data/text",
}
SD3_LATENTS = (16, 32, 32)


@functools.cache
def composed(name: str, *overrides: str):
    register_schemas()
    register_schema()
    evaluate.register_schema()
    register_report()
    register_serve()
    register_verify()
    register_inspect()
    module = "flowdit.data_configs" if name in DATA_SCHEMAS else "flowdit.configs"
    with initialize_config_module(module, version_base="1.3"):
        return compose(name, list(overrides))


COMMANDS = {"config": "train_stage1.py", "config_stage2": "train_stage2.py"}
"""The script that composes a file."""


def training(*overrides: str, name: str = "config") -> Config:
    """The checked configuration of a training run."""
    config = resolve(composed(name, "data.path=somewhere", *overrides), Config)
    conditioning.check(config)
    config.check()
    config.model.check(SD3_LATENTS)
    return config


def test_every_top_level_file_has_its_schema():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == SCHEMAS.keys()
    assert {path.stem for path in DATA_FOLDER.glob("*.yaml")} == DATA_SCHEMAS.keys()


@pytest.mark.parametrize(
    ("name", "given"),
    [
        *(("config", "data.path=x"), ("config_stage2", "data.path=x")),
        *(("sample", "checkpoint=x"), ("prepare", "out=x"), ("evaluate", "checkpoint=x")),
        *(("convert", "target=y source=x"), ("report", "run=x"), ("verify", "data=x"), ("inspect", "data=x")),
    ],
)
def test_commands_compose_into_their_schema(name, given):
    schema = (SCHEMAS | DATA_SCHEMAS)[name]
    assert isinstance(resolve(composed(name, *given.split()), schema), schema)


@pytest.mark.parametrize("option", GROUP_OPTIONS, ids=str)
def test_every_group_option_composes(option):
    training(f"{option.parent.as_posix()}={option.name}", name=command_of(option))


@pytest.mark.parametrize("option", GROUP_OPTIONS, ids=str)
def test_every_value_of_an_option_is_used_and_differs_from_the_default(option):
    own = OmegaConf.load(FOLDER / option.with_suffix(".yaml"))
    group = option.parent.as_posix()
    package = {"experiment": "", "model/size": "model."}.get(group, f"{group}.")
    chosen = composed(command_of(option), f"{group}={option.name}")
    without = composed(command_of(option), *choices(own)) if group == "experiment" else composed("base")
    for name in leaves(OmegaConf.to_container(own)):
        if name.split(".")[0] != "defaults":
            assert OmegaConf.select(chosen, package + name) == OmegaConf.select(own, name), name
            is_default = OmegaConf.select(without, package + name) == OmegaConf.select(own, name)
            # A size sets the whole shape, whatever the defaults are.
            assert not is_default or group == "model/size", name


def choices(experiment) -> list[str]:
    """Overrides equivalent to an experiment's list of defaults: other groups, or the experiment that it extends."""
    overrides = []
    for entry in OmegaConf.to_container(experiment)["defaults"]:
        if isinstance(entry, dict):
            overrides += [f"{name.removeprefix('override /')}={choice}" for name, choice in entry.items()]
        elif entry != "_self_":
            overrides.append(f"experiment={entry}")
    return overrides


def leaves(tree, prefix: str = "") -> list[str]:
    """Dotted names of all values."""
    if not isinstance(tree, dict):
        return [prefix]
    return [leaf for key, value in tree.items() for leaf in leaves(value, f"{prefix}.{key}".lstrip("."))]


@pytest.mark.parametrize("experiment", [path.stem for path in FOLDER.glob("experiment/*.yaml")])
def test_every_experiment_composes_with_every_size_and_says_its_command(experiment):
    text = (FOLDER / "experiment" / f"{experiment}.yaml").read_text()
    assert "# Reproduces" in text
    name = command_of(Path("experiment") / experiment)
    assert f"python {COMMANDS[name]} experiment={experiment}" in text
    sizes = (
        ("s", "b", "xl") if "micro_conditioning: true" in text else ("s", "b", "l", "xl")
    )  # its width in three parts
    for size in sizes:
        training(f"experiment={experiment}", f"model/size={size}", name=name)


@pytest.mark.parametrize("experiment", ["imagenet256_xl2", "pixart_alpha_256"])
def test_a_size_on_the_command_line_wins_over_the_experiment(experiment):
    name = command_of(Path("experiment") / experiment)
    assert training(f"experiment={experiment}", name=name).model.depth == 28
    assert training(f"experiment={experiment}", "model/size=s", name=name).model.hidden_dim == 384


def command_of(option: Path) -> str:
    """The file that composes an option: stage 2's own ones do not fit into stage 1."""
    text = (FOLDER / option.with_suffix(".yaml")).read_text()
    is_stage_2 = option.parts[0] == "text" or option.name in ("stage2", "mmdit", "pixart") or "train_stage2.py" in text
    return "config_stage2" if is_stage_2 else "config"


@pytest.mark.parametrize("experiment", [path.stem for path in FOLDER.glob("experiment/*.yaml")])
def test_an_experiment_is_refused_by_the_other_stage(experiment):
    own = command_of(Path("experiment") / experiment)
    (other,) = COMMANDS.keys() - {own}
    with pytest.raises(ValueError, match="^model.name: must be (ccdit|pixart) with conditioning=(labels|text), got "):
        training(f"experiment={experiment}", name=other)


@pytest.mark.parametrize(("name", "kind"), REQUIRED.items(), ids=REQUIRED.keys())
@pytest.mark.parametrize("command", COMMANDS)
def test_promised_key_exists(command, name, kind):
    value = training(name=command)
    for part in name.split("."):
        value = getattr(value, part)
    assert isinstance(value, kind)


@pytest.mark.parametrize(("name", "value"), OPTIONAL.items(), ids=OPTIONAL.keys())
@pytest.mark.parametrize("command", COMMANDS)
def test_promised_key_is_null_until_it_is_set(command, name, value):
    before = composed(command, "data.path=somewhere")
    after = composed(command, "data.path=somewhere", f"{name}={value}")
    read = operator.attrgetter(name)
    assert read(resolve(before, Config)) is None
    assert read(resolve(after, Config)) == value


def test_stage_2_defaults():
    config = training(name="config_stage2")
    assert (config.model.name, config.train.gradient_accum, config.optim.clip_norm) == ("pixart", 8, 0.01)
    assert (config.text.encoder, config.text.max_length) == ("google/t5gemma-2b-2b-ul2", 120)
    assert (config.wandb.project, config.train.drop_rate) == ("flowdit-stage2", 0.1)


def test_stage_1_is_the_defaults_of_the_dataclasses():
    config, defaults = training(), Config()
    assert (config.train, config.model, config.text, config.optim, config.mesh) == (
        defaults.train,
        defaults.model,
        defaults.text,
        defaults.optim,
        defaults.mesh,
    )


def test_default_checkpoint_folder():
    assert training().train.checkpoint_dir == "checkpoints"


@pytest.mark.parametrize(
    ("size", "expected"), [("s", (12, 384, 6)), ("b", (12, 768, 12)), ("l", (24, 1024, 16)), ("xl", (28, 1152, 16))]
)
def test_sizes_are_those_of_dit(size, expected):
    model = training(f"model/size={size}").model
    assert (model.depth, model.hidden_dim, model.num_heads) == expected


@pytest.mark.parametrize("patch_size", [2, 4, 8])
def test_patch_sizes(patch_size):
    assert training(f"model.patch_size={patch_size}").model.patch_size == patch_size


def test_the_command_line_wins_over_the_experiment():
    config = training("experiment=tiny", "train.num_steps=77", "model.depth=3")
    assert (config.train.num_steps, config.model.depth, config.train.batch_size) == (77, 3, 8)
