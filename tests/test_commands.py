"""The commands as processes: training, sampling from a checkpoint folder, W&B modes, environment variables."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from models.text_folders import write_t5gemma
from PIL import Image
from runs import REPOSITORY, Finished, call, finish, metrics, start, steps_of, train_here, wait_for_line

import flowdit
from flowdit import cli, sample
from flowdit.inference.sampler import Sampler

PRINT_ALLOCATOR = """
import os, flowdit.train
print(*(os.environ[name] for name in ("XLA_PYTHON_CLIENT_PREALLOCATE", "TF_GPU_ALLOCATOR")))
"""


@pytest.fixture(scope="module")
def trained(tiny_data, tmp_path_factory) -> tuple[Path, Finished]:
    """The run folder and the output of `python train_stage1.py`, with validation, samples and an offline W&B run."""
    run = tmp_path_factory.mktemp("trained") / "run"
    script = str(REPOSITORY / "train_stage1.py")
    settings = ("experiment=tiny", "optim.warmup_steps=4", f"data.path={tiny_data}", f"train.checkpoint_dir={run}")
    return run, finish(start(script, *settings, "wandb.enabled=true", "wandb.mode=offline"))


def test_training_shows_its_progress(trained):
    run, finished = trained
    assert (finished.status, finished.err) == (0, "")
    for expected in (
        *("model: 0.05 M parameters; 1 cpu device(s)", "data: 48 records, latents 16x8x8, 4 classes"),
        *("step 1/6  loss ", "  first step in ", "step 6/6  loss ", " img/s  ", " GFLOP/s  lr ", "  ETA 0:00:00"),
        *("step 3  validation loss ", f"done; checkpoint: {run / '6'}"),
    ):
        assert expected in finished.out


def test_training_leaves_checkpoints_figures_and_images(trained):
    run, _ = trained
    assert steps_of(run) == [2, 4, 6]
    assert sorted(metrics(run, "train/loss")) == [1, 2, 3, 4, 5, 6]
    assert sorted(metrics(run, "validation/loss")) == [3, 6]
    assert np.isfinite(list(metrics(run, "validation/loss").values())).all()
    with Image.open(run / "samples" / "00000006.png") as grid:
        assert np.ptp(np.asarray(grid)) > 0


def test_offline_run_is_kept_in_the_run_folder(trained):
    run, finished = trained
    assert len(list((run / "wandb").glob("offline-run-*"))) == 1
    folder = next((run / "wandb").glob("offline-run-*"))
    assert f"wandb: offline run in {folder}, upload it with: wandb sync {folder}" in finished.out


def test_sampling_only_needs_the_checkpoint_folder(trained, tmp_path):
    checkpoint = shutil.copytree(trained[0] / "6", tmp_path / "alone")
    settings = (f"checkpoint={checkpoint}", "labels=[cat,3]", "num_images=2", "solver=heun", "steps=2", "seed=5")
    finished = finish(start("-m", "flowdit.sample", *settings, "save_latents=true", "out=images"))
    assert finished.status == 0
    assert "sampling: 100%" in finished.err and "4/4" in finished.err.splitlines()[-1]
    out = tmp_path / "images"
    assert sorted(path.name for path in out.glob("*.png")) == [
        *("0000_cat.png", "0001_cat.png", "0002_sun.png", "0003_sun.png", "grid.png")
    ]
    with Image.open(out / "0000_cat.png") as image:
        assert image.size == (64, 64)
    assert np.load(out / "latents.npy").shape == (4, 16, 8, 8)
    record = json.loads((out / "samples.json").read_text())
    assert (record["step"], record["weights"], record["evaluations"]) == (6, "ema", 4)
    assert record["settings"]["captions"] == ["cat", "cat", "sun", "sun"]
    assert (record["settings"]["solver"], record["settings"]["guidance"]) == (
        "heun",
        2.0,
    )  # the second as in the previews


def sampled_latents(checkpoint: Path) -> np.ndarray:
    """From the command, for the default requests, which are those of the training previews."""
    settings = ("steps=2", "solver=euler", "save_latents=true", "out=out")
    finished = call(sample.main, f"checkpoint={checkpoint}", *settings)
    assert finished.status == 0, finished.err
    return np.load(Path("out") / "latents.npy")


def drawn_latents(sampler: Sampler, *, seed: int = 0, batch_size: int = 64, guidance: float = 2.0, **requests):
    """From a loaded model, which compiles once for all requests."""
    config = sampler.sampler_config({"steps": 2, "solver": "euler", "guidance": guidance})
    batches = sampler.batches(sampler.requests(1, requests), config, seed, batch_size)
    return np.concatenate([batch.latents for batch in batches])


def test_samples_depend_on_the_seed_and_not_on_the_batch_size(trained):
    sampler = flowdit.load(str(trained[0] / "6"))
    first = sampled_latents(trained[0] / "6")
    np.testing.assert_array_equal(drawn_latents(sampler), first)
    np.testing.assert_allclose(drawn_latents(sampler, batch_size=1), first, atol=1e-5)
    assert not np.allclose(drawn_latents(sampler, seed=1), first)
    assert json.loads(Path("out/samples.json").read_text())["settings"]["captions"] == ["cat", "dog"]


@pytest.fixture(scope="module")
def text_trained(tiny_data, tmp_path_factory) -> tuple[Path, Path, Finished]:
    """Folder of a T5Gemma, run folder and output of `python train_stage2.py`, with validation and samples."""
    folder = tmp_path_factory.mktemp("text")
    encoder, run = write_t5gemma(folder / "t5gemma"), folder / "run"
    script = str(REPOSITORY / "train_stage2.py")
    settings = ("experiment=tiny_text", "train.batch_size=16", "train.gradient_accum=8", "wandb.enabled=false")
    # A learning rate at which the captions have an effect after six steps.
    settings += ("optim.learning_rate=0.03", f"text.encoder={encoder}", "text.max_length=16")
    data = (f"data.path={tiny_data}", f"train.checkpoint_dir={run}")
    return encoder, run, finish(start(script, *settings, *data))


def test_stage_2_shows_its_progress(text_trained):
    encoder, run, finished = text_trained
    assert (finished.status, finished.err) == (0, "")
    for expected in (
        f"data: 48 records, latents 16x8x8, captions, {encoder} features of 48 x 16 tokens online",
        *("step 3  validation loss ", f"samples: {run / 'samples' / '00000006.png'}", f"done; checkpoint: {run / '6'}"),
    ):
        assert expected in finished.out
    with Image.open(run / "samples" / "00000006.png") as grid:
        assert np.ptp(np.asarray(grid)) > 0
    # Letter by letter, "a red apple, food, fruit" is cut.
    truncated, captions = (metrics(run, f"data/{name}")[6] for name in ("truncated_captions", "captions"))
    assert 0 < truncated < captions and f"truncated captions {truncated} of {captions}" in finished.out


def test_sampling_prompts(text_trained, tmp_path):
    encoder, run, _ = text_trained
    (tmp_path / "prompts.txt").write_text("red apple\n\nflag of Germany\n")
    checkpoint, moved = shutil.copytree(run / "6", tmp_path / "alone"), shutil.copytree(encoder, tmp_path / "moved")
    settings = (f"checkpoint={checkpoint}", f"text_encoder={moved}", "prompts_file=prompts.txt", "num_images=2")
    finished = finish(start("-m", "flowdit.sample", *settings, "steps=1", "out=images"))
    assert finished.status == 0
    assert "2 prompts: 'red apple', 'flag of Germany'" in finished.out
    names = sorted(path.name for path in (tmp_path / "images").glob("*.png"))
    apples, flags = (f"000{i}_red_apple.png" for i in (0, 1)), (f"000{i}_flag_of_Germany.png" for i in (2, 3))
    assert names == [*apples, *flags, "grid.png"]


def test_prompts_negative_prompt_and_guidance_change_the_image(text_trained):
    checkpoint = text_trained[1] / "6"
    previews = sampled_latents(checkpoint)
    assert json.loads(Path("out/samples.json").read_text())["settings"]["captions"] == ["red apple", "a blue heart"]
    sampler = flowdit.load(str(checkpoint))
    apple = {"prompts": ["red apple"]}
    first = drawn_latents(sampler, **apple)
    np.testing.assert_allclose(previews[:1], first, atol=1e-5)
    for other in ({"prompts": ["sun"]}, apple | {"negative_prompt": "sun"}, apple | {"guidance": 1.0}):
        assert not np.allclose(drawn_latents(sampler, **other), first, atol=1e-4), other
    both = drawn_latents(sampler, prompts=["red apple", "a longer prompt with sun"], batch_size=1)
    np.testing.assert_allclose(both[:1], first, atol=1e-5)


@pytest.fixture
def no_login(tmp_path, monkeypatch) -> None:
    """A home folder without W&B's key."""
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("no_login")
def test_online_run_without_a_login_warns_and_continues_offline(tiny_data, tmp_path):
    finished = train_here(tiny_data, tmp_path / "run", "wandb.enabled=true", "wandb.mode=online")
    assert (finished.status, finished.err) == (0, "")
    notices = [line for line in finished.out.splitlines() if "wandb" in line]
    assert notices[0] == "wandb: no login found (run `wandb login`): logging offline"
    assert len(notices) == 2 and "upload it with: wandb sync" in notices[1]
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*"))) == 1


