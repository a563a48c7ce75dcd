"""The command line as users write it: free text, lists, whole numbers, through Hydra to the settings."""

import random
import shlex
import subprocess
import sys

import pytest
from hydra import compose, initialize_config_module

from flowdit.config import Config, SampleConfig, register_schemas, resolve
from flowdit.data.prepare import PrepareConfig
from flowdit.fields import FieldError
from flowdit.overrides import for_hydra, require_own_folders
from flowdit.settings import settings_of

FILES = {Config: "config", SampleConfig: "sample", PrepareConfig: "prepare"}


@pytest.fixture(autouse=True, scope="module")
def hydra_configs():
    register_schemas()
    with initialize_config_module("flowdit.configs", version_base="1.3"):
        yield


def settings(schema: type, *arguments: str):
    """The settings of a command with these arguments."""
    return resolve(compose(FILES[schema], for_hydra(arguments, settings_of(schema))), schema)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "a, [b]: c",
            "it's a \"cat\", isn't it?",
            "(red) {blue}",
            "a = b",
            "null",
            "1e4",
            "true",
            " a ",
            "é 猫 \U0001f600",
        ),
        *("${oc.env:HOME}", "\\${seed}", "back\\slash\\", "'quoted\\'", "a\nb", "#hash", "~x", "+y", "[a, b]"),
    ],
)
def test_text_arrives_as_written(text):
    assert settings(SampleConfig, "checkpoint=x", f"negative_prompt={text}").negative_prompt == text
    assert settings(PrepareConfig, f"license={text}", f"attribution={text}").license == text
    if text != "null":
        assert settings(SampleConfig, "checkpoint=x", f"prompt={text}").prompt == text


def test_any_characters_arrive_as_written():
    parts = [*"ab ,:[]{}()'\"\\$=~#%&*@!?|<>\n\t", "${", "\\'", "\\\\", "${oc.env:HOME}", "é"]
    draw = random.Random(0)
    for _ in range(20):
        text = "a" + "".join(draw.choice(parts) for _ in range(draw.randrange(1, 9)))
        assert settings(SampleConfig, "checkpoint=x", f"negative_prompt={text}").negative_prompt == text


def test_text_arrives_through_a_shell():
    line = r"""echo_arguments prompt="a, [b]: c's" license="mixed, see README" negative_prompt='$HOME "x"'"""
    code = "import sys; print(repr(sys.argv[1:]))"
    command = line.replace("echo_arguments", f"{shlex.quote(sys.executable)} -c {shlex.quote(code)}")
    arguments = eval(subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True).stdout)
    prompt, license, negative = arguments
    sampled = settings(SampleConfig, "checkpoint=x", prompt, negative)
    assert (sampled.prompt, sampled.negative_prompt) == ("a, [b]: c's", '$HOME "x"')
    assert settings(PrepareConfig, license).license == "mixed, see README"


@pytest.mark.parametrize(
    ("argument", "prompts"),
    [
        ("prompts=[red apple, noto style]", ["red apple", "noto style"]),
        ("prompts=['red apple, noto style', b]", ["red apple, noto style", "b"]),
        ("prompts=red apple, noto style", ["red apple, noto style"]),
        ("prompts=a (b): 'c'", ["a (b): 'c'"]),
        ('prompts="a, b"', ["a, b"]),
        ("prompts=[a ${seed}, 'b ${oc.env:HOME}']", ["a ${seed}", "b ${oc.env:HOME}"]),
        ("prompts=null", None),
    ],
)
def test_prompts_are_one_text_or_a_list(argument, prompts):
    assert settings(SampleConfig, "checkpoint=x", argument).prompts == prompts


def test_one_value_may_stand_where_a_list_may():
    assert settings(SampleConfig, "checkpoint=x", "labels=noto").labels == ["noto"]
    train = settings(Config, "data.path=x", "train.sample_labels=noto", "train.sample_prompts=a, b: c").train
    assert (train.sample_labels, train.sample_prompts) == (["noto"], ["a, b: c"])
    assert settings(Config, "data.path=x", "train.sample_labels=null").train.sample_labels is None


@pytest.mark.parametrize("path", ["a,b", "images (old)/[1]", "it's here", "a=b", "with space"])
def test_paths_may_have_any_characters(path):
    config = settings(Config, f"data.path={path}", f"train.checkpoint_dir={path}")
    assert (config.data.path, config.train.checkpoint_dir) == (path, path)


