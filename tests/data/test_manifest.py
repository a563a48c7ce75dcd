"""The manifest: strict reading, atomic writing, and verification of the shards."""

import dataclasses
import hashlib
import json

import pytest

from flowdit.data.manifest import Manifest, ManifestError, verify


def edit(folder, change):
    path = folder / "dataset.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_read_returns_what_was_written(folder):
    manifest = Manifest.read(folder)
    assert (manifest.num_records("train"), manifest.num_records("validation"), manifest.num_classes) == (20, 7, 5)
    before = (folder / "dataset.json").read_bytes()
    manifest.write(folder)
    assert (folder / "dataset.json").read_bytes() == before
    assert Manifest.read(folder) == manifest
    assert [path.name for path in folder.glob("*.tmp")] == []


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["vae"].update(scale=0.5),
        lambda d: d["channel_std"].__setitem__(3, 1.5),
        lambda d: d["shards"][1].update(sha256="0"),
        lambda d: d["class_names"].reverse(),
    ],
)
def test_id_changes_with_every_part_of_the_data(folder, change):
    before = Manifest.read(folder).id
    edit(folder, change)
    assert Manifest.read(folder).id != before


def test_licence_and_attribution_are_not_part_of_the_id(folder):
    before = Manifest.read(folder)
    edit(folder, lambda d: d.update(license="MIT", attribution="by us"))
    after = Manifest.read(folder)
    assert after.id == before.id and before.differences(after) == []
    assert after.ids[1] != before.ids[1]


def test_parts_of_the_validation_split_are_counted_and_absent_where_there_are_none(folder):
    before = Manifest.read(folder)
    assert "validation_parts" not in (folder / "dataset.json").read_text()
    edit(folder, lambda d: d.update(validation_parts=[{"name": "pair", "records": 7}]))
    after = Manifest.read(folder)
    assert after.validation_parts[0].name == "pair" and after.id != before.id
    assert before.differences(after) == ["validation_parts"]
    edit(folder, lambda d: d.update(validation_parts=[{"name": "pair", "records": 6}]))
    with pytest.raises(
        ManifestError, match="validation_parts: must add up to the 7 records of the validation split, got 6"
    ):
        Manifest.read(folder)


def test_differences_name_the_fields_of_the_data(folder):
    before = Manifest.read(folder)
    edit(folder, lambda d: (d["vae"].update(scale=0.5), d["shards"][1].update(sha256="0")))
    assert Manifest.read(folder).differences(before) == ["vae", "shards (1 of 3)"]


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (lambda d: d["shards"].append(d["shards"][0] | {"file": "more.array_record"}), "shards (1 of 4)"),
        (lambda d: d["shards"].pop(), "shards (1 of 3)"),
        (lambda d: d["shards"].reverse(), "shards (in another order)"),
    ],
)
def test_shards_that_were_added_removed_or_moved_are_a_difference(folder, change, difference):
    before = Manifest.read(folder)
    edit(folder, change)
    after = Manifest.read(folder)
    assert before.differences(after) == after.differences(before) == [difference]


def test_id_does_not_depend_on_the_layout_of_the_file(folder):
    before = Manifest.read(folder).id
    data = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(dict(reversed(data.items())), indent=7))
    assert Manifest.read(folder).id == before


def test_a_file_from_before_captions_is_read_and_keeps_its_ids(folder):
    before = Manifest.read(folder)
    edit(folder, lambda d: d.pop("has_captions"))
    after = Manifest.read(folder)
    assert after == before and after.ids == before.ids and not before.has_captions
    data = json.loads((folder / "dataset.json").read_text())
    canonical = json.dumps(data, sort_keys=True, separators=(",", ":"))
    assert before.ids[1] == hashlib.sha256(canonical.encode()).hexdigest()
    edit(folder, lambda d: d.update(has_captions=True))
    assert Manifest.read(folder).id != before.id


def with_buckets(data):
    """Two buckets: all 13 and 5 of 7 records of the training shards are in the first, all of validation in the second."""
    data["buckets"] = [{"height": 16, "width": 16}, {"height": 8, "width": 32}]
    for shard, counts in zip(data["shards"], ([13, 0], [5, 2], [0, 7]), strict=True):
        shard["buckets"] = counts


def test_buckets_give_shapes_and_counts(folder):
    before = Manifest.read(folder)
    assert (before.bucket_shapes, before.bucket_counts("train")) == (((4, 2, 2),), (20,))
    edit(folder, with_buckets)
    after = Manifest.read(folder)
    assert after.bucket_shapes == ((4, 2, 2), (4, 1, 4))
    assert (after.bucket_counts("train"), after.bucket_counts("validation")) == ((18, 2), (0, 7))
    assert after.id != before.id and before.differences(after) == ["shards (3 of 3)", "buckets"]
    after.write(folder)
    assert Manifest.read(folder) == after


