"""Records: allowed contents, security, and errors for bad ones."""

import os
import pickle
import pickletools

import numpy as np
import pytest

from flowdit.data.records import RecordError, decode, encode
from flowdit.data.schema import CAPTION_FIELDS, LabelField, record_schema

SCHEMA = record_schema((4, 2, 2), {"label": LabelField(92)})
STD_SCHEMA = record_schema((4, 2, 2), {"label": LabelField(92)}, has_latent_std=True)


def good_record(**changes):
    return {"latent": np.arange(16, dtype=np.float16).reshape(4, 2, 2), "label": 3} | changes


def as_numpy1(data: bytes) -> bytes:
    """The same pickle with the module names of numpy 1; string lengths are adapted if the protocol has them."""
    for name in (b"numpy._core.multiarray", b"numpy._core.numeric"):
        old = name.replace(b"_core", b"core")
        data = data.replace(b"\x8c" + bytes([len(name)]) + name, b"\x8c" + bytes([len(old)]) + old).replace(name, old)
    return data


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("rename", [bytes, as_numpy1], ids=["numpy2", "numpy1"])
@pytest.mark.parametrize("dtype", ["float16", "float32", ">f4", "int64", "bool"])
def test_reads_arrays_and_scalars_of_every_protocol_and_numpy(protocol, rename, dtype):
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    record = {"latent": array, "fortran": np.asfortranarray(array), "label": np.int64(7), "text": "é", "none": None}
    data = pickle.dumps(record, protocol)
    # Frames have a length, which the renaming changes.
    renamed = rename(pickletools.optimize(data) if protocol < 4 else without_frames(data))
    assert (rename is as_numpy1) == (b"_core" not in renamed)
    decoded = decode(renamed)
    for name in ("latent", "fortran"):
        np.testing.assert_array_equal(decoded[name], array)
        assert decoded[name].dtype == array.dtype
    assert (decoded["label"], decoded["text"], decoded["none"]) == (7, "é", None)
    assert type(decoded["label"]) is np.int64


def without_frames(data: bytes) -> bytes:
    """`data` without FRAME opcodes, which are optional."""
    frames = [position for opcode, _, position in pickletools.genops(data) if opcode.name == "FRAME"]
    for position in reversed(frames):
        data = data[:position] + data[position + 9 :]
    return data


def test_encode_then_decode_returns_the_record():
    decoded = decode(encode(good_record()))
    np.testing.assert_array_equal(decoded["latent"], good_record()["latent"])
    assert decoded["label"] == 3


