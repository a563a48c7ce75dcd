"""Damaged and hostile tars, tables and folders: one line, or a row that is left out with the reason."""

import gzip
import io
import json
import re
import shutil
import tarfile
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from written_sources import as_dataset, as_parquet, as_tars, make_entries, rows

from flowdit.data.rejected import Rejected
from flowdit.data.sources import open_images, table_files
from flowdit.data.sources.base import MAX_FILE_BYTES, Row
from flowdit.data.sources.columns import MAX_TEXT_BYTES
from flowdit.data.sources.config import SourceConfig
from flowdit.fields import shown

PNG = make_entries()[0]["image"]


def write_tar(path: Path, *members: tuple[str, bytes] | tarfile.TarInfo, **options) -> Path:
    with tarfile.open(path, "w", **options) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return path


def read(path: Path | str, **settings) -> list[Row | Rejected]:
    source = open_images(SourceConfig(source=str(path), **settings))
    return [row for unit in source.units() for _, row in source.read(unit)]


def reasons(found: list[Row | Rejected]) -> dict[str, str]:
    return {row.file: row.reason for row in found if isinstance(row, Rejected)}


def error(path: Path | str, **settings) -> str:
    with pytest.raises(ValueError) as caught:
        read(path, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_a_tar_that_ends_early_is_named_wherever_it_ends(tmp_path, suffix):
    whole = write_tar(tmp_path / "whole.tar", *((f"{i}.png", PNG) for i in range(3))).read_bytes()
    size = 512 + -(-len(PNG) // 512) * 512  # of a member
    cut = tmp_path / f"cut{suffix}"
    for length in (size, 2 * size, 2 * size + 100, 2 * size + 512, 3 * size - 1, 3 * size):
        content = whole[:length]
        cut.write_bytes(content if suffix == ".tar" else gzip.compress(content))
        assert re.match(rf"{cut}: is damaged or cut off at byte \d+: ", error(cut)), length
    if suffix == ".tar.gz":
        cut.write_bytes(gzip.compress(whole)[:200])
        assert error(cut).startswith(f"{cut}: is damaged or cut off at byte")
    cut.write_bytes(whole[: 3 * size + 512] if suffix == ".tar" else gzip.compress(whole))
    assert len(read(cut)) == 3


def test_a_tar_that_is_damaged_or_none_is_named(tmp_path):
    path = write_tar(tmp_path / "a.tar", *((f"{i}.png", PNG) for i in range(3)))
    content = bytearray(path.read_bytes())
    size = 512 + -(-len(PNG) // 512) * 512
    content[size + 20] ^= 255  # of the second header: `tarfile` would take it for the end
    path.write_bytes(content)
    assert error(path) == f"{path}: is damaged or cut off at byte {size}: bad header"
    for content in (b"", b"no tar" * 1000, PNG):
        path.write_bytes(content)
        assert error(path).startswith(f"{path}: is no tar that can be read: ")
    write_tar(path, ("a.txt", b"text"))
    assert error(path) == f"source: the first files of {path} must have an image, they are txt"
    write_tar(path, ("a.png", PNG), ("a.png", PNG))
    assert error(path).endswith("two files are named a.png")


def test_sparse_files_of_a_tar_are_refused(tmp_path):
    old = tarfile.TarInfo("a.png")
    old.type = tarfile.GNUTYPE_SPARSE
    new = tarfile.TarInfo("a.png")
    new.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9"}
    for member, form in ((old, tarfile.GNU_FORMAT), (new, tarfile.PAX_FORMAT)):
        path = write_tar(tmp_path / "a.tar", member, format=form)
        assert error(path).endswith("a sparse file, whose list of parts has no bound")


def test_an_endless_line_of_a_file_of_captions_is_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "metadata.csv").write_text("file_name,text\n" + "a" * 2**22)
    assert error(tmp_path) == f"{tmp_path}/metadata.csv:2: must have fewer than 2097152 letters"


def test_arrow_streams_with_offsets_outside_of_their_data_are_refused(tmp_path):
    folder = tmp_path / "set"
    as_dataset(make_entries(), folder)
    (file,) = (folder / "test").glob("*.arrow")
    content = bytearray(file.read_bytes())
    refused = 0
    for place in range(0, len(content) - 8, 4):  # wherever an offset is
        if content[place : place + 4] == len(PNG).to_bytes(4, "little"):
            damaged = content.copy()
            damaged[place : place + 4] = (2 * 10**8).to_bytes(4, "little")
            file.write_bytes(damaged)
            refused += error(folder, split="test").startswith(f"{file}: is damaged or no Arrow stream: ")
    assert refused


def test_names_that_lead_elsewhere_are_only_names(tmp_path):
    names = ["/etc/passwd.png", "../../out.png", "a/../../b.png", "\udcff.png", "./c.png"]
    path = write_tar(tmp_path / "t.tar", *((name, PNG) for name in names))
    found = [row.key for row in read(path) if isinstance(row, Row)]
    assert found == ["t/etc/passwd", "t/out", "t/a/b", "t/\\udcff", "t/c"]
    assert sorted(tmp_path.iterdir()) == [path] and not (tmp_path.parent / "out.png").exists()


def test_links_and_folders_and_hidden_files_of_a_tar_are_passed_over(tmp_path):
    link, folder = tarfile.TarInfo("link.png"), tarfile.TarInfo("folder.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    folder.type = tarfile.DIRTYPE
    path = write_tar(tmp_path / "t.tar", link, folder, ("._a.png", b"x"), ("a.png", PNG), ("readme", b"x"))
    assert [row.key for row in read(path) if isinstance(row, Row)] == ["t/a"]


def test_samples_that_cannot_be_used_are_left_out_with_the_reason(tmp_path):
    path = write_tar(
        tmp_path / "t.tar",
        *(("good.png", PNG), ("good.txt", b"a pear"), ("good.json", b'{"n": 1}')),
        *(("two.jpg", PNG), ("two.png", PNG)),
        *(("mask.png", PNG), ("mask.seg.png", b"another")),
        ("none.txt", b"text"),
        *(("latin.png", PNG), ("latin.txt", "é".encode("latin-1"))),
        *(("nested.png", PNG), ("nested.json", b"[" * 100_000)),
        *(("long.png", PNG), ("long.json", json.dumps("a" * MAX_TEXT_BYTES).encode())),
        *(("bare.png", PNG), ("bare.json", b'{"txt": 3}')),
    )
    found = read(path)
    good, mask = (row for row in found if isinstance(row, Row))
    assert (good.key, good.captions) == ("t/good", ("a pear", ""))
    assert (mask.key, mask.image, mask.captions) == ("t/mask", PNG, ("", ""))
    assert reasons(found) == {
        "t/two": "has 2 images (jpg, png), of which image_column must name one",
        "t/none": "has no image",
        "t/latin": ".txt: must be text in UTF-8",
        "t/nested": reasons(found)["t/nested"],
        "t/long": f".json: has {MAX_TEXT_BYTES + 2} bytes, too many for a text",
        "t/bare": "txt: must be a string, got int",
    }
    assert reasons(found)["t/nested"].startswith(".json: is not JSON: ")
    assert "t/two" not in reasons(read(path, image_column="png"))


def test_what_is_too_large_is_never_read(tmp_path):
    """An image of 257 MiB and a header of 300 MB, both made of holes."""
    path, info = tmp_path / "t.tar", tarfile.TarInfo("big.png")
    info.size = MAX_FILE_BYTES + 1
    with path.open("wb") as file, tarfile.open(fileobj=write_tar(tmp_path / "s.tar", ("a.png", PNG)).open("rb")):
        file.write(info.tobuf())
        file.seek(-(-info.size // 512) * 512, io.SEEK_CUR)
        file.write((tmp_path / "s.tar").read_bytes())
    tracemalloc.start()
    found = read(path)
    assert reasons(found) == {"t/big": f"has {info.size} bytes, more than {MAX_FILE_BYTES}"} and len(found) == 2
    header = tarfile.TarInfo("././@PaxHeader")
    header.type, header.size = tarfile.XHDTYPE, 300_000_000
    with path.open("wb") as file:
        file.write(header.tobuf())
        file.truncate(header.size + 1024)
    assert error(path).endswith("a header of 300000000 bytes")
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


@pytest.mark.parametrize("headers", [{"size": "-1536"}, {"size": "-5000"}, {"size": "9" * 30}])
def test_headers_that_lie_do_not_hold_the_reader_up(tmp_path, headers):
    member = tarfile.TarInfo("b.png")
    member.pax_headers = headers
    path = write_tar(tmp_path / "t.tar", ("a.png", PNG), member, ("c.png", PNG), format=tarfile.PAX_FORMAT)
    assert re.match(rf"{path}: is damaged or cut off at byte ", error(path))


def test_files_that_are_no_tables_are_named(tmp_path):
    path = Path(as_parquet(make_entries(), tmp_path / "images")).parent / "all.parquet"
    whole = path.read_bytes()
    for content in (b"", PNG, whole[: len(whole) // 2], whole[:4] + b"\xff" * 50 + whole[-8:]):
        path.write_bytes(content)
        assert error(path).startswith(f"{path}: is damaged or no Parquet file: ")
    folder = Path(as_dataset(make_entries(), tmp_path / "set")) / "train"
    (arrow,) = folder.glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:-200])
    assert error(folder).startswith(f"{arrow}: is damaged or no Arrow stream: ")
    for content in ("{", "[" * 100_000):
        (folder / "state.json").write_text(content)
        assert error(folder).startswith(f"{folder}/state.json: is not JSON: ")
    for name in ("../../x.arrow", "/etc/passwd", 3):
        (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
        assert error(folder).endswith("state.json must name the files of the data set, all in its folder")


def test_columns_that_are_missing_or_of_another_type_are_named_with_those_there_are(tmp_path):
    path = as_parquet(make_entries(), tmp_path / "images")
    file = path.replace("*", "all")
    there = "image, kind, text, long, name, license, score"
    for setting in ("image_column", "label_column", "caption_column", "long_caption_column", "key_column"):
        expected = f"{setting}: must be a column of {file}, which has {there}, got 'x'"
        assert error(path, **{setting: "x"}) == expected
    assert error(path, keep_columns=["x"]) == f"keep_columns: must be a column of {file}, which has {there}, got 'x'"
    assert error(path, image_column="score") == "image_column: must hold files, or their paths, not double, got 'score'"
    table = pq.read_table(file)
    pq.write_table(table.drop_columns(["text"]), file.replace("all", "b"))
    assert error(path) == f"{file.replace('all', 'b')}: has no column text, it has {there.replace(' text,', '')}"
    pq.write_table(table.drop_columns(["image"]), file)
    assert error(path).startswith(f"image_column: must name the column of the images of {file}: kind, text")


def test_rows_of_tables_that_cannot_be_used_are_left_out_with_the_reason(tmp_path):
    (tmp_path / "good.png").write_bytes(PNG)
    (tmp_path.parent / "secret.png").write_bytes(PNG)
    paths = [
        "good.png",
        "../secret.png",
        str(tmp_path / "good.png"),
        "none.png",
        "https://host/x.png",
        None,
        "./good.png",
    ]
    columns = {"image": paths, "label": ["a", "b", "c", "d", "e", "f", None]}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    found = read(f"parquet:{tmp_path}/t.parquet")
    assert [row.key for row in found if isinstance(row, Row)] == ["good.png"]
    outside = "must be within the folder of the table"
    assert list(reasons(found).values()) == [
        f"'../secret.png': {outside}",
        f"{shown(f'{tmp_path}/good.png')}: {outside}",
        "'none.png': No such file or directory",
        f"'https://host/x.png': {outside}",
        "has no image",
        "label: must be a label, text or a whole number, got None",
    ]
    text = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")])
    pq.write_table(pa.table({"image": [PNG], "text": text}), tmp_path / "t.parquet")
    assert reasons(read(tmp_path / "t.parquet")) == {"t/0": "text: must be a string, got bytes"}


def test_classes_must_be_those_of_the_first_file(tmp_path):
    folder = Path(as_dataset(make_entries(), tmp_path / "set")) / "train"
    (arrow,) = folder.glob("*.arrow")
    with pa.memory_map(str(arrow)) as stream:
        table = pa.ipc.open_stream(stream).read_all()
    schema = table.schema
    for name, (old, new) in {"0": (b"blue", b"blue"), "1": (b"blue", b"grey")}.items():
        metadata = {b"huggingface": schema.metadata[b"huggingface"].replace(old, new)}
        labels = pa.array([7, *[0] * 9])
        changed = table.set_column(table.schema.get_field_index("kind"), "kind", labels)
        pq.write_table(changed.replace_schema_metadata(metadata), tmp_path / f"{name}.parquet")
    found = read(tmp_path / "0.parquet", label_column="kind")
    assert reasons(found) == {"0/0": "kind: must be a label, text or a whole number, got None"}
    assert {row.label for row in found if isinstance(row, Row)} == {"blue"}
    message = error(f"{tmp_path}/{{0,1}}.parquet", label_column="kind")
    assert message == f"{tmp_path}/1.parquet: must have the classes of {tmp_path}/0.parquet"
    assert len(read(f"{tmp_path}/{{0,1}}.parquet")) == 20  # without labels their names do not matter


def test_splits_that_are_not_there_are_named_with_those_there_are(tmp_path):
    path = as_dataset(make_entries(), tmp_path / "set")
    assert error(path) == "split: must be one of train, test, got ''"
    assert error(path, split="x") == "split: must be one of train, test, got 'x'"
    assert error(f"{path}/train", split="x") == f"split: must be empty, as {path}/train has no splits, got 'x'"


def test_sources_that_are_nothing_or_several_things_are_refused(tmp_path):
    kinds = "openmoji, emoji_styles, folder, webdataset, parquet, huggingface"
    nothing = f"source: must be {kinds}, or images by path; there is no file or folder "
    assert error("nowhere") == f"{nothing}'nowhere'"
    assert error("webdatset:x.tar") == f"{nothing}'webdatset:x.tar'"
    (tmp_path / "note.txt").write_text("text")
    assert error(tmp_path / "note.txt").startswith("source: must be a folder of images, tars (.tar ")
    assert error(tmp_path).startswith(f"source: {tmp_path} must have images or one sub-folder of them for each class")
    assert error(f"webdataset:{tmp_path}") == f"source: {tmp_path} has no tars (.tar .tar.gz .tgz)"
    assert error(f"{tmp_path}/*.tar") == f"{tmp_path}/*.tar: there is no such file or folder"
    assert error(f"{tmp_path}/{{0..2}}.tar") == f"{tmp_path}/0.tar: there is no such file or folder"
    as_tars(make_entries(), tmp_path / "images")
    shutil.copy(as_parquet(make_entries(), tmp_path / "more").replace("*", "all"), tmp_path / "images")
    several = f"has tars and Parquet files: say which, as in webdataset:{tmp_path / 'images'}"
    assert error(tmp_path / "images") == f"source: {several}"
    assert len(rows(open_images(SourceConfig(source=f"parquet:{tmp_path / 'images'}")))) == 10


def test_a_missing_package_for_tables_is_named_with_its_extra(tmp_path, monkeypatch):
    path = as_parquet(make_entries(), tmp_path / "images")
    monkeypatch.setattr(table_files.importlib.util, "find_spec", lambda name: None)
    assert error(path) == "source: needs the package pyarrow: pip install 'flowdit[parquet]'"