def test_a_data_set_without_buckets_is_written_as_before(folder):
    data = json.loads((folder / "dataset.json").read_text())
    assert "buckets" not in data and not any("buckets" in shard for shard in data["shards"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda d: d["shards"][1].update(buckets=[5, 3]),
            r"shards\[1\].buckets: must add up to records=7, got 8",
        ),
        (
            lambda d: d["shards"][1].update(buckets=[9, -2]),
            r"shards\[1\].buckets\[1\]: must be greater than or equal to 0, got -2",
        ),
        (
            lambda d: d["shards"][1].update(buckets=[7]),
            r"shards\[1\].buckets: must have a count for each of the 2 buckets of the data set, got 1",
        ),
        (
            lambda d: d["shards"][1].pop("buckets"),
            r"shards\[1\].buckets: must have a count for each of the 2 buckets of the data set, got 0",
        ),
        (
            lambda d: d.pop("buckets"),
            r"shards\[0\].buckets: must have a count for each of the 0 buckets of the data set, got 2",
        ),
        (
            lambda d: d["buckets"][1].update(height=12),
            r"buckets\[1\]: must have sides that are multiples of vae.stride=8, at most 32768, got \(12, 32\)",
        ),
        (lambda d: d["buckets"][1].update(width=2**16), r"buckets\[1\]: must have sides that are multiples .* 65536"),
        (lambda d: d["buckets"][1].update(width=2**62), r"buckets\[1\].width: must be less than or equal to 1048576"),
        (lambda d: d["buckets"][1].update(width=0), r"buckets\[1\].width: must be greater than or equal to 1, got 0"),
        (
            lambda d: d["buckets"].__setitem__(1, d["buckets"][0]),
            r"buckets\[1\]: must be different from the buckets before it, got \(16, 16\)",
        ),
        (lambda d: d.update(buckets=d["buckets"] * 200), "buckets: must be at most 256, got 400"),
    ],
)
def test_buckets_that_do_not_fit_are_named_in_one_line(folder, change, message):
    edit(folder, with_buckets)
    edit(folder, change)
    with pytest.raises(ManifestError, match=f"dataset.json: {message}") as error:
        Manifest.read(folder)
    assert "\n" not in str(error.value)


def test_captions_take_the_place_of_classes(folder):
    edit(folder, lambda d: d.update(has_captions=True, class_names=[]))
    assert Manifest.read(folder).num_classes == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda d: d.update(has_captions=True, class_names=["a", "a"]),
            r"class_names: must be different names, got \['a', 'a'\]",
        ),
        (lambda d: d.update(has_captions=1), "has_captions: must be a valid boolean, got 1"),
        (lambda d: d.update(schema_version=2), "schema_version: must be 1, got 2"),
        (lambda d: d.pop("vae"), "vae: is missing"),
        (lambda d: d["vae"].pop("shift"), "vae.shift: is missing"),
        (lambda d: d.update(colour="red"), "colour: is not a known field"),
        (lambda d: d["shards"][0].update(extra=1), r"shards\[0\].extra: is not a known field"),
        (lambda d: d.update(image_size="16"), "image_size: must be a valid integer, got '16'"),
        (lambda d: d.update(image_size=True), "image_size: must be a valid integer, got True"),
        *(
            (
                lambda d, size=size: d.update(image_size=size),
                rf"image_size: must be vae.stride times a side of latent_shape, \[16\], got {size}",
            )
            for size in (-1, 0, 8, 24, 10**30)
        ),
        (lambda d: d["vae"].update(stride=0), "vae.stride: must be greater than or equal to 1, got 0"),
        (lambda d: d["vae"].update(stride=-8), "vae.stride: must be greater than or equal to 1, got -8"),
        (lambda d: d["vae"].update(stride=4), r"image_size: must be vae.stride times .*, \[8\], got 16"),
        (lambda d: d["vae"].update(stride=True), "vae.stride: must be a valid integer, got True"),
        (lambda d: d["vae"].update(scale=0), "vae.scale: must not be 0"),
        (lambda d: d.update(class_names="abc"), "class_names: must be a valid array, got 'abc'"),
        (lambda d: d.update(class_names=["a", "a"]), "class_names: must be different names"),
        (lambda d: d.update(latent_shape=[4, 2]), r"latent_shape\[2\]: is missing"),
        (lambda d: d.update(latent_shape=[4, 2, 0]), r"latent_shape\[2\]: must be greater than or equal to 1, got 0"),
        (
            lambda d: d.update(latent_shape=[4, 2, 10**6]),
            r"latent_shape\[2\]: must be less than or equal to 4096, got 1000000",
        ),
        (lambda d: d.update(latent_dtype="int8"), "latent_dtype: must be 'float16' or 'float32', got 'int8'"),
        (lambda d: d.update(latent_dtype=["float16"]), r"latent_dtype: must be .* got \['float16'\]"),
        (lambda d: d.update(channel_mean=[0.0]), "channel_mean: must have 4 values, got 1"),
        (
            lambda d: d["channel_mean"].__setitem__(0, float("nan")),
            r"channel_mean\[0\]: must be a finite number, got nan",
        ),
        (
            lambda d: d["channel_std"].__setitem__(0, -1.0),
            r"channel_std\[0\]: must be greater than or equal to 0, got -1.0",
        ),
        (lambda d: d.update(vae=[]), r"vae: must be an object, got \[\]"),
        (lambda d: d.update(shards=[]), "shards: must be one or more different files"),
        (lambda d: d["shards"].append(d["shards"][0]), "shards: must be one or more different files"),
        (
            lambda d: d["shards"][0].update(split="test"),
            r"shards\[0\].split: must be 'train' or 'validation', got 'test'",
        ),
        *(
            (lambda d, name=name: d.update(validation_parts=[{"name": name, "records": 7}]), message)
            for name, message in (
                ("", r"validation_parts\[0\].name: must be 1 to 40 letters"),
                ("t0.0625", r"validation_parts\[0\].name: must be 1 to 40 letters"),
                ("a\n", r"validation_parts\[0\].name: must be 1 to 40 letters"),
                (5, r"validation_parts\[0\].name: must be"),
            )
        ),
        (
            lambda d: d.update(validation_parts=[{"name": "a", "records": 3}, {"name": "a", "records": 4}]),
            "validation_parts: must have different names, got",
        ),
        (
            lambda d: d.update(validation_parts=[{"name": f"p{i}", "records": 1} for i in range(21)]),
            "validation_parts: must be at most 20, got 21",
        ),
        (lambda d: d["shards"][0].update(records=0), r"shards\[0\].records: must be greater than or equal to 1, got 0"),
        *(
            (lambda d, name=name: d["shards"][0].update(file=name), r"shards\[0\].file: must be a plain file name")
            for name in ("../a.array_record", "/etc/a.array_record", "..\\a.array_record", "a.txt", ".array_record", "")
        ),
    ],
)
def test_a_field_that_breaks_a_rule_is_named_in_one_line(folder, change, message):
    edit(folder, change)
    with pytest.raises(ManifestError, match=f"dataset.json: {message}") as error:
        Manifest.read(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("shape", "image_size"), [([4, 2, 2], 20), ([4, 2, 3], 16), ([4, 2, 3], 24), ([4, 3, 2], 16)])