def test_paths_may_refer_to_other_settings():
    assert settings(Config, "data.path=x", "train.checkpoint_dir=runs/${seed}").train.checkpoint_dir == "runs/0"


def test_whole_numbers_may_be_written_with_an_exponent():
    config = settings(Config, "data.path=x", "train.num_steps=1e4", "train.keep_every=2E3", "optim.learning_rate=1e-4")
    assert (config.train.num_steps, config.train.keep_every, config.optim.learning_rate) == (10_000, 2_000, 1e-4)


@pytest.mark.parametrize(
    ("schema", "argument", "line"),
    [
        (
            SampleConfig,
            "guidence=3",
            "guidence: no such setting; did you mean guidance? (there are checkpoint, labels, ",
        ),
        (SampleConfig, "guidance=1,3", "guidance: must be one value, got 1,3; a list is written in brackets, [1,3]"),
        (Config, "experiment=tiny,openmoji", "experiment: must be one value, got 'tiny,openmoji'"),
        (SampleConfig, "num_images=1,3", "num_images: must be one value, got 1,3"),
        (
            SampleConfig,
            "prompts=[a",
            "prompts: cannot be read as a list; quote a text with a comma, colon, bracket or ",
        ),
        (SampleConfig, "checkpoints/4000", "checkpoints/4000: settings are given as key=value (--help lists them)"),
        (SampleConfig, "--steps=4", "--steps=4: no such option; settings are given as key=value (--help lists them)"),
        (
            PrepareConfig,
            "images=x",
            "images: no such setting; did you mean image_size? (there are source, captions, split, ",
        ),
        (Config, "model.dept=3", "model.dept: no such setting; did you mean model.depth? (model has name, depth, "),
        (Config, "experimnt=tiny", "experimnt: no such setting; did you mean experiment? (there are seed, "),
        (Config, "modle/size=b", "modle/size: no such setting; did you mean model/size? (there are seed, "),
        (Config, "modl=ccdit", "modl: no such setting; did you mean model? (there are seed, "),
        (SampleConfig, "experiment=tiny", "experiment: no such setting (there are checkpoint, labels, "),
        (Config, "depth=3", "depth: no such setting; did you mean model.depth? (there are seed, conditioning, "),
    ],
)
def test_mistakes_are_named_with_the_nearest_key(schema, argument, line):
    with pytest.raises(FieldError) as caught:
        for_hydra([argument], settings_of(schema))
    assert str(caught.value).startswith(line)
    assert "multirun" not in str(caught.value)


def test_groups_and_options_of_hydra_are_left_alone():
    overrides = ["experiment=tiny", "model/size=b", "+a.b=1", "~optim", "hydra.verbose=true"]
    assert for_hydra(["--cfg", "job", *overrides], settings_of(Config)) == [*overrides, "--cfg", "job"]
    sweep = ["train.batch_size=1,2", "model.mlp=gelu,swiglu"]
    assert for_hydra(["-m", *sweep], settings_of(Config)) == [*sweep, "-m"]


def test_the_jobs_of_a_sweep_must_have_folders_of_their_own():
    arguments = ["-m", "train.batch_size=1,2"]
    for name in ("num", "id", "override_dirname"):
        folder = f"train.checkpoint_dir=runs/${{hydra:job.{name}}}"
        require_own_folders(for_hydra([*arguments, folder], settings_of(Config)), "train.checkpoint_dir")
    for shared in ([], ["train.checkpoint_dir=runs/${seed}"], ["train.checkpoint_dir=a,b"]):
        with pytest.raises(FieldError, match=r"^train\.checkpoint_dir: must differ between the jobs of --multirun"):
            require_own_folders(for_hydra([*arguments, *shared], settings_of(Config)), "train.checkpoint_dir")
    require_own_folders(["train.batch_size=1"], "train.checkpoint_dir")


def test_settings_may_come_before_and_after_an_option():
    arguments = ["checkpoint=x", "--cfg", "job", "prompt=a, b"]
    assert for_hydra(arguments, settings_of(SampleConfig)) == ["checkpoint=x", "prompt='a, b'", "--cfg", "job"]
