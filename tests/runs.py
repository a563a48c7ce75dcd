"""Runs for tests: a tiny data set for both stages, and the user's commands in this or a separate process."""

import contextlib
import io
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import shared_steps
from hydra._internal.hydra import Hydra

from flowdit import command
from flowdit.data.manifest import Bucket, Manifest, Shard, Split, VaeInfo
from flowdit.data.shards import channel_statistics, write_shard
from flowdit.models.vae import load_vae
from flowdit.train import stage1, stage2
from flowdit.training import setup

REPOSITORY = Path(__file__).parents[1]
LATENT_SHAPE = (16, 8, 8)
CLASS_NAMES = ("cat", "dog", "heart", "sun")
SHARDS: dict[str, tuple[Split, int]] = {
    "train-0.array_record": ("train", 24),
    "train-1.array_record": ("train", 24),
    "validation-0.array_record": ("validation", 8),
}
NUM_STEPS = 6
FAST = ("optim.warmup_steps=4", "train.validate_every=0", "train.sample_every=0", "train.keep_last=20")
"""Only training steps and a checkpoint after every second one; the learning rate depends on the step."""
CAPTIONS = (("red apple", "a red apple, food, fruit"), ("sun", ""), ("", "a dog that sleeps"), ("", ""))


class Finished(NamedTuple):
    """A finished command."""

    status: int
    out: str
    err: str


SIDES = ((8, 8), (6, 10), (10, 6))
"""Heights and widths of latents in three buckets."""


def write_tiny_data(
    folder: Path,
    extra: Callable[[int], dict[str, Any]] = lambda index: {},
    *,
    sides: Sequence[tuple[int, int]] = (),
    seed: int = 0,
) -> Path:
    """48 training and 8 validation records of noise, with the statistics of the embedded VAE's latents.

    `extra` returns additional fields of a record, by its number in the shard. With `sides` the data have buckets of
    these latents, with the same number of training records each.
    """
    folder.mkdir(parents=True)
    vae = load_vae("openmoji")
    info = VaeInfo("openmoji", vae.fingerprint, vae.config.shift_factor, vae.config.scaling_factor, stride=8)
    noise = np.random.default_rng(seed)

    def record(index: int, side: Sequence[int]) -> dict[str, Any]:
        latent = info.shift + noise.standard_normal((LATENT_SHAPE[0], *side)) / info.scale
        short, long = CAPTIONS[index % len(CAPTIONS)]
        latent = latent.astype(np.float16)
        captions = {"short_caption": short, "long_caption": long}
        return {"latent": latent, "label": index % len(CLASS_NAMES), **captions, **extra(index)}

    shards, sidecars = [], []
    for file, (split, count) in SHARDS.items():
        numbers = np.array_split(np.arange(count), len(sides) or 1)
        all_sides = [side for side, part in zip(sides or [LATENT_SHAPE[1:]], numbers, strict=True) for _ in part]
        sidecars.append(sidecar := write_shard(folder / file, map(record, range(count), all_sides)))
        buckets = tuple(map(len, numbers)) if sides else ()
        shards.append(Shard(file, split, sidecar.records, sidecar.bytes, sidecar.sha256, buckets))
    mean, std = channel_statistics(sidecars)
    manifest = Manifest(
        latent_shape=LATENT_SHAPE,
        latent_dtype="float16",
        has_latent_std=False,
        vae=info,
        image_size=64,
        channel_mean=tuple(mean.tolist()),
        channel_std=tuple(std.tolist()),
        class_names=CLASS_NAMES,
        has_captions=True,
        buckets=tuple(Bucket(info.stride * height, info.stride * width) for height, width in sides),
        shards=tuple(shards),
        license="CC0",
        attribution="",
    )
    manifest.write(folder)
    return folder


