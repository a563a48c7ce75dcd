"""One message for arrays that are not those of the model."""

import pytest

from flowdit.arrays import check_arrays, shape_text

WANTED = {"a": "[2]", "b": "[2, 3]", "c": "float[4]"}


def test_equal_arrays_pass():
    check_arrays(WANTED, dict(reversed(WANTED.items())), "file")
    assert shape_text((2, 3)) == "[2, 3]" and shape_text(()) == "[]"


def test_all_differences_are_told_in_one_line():
    found = {"a": "[2]", "b": "[3, 2]", "c": "int32[4]", "e": "[1]", "d": "[1]"}
    with pytest.raises(ValueError) as caught:
        check_arrays(WANTED | {"z": "[9]"}, found, "folder/file")
    told = "1 missing: z; 2 unexpected: d, e; 2 different: b [3, 2] for [2, 3], c int32[4] for float[4]"
    assert str(caught.value) == f"folder/file: arrays must be those of the model, but {told}"


def test_millions_of_hostile_names_are_a_short_line():
    with pytest.raises(ValueError) as caught:
        check_arrays(WANTED, WANTED | {f"{i}\n{'x' * 1_000}": "[1]" for i in range(10_000)}, "file")
    assert str(caught.value).endswith(" ... and 9995 more") and len(str(caught.value)) < 1_000
    assert "\n" not in str(caught.value)