class Calls:
    """Its pickle calls `function`."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "function",
    [os.system, eval, exec, __import__, getattr, np.load, np.fromfile, np.memmap, pickle.loads, print, list.append],
)
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_pickle_that_calls_anything_is_refused(function, protocol):
    with pytest.raises(RecordError, match="is refused"):
        decode(pickle.dumps({"latent": Calls(function, "1")}, protocol))


def test_a_refused_pickle_runs_nothing(tmp_path):
    with pytest.raises(RecordError, match="system is refused"):
        decode(pickle.dumps({"latent": Calls(os.system, f"touch {tmp_path}/pwned")}))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize("dtype", [object, "U3", "datetime64[s]", [("a", "f4"), ("b", object)], "V8"])
def test_arrays_that_are_not_plain_numbers_are_refused(protocol, dtype):
    with pytest.raises(RecordError, match="refused"):
        decode(pickle.dumps({"latent": np.zeros(3, dtype)}, protocol))


def test_the_state_of_a_dtype_cannot_be_forged():
    # A float16 whose state claims fields; and one that claims flags of an object array, which numpy accepts.
    with_fields = b"\x80\x02cnumpy\ndtype\nX\x02\x00\x00\x00f2\x85R(K\x03X\x01\x00\x00\x00<NX\x01\x00\x00\x00aNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x3ftb."
    with pytest.raises(RecordError, match="fields is refused"):
        decode(with_fields)
    with_flags = with_fields.replace(b"NX\x01\x00\x00\x00aN", b"NNN").replace(
        b"X\x01\x00\x00\x00<", b"X\x01\x00\x00\x00>"
    )
    with pytest.raises(RecordError, match="must be a dict"):
        decode(with_flags)
    assert np.dtype("f2").isnative and not np.dtype("f2").hasobject


def test_constructors_cannot_be_altered_for_the_next_record():
    alter = b"\x80\x02c_codecs\nencode\n(}X\x09\x00\x00\x00_functionNstb."
    with pytest.raises(RecordError, match="refused"):
        decode(alter)
    assert decode(pickle.dumps(good_record(), 2))["label"] == 3


def test_other_codecs_are_refused():
    with pytest.raises(RecordError, match="codec 'zlib' is refused"):
        decode(b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x04\x00\x00\x00zlib\x86R.")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not a pickle",
        b"\x89PNG\r\n",
        encode(good_record())[:40],
        pickle.dumps([1, 2]),
        pickle.dumps("text"),
        b"\x80\x05Pid\n.",  # a persistent id
        b"\x80\x05\x8e" + (2**62).to_bytes(8, "little") + b".",  # a byte string of 4 EiB
        b"\x80\x02" + b"(" * 100_000 + b"t" * 100_000 + b".",
    ],
    ids=["empty", "text", "png", "truncated", "list", "str", "persistent", "huge", "deep"],
)
def test_foreign_bytes_are_a_record_error_of_one_line(data):
    with pytest.raises(RecordError) as error:
        decode(data)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_an_array_larger_than_its_bytes_is_refused():
    data = pickle.dumps({"latent": np.zeros(4, np.float16)}, 2).replace(b"K\x04\x85", b"J\xff\xff\xff\x7f\x85")
    with pytest.raises(RecordError, match="reshape"):
        decode(data)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": 97}, r"^label: must be in \[0, 92\), got 97$"),
        ({"label": -1}, r"^label: must be in \[0, 92\), got -1$"),
        ({"label": 2**80}, r"^label: must be in \[0, 92\), got 12089"),
        ({"label": True}, "^label: must be an integer, got bool$"),
        ({"label": 3.0}, "^label: must be an integer, got float$"),
        ({"label": np.zeros(1, np.int32)}, "^label: must be an integer, got an array of int32$"),
        ({"latent": [1.0]}, "^latent: must be a float16 or float32 array, got list$"),
        ({"latent": np.zeros((4, 2, 2))}, "^latent: must be a float16 or float32 array, got an array of float64$"),
        ({"latent": np.zeros((4, 2, 3), np.float32)}, r"^latent: must have shape \(4, 2, 2\), got \(4, 2, 3\)$"),
    ],
)
def test_schema_names_field_rule_and_value(changes, message):
    with pytest.raises(RecordError, match=message):
        SCHEMA.check(good_record(**changes))


@pytest.mark.parametrize("byte_order", "<>")
def test_a_schema_may_require_one_dtype(byte_order):
    half, single = (good_record(latent=np.ones((4, 2, 2), byte_order + code)) for code in ("f2", "f4"))
    for record in (half, single):
        SCHEMA.check(record)
    SCHEMA.of_dtype("float16").check(half)
    STD_SCHEMA.of_dtype("float32").check(single | {"latent_std": single["latent"]})
    with pytest.raises(
        RecordError, match="^latent: must be a float32 array as in latent_dtype of the manifest, got an"
    ):
        SCHEMA.of_dtype("float32").check(half)
    with pytest.raises(RecordError, match="^latent_std: must be a float32 array as in latent_dtype of the manifest"):
        STD_SCHEMA.of_dtype("float32").check(single | {"latent_std": half["latent"]})


@pytest.mark.parametrize("label", [0, 91, np.int64(5), np.uint8(5)])
def test_schema_accepts_any_integer_label_and_ignores_other_fields(label):
    SCHEMA.check(good_record(label=label, short_caption="a cat"))


def test_schema_names_a_missing_field():
    with pytest.raises(RecordError, match=r"^latent_std: is missing, the record has \['label', 'latent'\]$"):
        STD_SCHEMA.check(good_record())


@pytest.mark.parametrize(
    ("value", "message"), [(np.nan, "finite, got 1 NaN"), (np.inf, "finite"), (-0.5, "at least 0, got -0.5")]
)
def test_numbers_are_checked_in_records_and_batches(value, message):
    std = np.ones((4, 2, 2), np.float16)
    good, bad = good_record(latent_std=std), good_record(latent_std=std.copy())
    bad["latent_std"][0, 1, 1] = value
    STD_SCHEMA.check_numbers(STD_SCHEMA.stack([good, good]))
    for wrong in (bad, STD_SCHEMA.stack([good, bad])):
        with pytest.raises(RecordError, match=f"^latent_std: must be .*{message}"):
            STD_SCHEMA.check_numbers(wrong)


def test_stack_widens_to_float32_and_int32():
    batch = SCHEMA.stack([good_record(), good_record(label=np.int64(4))])
    assert (batch["latent"].dtype, batch["latent"].shape) == (np.float32, (2, 4, 2, 2))
    assert (batch["label"].dtype, batch["label"].tolist()) == (np.int32, [3, 4])
    np.testing.assert_array_equal(batch["latent"][1], good_record()["latent"])


def captioned_record(**changes):
    return good_record(short_caption="a cat", long_caption="") | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"short_caption": 5}, "^short_caption: must be a string, got int$"),
        ({"short_caption": None}, "^short_caption: must be a string, got NoneType$"),
        ({"long_caption": b"a cat"}, "^long_caption: must be a string, got bytes$"),
        ({"long_caption": np.zeros(2, np.int32)}, "^long_caption: must be a string, got an array of int32$"),
        ({"long_caption": "a \ud800"}, r"^long_caption: must be valid Unicode, got 'a .ud800'$"),
        ({"latent": [1.0]}, "^latent: must be a float16 or float32 array, got list$"),
    ],
)
def test_schema_names_a_caption_that_is_not_a_string(changes, message):
    schema = record_schema((4, 2, 2), CAPTION_FIELDS)
    schema.check(decode(encode(captioned_record())))
    with pytest.raises(RecordError, match=message):
        schema.check(decode(encode(captioned_record(**changes))))


@pytest.mark.parametrize("name", ["short_caption", "long_caption"])
def test_schema_names_a_missing_caption(name):
    record = captioned_record()
    del record[name]
    with pytest.raises(RecordError, match=f"^{name}: is missing, the record has "):
        record_schema((4, 2, 2), CAPTION_FIELDS).check(record)


def test_captions_are_stacked_as_they_are():
    schema = record_schema((4, 2, 2), CAPTION_FIELDS, has_latent_std=True)
    std = np.ones((4, 2, 2), np.float16)
    records = [captioned_record(latent_std=std, short_caption=text) for text in ("é", "", "a" * 1000)]
    batch = schema.stack(records)
    schema.check_numbers(batch)
    assert batch["short_caption"].tolist() == ["é", "", "a" * 1000]
    assert set(batch) == {"latent", "latent_std", "short_caption", "long_caption"}
