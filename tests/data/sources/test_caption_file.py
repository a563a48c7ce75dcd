"""The caption file of an image folder: valid contents, and errors."""

import json

import numpy as np
import pytest

from flowdit.data.sources.caption_file import read_table
from flowdit.data.sources.config import SourceConfig


def read_captions(path, folder, names, **settings):
    return [row.captions for row in read_table(str(path), str(folder), names, SourceConfig(**settings)).rows]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "captions.jsonl"


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))


def test_captions_come_in_the_order_of_the_images(path, tmp_path):
    write(
        path,
        {"file": "b/2.png", "short_caption": "two", "long_caption": "the second", "score": 3},
        "",
        {"file": "./1.png", "short_caption": "eins\u2028é", "long_caption": ""},
        {"file": "3.png", "short_caption": ""},
    )
    found = read_captions(path, tmp_path, ["1.png", "3.png", "b/2.png"])
    assert found == [("eins\u2028é", ""), ("", ""), ("two", "the second")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", ":2: is not JSON: "),
        ("[" * 100_000, ":2: is not JSON: "),
        ("[1]", ":2: must be an object, got list"),
        ({"short_caption": "a"}, r":2: file: is missing, the line has \['short_caption'\]"),
        ({"file": "2.png"}, r":2: short_caption: is missing, the line has \['file'\]"),
        ({"file": 2, "short_caption": "a"}, ":2: file: must be a string, got int"),
        ({"file": "2.png", "short_caption": 5}, ":2: short_caption: must be a string, got int"),
        ({"file": "2.png", "short_caption": None}, ":2: short_caption: must be a string, got NoneType"),
        (
            {"file": "2.png", "short_caption": "a", "long_caption": ["b"]},
            ":2: long_caption: must be a string, got list",
        ),
        (
            {"file": "2.png", "short_caption": "\ud800"},
            r":2: short_caption: must be valid Unicode, got '.ud800'",
        ),
        ({"file": "./1.png", "short_caption": "a"}, ":2: file: must differ from line 1, got '1.png'"),
    ],
)
def test_a_bad_line_is_named(path, tmp_path, line, message):
    write(path, {"file": "1.png", "short_caption": "one"}, line)
    with pytest.raises(ValueError, match=f"captions.jsonl{message}") as error:
        read_captions(path, tmp_path, ["1.png", "2.png"])
    assert "\n" not in str(error.value)


def test_images_without_captions_and_captions_without_images_are_counted(path, tmp_path):
    write(path, *({"file": f"{i}.png", "short_caption": "a"} for i in range(4)))
    rule = r"captions.jsonl has no caption for 2 of the 6 images of .*, the first is 'x.png'; the file has 4 captions"
    with pytest.raises(ValueError, match=rule):
        read_captions(path, tmp_path, [*(f"{i}.png" for i in range(4)), "x.png", "y.png"])
    rule = r"has 3 captions without an image in .*, the first in line 2: '1.png'; the folder has '0.png'"
    with pytest.raises(ValueError, match=rule):
        read_captions(path, tmp_path, ["0.png"])


def test_a_wrong_prefix_is_seen_in_the_message(path, tmp_path):
    write(path, *({"file": f"images/{name}.png", "short_caption": "a"} for name in "ab"))
    rule = r"no caption for 2 of the 2 images of .*, the first is 'a.png'; the file has 'images/a.png'$"
    with pytest.raises(ValueError, match=rule):
        read_captions(path, tmp_path, ["a.png", "b.png"])


def test_a_byte_order_mark_and_null_long_captions_are_accepted(path, tmp_path):
    line = json.dumps({"file": "a.png", "short_caption": "a", "long_caption": None})
    path.write_text(line, encoding="utf-8-sig")
    assert read_captions(path, tmp_path, ["a.png"]) == [("a", "")]


def test_accents_may_be_stored_in_either_form(path, tmp_path):
    write(path, {"file": "e\u0301.png", "short_caption": "one"}, {"file": "\u00fc.png", "short_caption": "two"})
    assert read_captions(path, tmp_path, ["\u00e9.png", "u\u0308.png"]) == [("one", ""), ("two", "")]


def test_captions_that_are_all_empty_are_refused(path, tmp_path):
    write(path, *({"file": f"{name}.png", "short_caption": " ", "long_caption": ""} for name in "ab"))
    with pytest.raises(ValueError, match=r"captions.jsonl must have captions that are not empty, all 2 are empty$"):
        read_captions(path, tmp_path, ["a.png", "b.png"])


def test_a_file_that_cannot_be_read_is_named(path, tmp_path):
    with pytest.raises(ValueError, match=r"captions: cannot read .*captions.jsonl: No such file"):
        read_captions(path, tmp_path, [])
    path.write_bytes(np.full(20, 255, np.uint8).tobytes())
    with pytest.raises(ValueError, match=r"captions: .*captions.jsonl must be UTF-8"):
        read_captions(path, tmp_path, [])