def call(main: Callable[[], None], *overrides: str) -> Finished:
    """Run an entry point in this process, with these arguments."""
    out = io.StringIO()
    err = io.StringIO()
    status = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["command", *overrides])
        patch.setattr(command, "end_process", sys.exit)
        patch.setattr(setup, "make_parts", shared_steps.make_parts)
        patch.setattr(
            Hydra, "get_mode", lambda *_, **__: None
        )  # it composes only to read `hydra.mode`, which is not set
        for module, hook in ((sys, "excepthook"), (sys, "unraisablehook"), (threading, "excepthook")):
            patch.setattr(module, hook, getattr(module, hook))  # those set by the command are undone with the patch
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
            except SystemExit as exit_:
                status = int(exit_.code or 0)
    return Finished(status, out.getvalue(), err.getvalue())


def train_here(data: Path, run: Path, *overrides: str) -> Finished:
    """Stage 1 without validation and samples, in this process."""
    return call(stage1, "experiment=tiny", *FAST, f"data.path={data}", f"train.checkpoint_dir={run}", *overrides)


def train_text_here(data: Path, run: Path, *overrides: str) -> Finished:
    """Stage 2 without validation and samples, in this process."""
    return call(stage2, "experiment=tiny_text", *FAST, f"data.path={data}", f"train.checkpoint_dir={run}", *overrides)


def start(*command: str, devices: int = 1, **environment: str) -> subprocess.Popen[str]:
    """Run `python *command` in a separate process."""
    inherited = {name: value for name, value in os.environ.items() if name != "HYDRA_FULL_ERROR"}
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    inherited["XLA_FLAGS"] = " ".join([*flags, f"--xla_force_host_platform_device_count={devices}"])
    python_path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, *command],
        env=inherited | {"PYTHONPATH": python_path} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_address() -> str:
    """`host:port` for `mesh.coordinator`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def finish(process: subprocess.Popen[str]) -> Finished:
    out, err = process.communicate(timeout=240)
    return Finished(process.returncode, out, err)


def wait_for_line(process: subprocess.Popen[str], start_of_line: str) -> list[str]:
    """Read the process's output up to a line with this beginning."""
    lines = []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if line.startswith(start_of_line):
            return lines
    raise AssertionError(f"{start_of_line!r} did not come: {''.join(lines)}{finish(process).err}")


def error_line(finished: Finished) -> str:
    """The single error line of a user's mistake; stderr must hold nothing else."""
    assert finished.status not in (0, None), finished.out
    lines = finished.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), finished.err
    return lines[0]


def stored_arrays(step_folder: Path) -> dict[str, np.ndarray]:
    """Every array of a checkpoint by item and name."""
    items = {item: stored_item(step_folder / item) for item in ("state", "model_ema")}
    return {f"{item}.{name}": value for item, arrays in items.items() for name, value in arrays.items()}


def stored_item(folder: Path) -> dict[str, np.ndarray]:
    """Every array of an item of a checkpoint by name."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])  # the checkpoint may be of other devices
    stored: Any = ocp.StandardCheckpointHandler().metadata(folder.resolve())
    stored = getattr(stored, "tree", stored)
    targets = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here) for name, leaf in stored.items()}
    restored = ocp.StandardCheckpointer().restore(folder.resolve(), targets)
    return {name: np.asarray(value) for name, value in restored.items()}


def stored_json(step_folder: Path, item: str) -> dict[str, Any]:
    """The `dataset` or `meta` item of a checkpoint."""
    return ocp.Checkpointer(ocp.JsonCheckpointHandler()).restore((step_folder / item).resolve())


def metrics(run: Path, name: str) -> dict[int, float]:
    """One figure of `metrics.jsonl` by step; the last entry of a step counts."""
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {entry["step"]: entry[name] for entry in entries if name in entry}


def steps_of(run: Path) -> list[int]:
    """The finished checkpoints of a run."""
    return sorted(int(path.name) for path in run.iterdir() if path.name.isdigit())


def assert_same_checkpoint(one: Path, other: Path) -> None:
    """Compare parameters, optimizer state, EMA and data state bit by bit."""
    arrays, others = stored_arrays(one), stored_arrays(other)
    assert arrays.keys() == others.keys()
    for name, value in arrays.items():
        assert value.dtype == others[name].dtype
        np.testing.assert_array_equal(value, others[name], err_msg=name)
    assert stored_json(one, "dataset") == stored_json(other, "dataset")
