"""Preparing into a folder that exists: interrupted, finished, damaged or of another data set."""

import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from PIL import Image

import flowdit
from flowdit.data.manifest import ManifestError, verify
from flowdit.data.preparation import encode_unit
from flowdit.data.prepare import prepare


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("finished", [0, 3])
def test_an_interrupted_run_continues_to_the_same_data_set(config, monkeypatch, finished):
    whole = prepare(dataclasses.replace(config, out=config.out + "-whole"))
    write_encoded, written = encode_unit.write_encoded, []

    def write_until_interrupted(path, records, *args, **options):
        write_encoded(path, interrupted(records) if len(written) == finished else records, *args, **options)
        written.append(path.name)

    def interrupted(records):
        yield next(records)
        raise Interrupted

    def write_and_count(path, *args, **options):
        write_encoded(path, *args, **options)
        written.append(path.name)

    monkeypatch.setattr(encode_unit, "write_encoded", write_until_interrupted)
    with pytest.raises(Interrupted):
        prepare(config)
    assert len(written) == finished and not (Path(config.out) / "dataset.json").exists()
    monkeypatch.setattr(encode_unit, "write_encoded", write_and_count)
    assert prepare(config).id == whole.id
    assert written == [shard.file for shard in whole.shards]  # each once: no finished shard was written again
    assert sorted(os.listdir(config.out)) == sorted(os.listdir(config.out + "-whole"))


def test_a_killed_run_continues_to_the_same_data_set(config):
    whole = prepare(dataclasses.replace(config, out=config.out + "-whole"))
    script = """
        import sys, time
        from flowdit.data.preparation import encode_unit as module
        from flowdit.data.preparation.engines import RayConfig
        from flowdit.features import FeatureWeights
        from flowdit.data.prepare import FilterConfig, PrepareConfig, prepare
        write = module.write_encoded
        module.write_encoded = lambda *args, **options: (write(*args, **options), time.sleep(0.5))
        prepare(eval(sys.argv[1]))
    """
    arguments = [sys.executable, "-c", textwrap.dedent(script), repr(config)]
    package = Path(flowdit.__file__).parents[1]
    process = subprocess.Popen(arguments, cwd=package, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 240
    while not list(Path(config.out).glob("*.array_record.json")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors
    assert not (Path(config.out) / "dataset.json").exists()
    assert prepare(config).id == whole.id


def test_a_finished_data_set_is_not_changed(config, messages):
    manifest = prepare(config)
    assert "training and" in messages()[-1]
    times = {path: path.stat().st_mtime_ns for path in Path(config.out).iterdir()}
    assert prepare(config) == manifest
    assert "already prepared" in messages()[-1]
    assert {path: path.stat().st_mtime_ns for path in Path(config.out).iterdir()} == times


def test_a_finished_data_set_with_a_damaged_shard_is_not_called_finished(config):
    shard = Path(config.out) / prepare(config).shards[2].file
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ManifestError, match=f"{shard.name}: must have .* bytes"):
        prepare(config)


@pytest.mark.parametrize(("field", "value"), [("hflip", True), ("batch_size", 3), ("dtype", "float32")])
def test_other_settings_in_the_same_folder_are_refused_and_lose_nothing(config, field, value):
    manifest = prepare(config)
    with pytest.raises(
        ValueError, match=f"out: .* was started with {field}={getattr(config, field)!r}, this run has {value!r}"
    ):
        prepare(dataclasses.replace(config, **{field: value}))
    verify(config.out, manifest)


def test_other_images_in_the_same_folder_are_refused(config, source):
    prepare(config)
    Image.new("RGB", (16, 16)).save(source / "red" / "new.png")
    with pytest.raises(
        ValueError, match=r"out: .* was prepared from other images: 1 added \(red/new.png\): give another folder$"
    ):
        prepare(config)


def test_a_folder_of_foreign_shards_is_refused(config):
    prepare(config)
    (Path(config.out) / "prepare.json").unlink()
    with pytest.raises(ValueError, match=r"out: .* holds shards without prepare.json"):
        prepare(config)
    (Path(config.out) / "prepare.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"out: .*prepare.json is damaged"):
        prepare(config)