@pytest.mark.usefixtures("no_login")
@pytest.mark.parametrize("settings", [("wandb.mode=disabled", "wandb.enabled=true"), ("wandb.enabled=false",)], ids=str)
def test_switched_off_run_leaves_nothing(tiny_data, tmp_path, settings):
    finished = train_here(tiny_data, tmp_path / "run", *settings)
    assert (finished.status, finished.err) == (0, "")
    assert "wandb" not in finished.out
    assert not (tmp_path / "run" / "wandb").exists()
    assert sorted(metrics(tmp_path / "run", "train/loss")) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({}, "false cuda_malloc_async"),
        ({"XLA_PYTHON_CLIENT_PREALLOCATE": "true", "TF_GPU_ALLOCATOR": "default"}, "true default"),
    ],
    ids=["unset", "set by the user"],
)
def test_gpu_memory_is_taken_as_needed_unless_the_user_says_otherwise(monkeypatch, own, expected):
    for name in ("XLA_PYTHON_CLIENT_PREALLOCATE", "TF_GPU_ALLOCATOR"):
        monkeypatch.delenv(name, raising=False)
    assert finish(start("-c", PRINT_ALLOCATOR, **own)).out.split() == expected.split()


def test_error_in_a_process_is_one_line_and_a_status(tmp_path):
    script = str(REPOSITORY / "train_stage1.py")
    finished = finish(start(script, "train.num_steps=abc", HYDRA_FULL_ERROR="0"))
    assert finished.status == 2
    assert finished.err.splitlines() == [
        "error: Error merging override train.num_steps=abc: Value 'abc' of type 'str' could not be converted to Integer "
        "full_key: train.num_steps"
    ]
    assert list(tmp_path.iterdir()) == []