def test_latents_may_be_rounded_and_need_not_be_square(folder, shape, image_size):
    edit(folder, lambda d: d.update(latent_shape=shape, image_size=image_size))
    assert Manifest.read(folder).image_size == image_size


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\x00"])
def test_a_file_that_is_not_json_is_named(folder, text):
    (folder / "dataset.json").write_text(text)
    with pytest.raises(ManifestError, match="dataset.json: is not JSON"):
        Manifest.read(folder)


def test_a_missing_folder_or_file_names_the_command_that_makes_one(tmp_path):
    with pytest.raises(ManifestError, match="no such folder; `python -m flowdit.prepare` makes a data set"):
        Manifest.read(tmp_path / "nowhere")
    with pytest.raises(ManifestError, match="no dataset.json in it; `python -m flowdit.prepare`"):
        Manifest.read(tmp_path)


def test_verify_accepts_untouched_shards(folder):
    verify(folder, Manifest.read(folder))


def test_verify_names_a_missing_shard(folder):
    shard = Manifest.read(folder).shards[1]
    (folder / shard.file).unlink()
    with pytest.raises(ManifestError, match=f"{shard.file}: is missing: the data changed since it was prepared"):
        verify(folder, Manifest.read(folder))


def test_verify_gives_both_sizes(folder):
    manifest = Manifest.read(folder)
    path = folder / manifest.shards[0].file
    path.write_bytes(path.read_bytes() + b"x")
    size = manifest.shards[0].bytes
    with pytest.raises(ManifestError, match=f"{path.name}: must have {size} bytes, has {size + 1}: the data changed"):
        verify(folder, manifest)


def test_verify_finds_one_flipped_bit_in_small_data_and_in_any_on_request(folder):
    manifest = Manifest.read(folder)
    path = folder / manifest.shards[0].file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ManifestError, match=f"sha256 {manifest.shards[0].sha256}, has .*: the data changed"):
        verify(folder, manifest)
    verify(folder, manifest, limit=1000)
    with pytest.raises(ManifestError, match="sha256"):
        verify(folder, manifest, hashes=True, limit=1000)


def test_an_interrupted_write_keeps_the_old_file(folder, monkeypatch):
    before = Manifest.read(folder)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        dataclasses.replace(before, license="MIT").write(folder)
    assert Manifest.read(folder) == before
