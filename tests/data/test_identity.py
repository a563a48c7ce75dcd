"""The identity of a data set: what may be corrected later, data of earlier versions, and changed sources."""

import dataclasses
import functools
import gzip
import json
import os
from pathlib import Path

import pytest
from etils import epath
from latent_records import word_encoder
from PIL import Image
from test_prepare_again import Interrupted
from test_prepare_texts import write_captions

from flowdit.data.manifest import Manifest
from flowdit.data.preparation import encode_unit
from flowdit.data.prepare import FilterConfig, prepare
from flowdit.data.sources import open_images
from flowdit.data.text_cache import open_cache
from flowdit.data.text_features import write_cache


def edit(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def contents(folder, *, without=()):
    return {
        path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file() and path.name not in without
    }


def interrupt(config, monkeypatch):
    """Run `prepare` until it has written two shards."""
    write_encoded, written = encode_unit.write_encoded, []

    def write(*args, **options):
        if len(written) == 2:
            raise Interrupted
        written.append(write_encoded(*args, **options))

    with monkeypatch.context() as patch:
        patch.setattr(encode_unit, "write_encoded", write)
        with pytest.raises(Interrupted):
            prepare(config)


def test_a_licence_is_corrected_by_repeating_the_command(config, messages):
    before = prepare(dataclasses.replace(config, license="CC-BY 5.0", attribution="by us"))
    files = contents(config.out, without=("dataset.json", "prepare.json"))
    after = prepare(dataclasses.replace(config, license="CC BY 4.0"))
    assert (after.license, after.attribution, after.id) == ("CC BY 4.0", "by us", before.id)
    assert messages()[-1] == f"{config.out}/dataset.json: license 'CC-BY 5.0' is now 'CC BY 4.0'"
    assert Manifest.read(config.out) == after
    assert contents(config.out, without=("dataset.json", "prepare.json")) == files
    assert prepare(config) == after  # without the licence the stored one is kept


def test_a_run_that_is_continued_keeps_the_licence_or_takes_the_new_one(config, monkeypatch):
    interrupt(dataclasses.replace(config, license="MIT", attribution="by us"), monkeypatch)
    interrupt(dataclasses.replace(config, license="CC0"), monkeypatch)
    manifest = prepare(config)
    assert (manifest.license, manifest.attribution) == ("CC0", "by us")


def test_a_text_cache_is_added_without_repeating_the_licence(config, source, tmp_path):
    captioned = dataclasses.replace(config, captions=write_captions(source, tmp_path / "captions.jsonl"))
    manifest = prepare(dataclasses.replace(captioned, license="MIT"))
    assert prepare(dataclasses.replace(captioned, text_encoder="wordllama")) == manifest
    assert (Path(config.out) / "text_features" / "text_features.json").exists()


@pytest.mark.parametrize("place", ["out/text_features", "elsewhere"])
def test_a_cache_of_version_1_is_read_and_survives_new_licences(config, source, tmp_path, place):
    captioned = dataclasses.replace(config, captions=write_captions(source, tmp_path / "captions.jsonl"))
    manifest = prepare(captioned)
    cache = tmp_path / place
    encoder = word_encoder()
    write_cache(cache, config.out, manifest, encoder)
    for name in ("text_features.json", "prepare.json"):
        edit(cache / name, lambda d: d.update(data=manifest.ids[1]))
    open_cache(cache, manifest, "train", encoder, 0.5)
    write_cache(cache, config.out, manifest, encoder)
    for license in ("MIT", "CC0"):
        corrected = prepare(dataclasses.replace(captioned, license=license))
        assert corrected.license == license
        open_cache(cache, corrected, "train", encoder, 0.5, data=config.out)
        write_cache(cache, config.out, corrected, encoder)
    edit(cache / "text_features.json", lambda d: d.update(data="of other data"))
    with pytest.raises(ValueError, match="text_features.json: id of the data set: must be "):
        open_cache(cache, corrected, "train", encoder, 0.5, data=config.out)
    (Path(config.out) / "prepare.json").write_text("[")  # is not needed for training
    edit(cache / "text_features.json", lambda d: d.update(data=corrected.id))
    open_cache(cache, corrected, "train", encoder, 0.5, data=config.out)


FORMAT_1 = {"vae", "image_size", "batch_size", "records_per_shard", "held_out_fraction", "posterior_std", "hflip"}
FORMAT_1 |= {"dtype", "pictures", "captions", "vae_fingerprint", "license", "attribution"}


def of_an_earlier_version(config):
    """`prepare.json` holds licence and attribution and no format, and there is no listing of the source."""
    path = Path(config.out) / "prepare.json"
    stored = json.loads(path.read_text()) | {"license": "MIT", "attribution": ""}
    path.write_text(json.dumps({name: value for name, value in stored.items() if name in FORMAT_1}))
    (Path(config.out) / "source_files.jsonl.gz").unlink()


def test_a_data_set_of_an_earlier_version_stays_finished(config, messages):
    manifest = prepare(config)
    of_an_earlier_version(config)
    assert prepare(config) == manifest
    assert "already prepared" in messages()[-1]
    for changes in ({"dtype": "float32"}, {"buckets": "computed"}, {"filter": FilterConfig(min_side=2)}):
        name, value = next(iter(changes.items()))
        with pytest.raises(ValueError, match=f"^out: .* was started with {name}"):
            prepare(dataclasses.replace(config, **{name: value}))


def test_a_run_begun_by_an_earlier_version_is_refused_and_loses_nothing(config, monkeypatch):
    interrupt(config, monkeypatch)
    of_an_earlier_version(config)
    files = contents(config.out)
    problem = "was begun by an earlier version, which must finish it: give another folder"
    with pytest.raises(ValueError, match=f"^out: {config.out} {problem}$"):
        prepare(config)
    assert contents(config.out) == files


@pytest.mark.parametrize("finished", [True, False])
def test_changed_files_of_the_source_are_named(config, source, monkeypatch, finished):
    if finished:
        prepare(config)
    else:
        interrupt(config, monkeypatch)
    for i in range(5):
        Image.new("RGB", (16, 16)).save(source / "red" / f"new {i}.png")
    (source / "blue" / "03.png").unlink()
    os.utime(source / "blue" / "05.png", ns=(0, 0))
    with pytest.raises(ValueError, match="out: .* was prepared from other images") as error:
        prepare(config)
    assert str(error.value).endswith(
        "other images: 5 added (red/new 0.png, red/new 1.png, red/new 2.png, ...), "
        "1 removed (blue/03.png), 1 modified (blue/05.png): give another folder"
    )


def test_without_a_whole_listing_a_changed_source_is_still_refused(config, source):
    prepare(config)
    path = Path(config.out) / "source_files.jsonl.gz"
    whole = path.read_bytes()
    (source / "blue" / "03.png").unlink()
    listing = open_images(config).listing
    key = gzip.decompress(whole).split(b"\n")[0]
    changes = functools.partial(listing.changes, epath.Path(config.out), json.loads(key)[0])
    assert changes() == "1 removed (blue/03.png)"
    lines = [b'["a", 1, "2"]\n', b'["a", [[1]], 2]\n', b'["' + b"a" * 2**20 + b'", 1, 2]\n', b"[" * 2**16]
    contents = [b"{", b'["another"]\n', *(key + b"\n" + line for line in lines)]
    for damaged in (b"no gzip", whole[:-20], *map(gzip.compress, contents)):
        path.write_bytes(damaged)
        assert changes() is None
    path.unlink()
    with pytest.raises(ValueError, match="out: .* was prepared from other images: give another folder$"):
        prepare(config)


def test_a_folder_without_shards_takes_other_settings(config):
    out = Path(config.out)
    prepare(config)
    for path in out.iterdir():
        if path.name not in ("prepare.json", "source_files.jsonl.gz"):
            path.unlink()
    manifest = prepare(dataclasses.replace(config, dtype="float32"))
    assert manifest.latent_dtype == json.loads((out / "prepare.json").read_text())["dtype"] == "float32"