def test_traceback_on_request():
    script = str(REPOSITORY / "train_stage1.py")
    finished = finish(start(script, "experiment=tiny", "data.path=nowhere", FLOWDIT_TRACEBACK="1"))
    assert finished.status != 0
    assert "Traceback (most recent call last)" in finished.err
    assert "nowhere: no such folder" in finished.err.splitlines()[-1]
    assert os.sep + "training" + os.sep + "setup.py" in finished.err


@pytest.fixture
def hanging_import(tmp_path) -> Path:
    """A folder with a `hydra` whose import says so and does not end."""
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "hydra.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(600)\n")
    return tmp_path / "slow"


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ((str(REPOSITORY / "train_stage1.py"),), "train-stage1"),
        (("-m", "flowdit.prepare"), "prepare"),
        (("-c", "from flowdit.cli import main; main()", "sample"), "sample"),
    ],
    ids=["script", "module", "console command"],
)
@pytest.mark.parametrize(("number", "word"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")])
def test_a_signal_during_the_imports_ends_in_a_line(hanging_import, command, name, number, word):
    python_path = os.pathsep.join([str(hanging_import), str(REPOSITORY)])
    process = start(*command, PYTHONPATH=python_path)
    wait_for_line(process, "importing")
    process.send_signal(number)
    finished = finish(process)
    assert finished.status == 128 + number
    assert finished.err == f"{word} received while starting: {name} has ended, nothing was written\n"


def console(*arguments: str) -> Finished:
    return call(cli.main, *arguments)


def test_the_console_command_lists_its_commands():
    finished = console("--help")
    assert finished.status == 0
    assert [line.split()[0] for line in finished.out.splitlines() if line.startswith("  ")] == list(cli.COMMANDS)
    assert console("trian").err.startswith("error: flowdit: must be followed by one of train-stage1, ")


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_help_has_the_settings_of_the_command(name):
    finished = console(name, "--help")
    assert (finished.status, finished.err) == (0, "")
    keys = [
        line.split()[0].partition("=")[0] for line in finished.out.splitlines() if re.match(r"  [a-z_.]+(=|  \()", line)
    ]
    keys = [key for key in keys if key != "experiment"]  # the presets
    assert len(keys) == len(set(keys))
    own = {
        "train-stage1": ("data.path", "train.num_steps", "model.depth", "mesh.fsdp"),
        "train-stage2": ("text.encoder", "data.text_cache", "train.init_time", "model.null_tokens"),
        "prepare": ("source", "captions", "vae"),
        "sample": ("checkpoint", "prompt", "guidance"),
        "evaluate": ("checkpoint", "reference", "metrics", "weights.inception", "guidance"),
        "serve": ("checkpoint", "compare", "port", "max_waiting_each"),
        "plan": ("topology", "stage", "train.batch_size", "mesh.fsdp", "shape.latent"),
        "verify": ("data", "text_cache", "threads", "report"),
        "inspect": ("data", "originals", "num_images", "out"),
        "report": ("run", "compare", "scores", "out"),
        "convert": ("source", "target", "to"),
    }
    assert set(own[name]) <= set(keys)
    assert ("text.encoder" in keys) == (name in ("train-stage2", "plan"))
    assert "hydra/" not in finished.out
    assert ("  train.num_steps=150000" in finished.out) == (name == "train-stage2")  # the default of this command
