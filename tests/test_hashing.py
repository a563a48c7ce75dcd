"""Values of digests that are stored in checkpoints, manifests and caches: a refactor must not change them."""

import numpy as np
import pytest

from flowdit.errors import first_line
from flowdit.hashing import file_sha256, files_fingerprint, fingerprint, sha256, tensors_fingerprint

# NIST's example for "abc".
ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_sha256_is_the_standards(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256("abc") == sha256([b"a", b"bc"]) == file_sha256(tmp_path / "abc") == ABC
    assert fingerprint("abc") == ABC[:16]


def test_the_fingerprint_of_files_is_that_of_stored_vaes_and_encoders(tmp_path):
    files = tmp_path / "a.json", tmp_path / "b.bin"
    files[0].write_bytes(b"{}")
    files[1].write_bytes(bytes(range(256)))
    assert files_fingerprint(*files) == "06c3c2aa8716bd74"
    files[1].rename(tmp_path / "c.bin")
    assert files_fingerprint(files[0], tmp_path / "c.bin") != "06c3c2aa8716bd74"
    with pytest.raises(ValueError, match="b.bin: not a readable file"):
        files_fingerprint(*files)


def test_the_fingerprint_of_tensors_is_that_of_stored_encoders():
    tensors = {"b": np.arange(5000, dtype=np.float32).reshape(50, 100), "a": np.ones(3, np.float16)}
    assert tensors_fingerprint(tensors) == tensors_fingerprint(dict(reversed(tensors.items()))) == "a7c7a6245f71a4cc"
    assert tensors_fingerprint(tensors | {"a": tensors["a"].astype(np.float32)}) != "a7c7a6245f71a4cc"


@pytest.mark.parametrize(
    ("text", "line"), [("one", "one"), ("\n  \n one \ntwo", "one"), ("", "OSError"), (" \n", "OSError")]
)
def test_the_first_line_of_an_error(text, line):
    assert first_line(OSError(text)) == line
