"""Workers and commands that are killed at any moment: what is prepared then is what an undisturbed run prepares."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from ray_tests import REPOSITORY, end_processes_in, processes_in, ray_folder, wait_until, workers_in
from runs import call

from flowdit.prepare import main

LOOP = ("engine=loop",)
ONE_WORKER = ("engine=ray", "ray.workers=1")
TWO_WORKERS = ("engine=ray", "ray.workers=2")
KILLS = 20


def write_images(folder: Path, count: int) -> Path:
    """Noisy JPEG files of two classes, of several sizes; one is broken, and two are equal."""
    rng = np.random.default_rng(0)
    for i in range(count):
        path = folder / "ab"[i % 2] / f"{i:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        height, width = (24, 40) if i % 3 else (40, 24)
        Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8)).save(path, quality=80)
    (folder / "a" / "000.jpg").write_bytes(b"no image")
    shutil.copy(folder / "b" / "001.jpg", folder / "b" / "copy.jpg")
    return folder


def settings(images: Path) -> list[str]:
    """Units of 4 images in two buckets, without duplicates."""
    names = [f"source={images}", "image_size=32", "batch_size=4", "records_per_shard=4", "held_out_fraction=0.2"]
    return [
        *names,
        "buckets=computed",
        "bucket_ratios=[0.5,1,2]",
        "filter.duplicates=true",
        "vae_check=8",
        "hflip=true",
    ]


def prepare(images: Path, out: Path, *engine: str) -> subprocess.Popen[str]:
    """The command, in a process with its own folder as working directory, so that all it starts is found."""
    folder = out.parent / f"{out.name}-processes"
    folder.mkdir(exist_ok=True)
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "flowdit.prepare", *settings(images), f"out={out}", *engine]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def processes_of(out: Path) -> Path:
    return out.parent / f"{out.name}-processes"


def finish(images: Path, out: Path, *engine: str) -> None:
    process = prepare(images, out, *engine)
    text, _ = process.communicate(timeout=900)
    assert process.returncode == 0, text


def finish_here(images: Path, out: Path) -> None:
    """With the loop, in this process, which has the devices and flags of those that it starts."""
    finished = call(main, *settings(images), f"out={out}")
    assert finished.status == 0, finished.err


def kill(process: subprocess.Popen[str], out: Path) -> None:
    """Kill a command, and check that its workers end with it; then what Ray leaves."""
    process.kill()
    process.communicate()
    wait_until(lambda: not workers_in(processes_of(out)), seconds=30)
    end_processes_in(processes_of(out))


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def shards(out: Path) -> int:
    return len(list(out.glob("*.array_record")))


def files(out: Path) -> int:
    return sum(path.is_file() for path in out.rglob("*"))


@pytest.fixture(autouse=True)
def ray_files(tmp_path: Path) -> Iterator[None]:
    with ray_folder():
        yield
        for folder in tmp_path.glob("*-processes"):
            end_processes_in(folder)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "source", 120)


@pytest.fixture(scope="module")
def undisturbed(images: Path) -> dict[str, bytes]:
    out = images.parent / "undisturbed"
    finish_here(images, out)
    assert shards(out) == 31
    return contents(out)


def test_killed_workers_and_commands_change_nothing(images, undisturbed, tmp_path):
    out = tmp_path / "out"
    command = prepare(images, out, *TWO_WORKERS)
    wait_until(lambda: shards(out) >= 2)
    os.kill(random.choice(workers_in(processes_of(out))), signal.SIGKILL)
    before = shards(out)
    wait_until(lambda: shards(out) >= before + 6)
    kill(command, out)
    assert shards(out) < 31 and not (out / "dataset.json").exists()

    finish_here(images, out)
    assert contents(out) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("engine", [LOOP, ONE_WORKER, TWO_WORKERS], ids=["loop", "ray-1", "ray-2"])
def test_a_command_killed_20_times_at_random_moments(images, undisturbed, tmp_path, engine):
    start = time.monotonic()
    finish(images, tmp_path / "whole", *engine)
    assert contents(tmp_path / "whole") == undisturbed
    whole = time.monotonic() - start
    kills, number = 0, 0
    while kills < KILLS:
        out = tmp_path / str(number)
        command = prepare(images, out, *engine)
        try:
            command.wait(random.uniform(0.1, 1) * whole)
        except subprocess.TimeoutExpired:
            kill(command, out)
            kills += 1
            continue
        assert (command.returncode, contents(out)) == (0, undisturbed), command.communicate()
        number += 1
    finish(images, tmp_path / str(number), *engine)
    assert contents(tmp_path / str(number)) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("engine", [ONE_WORKER, TWO_WORKERS], ids=["ray-1", "ray-2"])
def test_workers_killed_20_times_at_random_moments(images, undisturbed, tmp_path, engine):
    kills, number = 0, 0
    while kills < KILLS:
        out = tmp_path / str(number)
        command = prepare(images, out, *engine)
        while command.poll() is None and kills < KILLS:
            # Every second one while there is progress: on a loaded machine all would meet workers that are starting.
            before, end = files(out), time.monotonic() + 30 * (kills % 2)
            while command.poll() is None and files(out) == before and time.monotonic() < end:
                time.sleep(0.05)
            time.sleep(random.uniform(0, 3 - 2.5 * (kills % 2)))
            if workers := workers_in(processes_of(out)):
                os.kill(random.choice(workers), signal.SIGKILL)
                kills += 1
        text, _ = command.communicate(timeout=900)
        assert (command.returncode, contents(out)) == (0, undisturbed), text
        number += 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.slow
def test_a_stopped_command_ends_its_workers_and_goes_on_later(images, undisturbed, tmp_path, number):
    out = tmp_path / "out"
    command = prepare(images, out, *TWO_WORKERS)
    wait_until(lambda: shards(out) >= 2)
    command.send_signal(number)
    text, _ = command.communicate(timeout=60)
    name = "SIGTERM" if number == signal.SIGTERM else "Ctrl-C"
    line = f"stopped by {name}: the finished shards are kept, the same command continues"
    assert (command.returncode, text.splitlines()[-1]) == (128 + number, line)
    assert not processes_in(processes_of(out))
    finish(images, out, *ONE_WORKER)
    assert contents(out) == undisturbed
