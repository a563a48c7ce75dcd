"""The fast path of decoding: always the result of the slow path, or its refusal."""

import os
import pickle
import re
import struct

import numpy as np
import pytest
from test_hostile_records import HOSTILE, damaged
from test_records import Calls, as_numpy1, without_frames

from flowdit.data import skeletons
from flowdit.data.records import RecordError, decode, encode
from flowdit.data.skeletons import SkeletonDecoder, skeleton_of

VALUES = np.random.default_rng(0).standard_normal(16)


def latent(dtype="float16", shape=(4, 2, 2)):
    return VALUES.reshape(shape).astype(dtype)


RECORDS = {
    "class": {"latent": latent(), "label": 3},
    "wide label": {"latent": latent("float32"), "label": 300},
    "numpy label": {"latent": latent(), "latent_std": latent(), "label": np.int64(7)},
    "big-endian": {"latent": latent(">f4"), "label": 3},
    "captions": {"latent": latent(), "short_caption": "a cät", "long_caption": "a cat " * 60},
    "no long caption": {"latent": latent("float32"), "short_caption": "a cat", "long_caption": ""},
    "cached text": {"key": b"12345678", "truncated": False, "features": latent("uint16", (2, 8))},
    "other fields": {"latent": latent(), "label": -1, "seen": 70_000, "score": 0.25, "source": None, "half": VALUES[0]},
}


def renamed_frames(data: bytes) -> bytes:
    """`data` in the names of numpy 1, in one frame if the protocol has frames, as for small arrays."""
    renamed = as_numpy1(without_frames(data))
    header = b"\x95" + struct.pack("<Q", len(renamed) - 2) if data[1] >= 4 else b""
    return renamed[:2] + header + renamed[2:]


WRITERS = {
    f"protocol {protocol}, numpy {numpy}": lambda record, protocol=protocol, rename=rename: rename(
        pickle.dumps(record, protocol)
    )
    for protocol in (2, 3, 4, 5)
    for numpy, rename in ((1, renamed_frames), (2, bytes))
}


def comparable(record: dict) -> list:
    """Everything about a record except whether its arrays can be written to."""
    return [
        (name, str(value.dtype), value.shape, value.tobytes())
        if isinstance(value, np.ndarray)
        else (name, type(value), re.sub("0x[0-9a-f]+", "", repr(value)))  # without the addresses of objects
        for name, value in record.items()
    ]


def outcome(function, data: bytes):
    try:
        return comparable(function(data))
    except RecordError as error:
        return str(error)


def other_values(record: dict, rng: np.random.Generator) -> dict:
    """A record of the same types and shapes."""
    changed = dict(record)
    for name, value in record.items():
        if isinstance(value, np.ndarray | np.generic) and value.dtype.kind == "f":
            changed[name] = np.asarray(rng.standard_normal(value.shape)).astype(value.dtype)[()]
        elif isinstance(value, np.ndarray | np.generic):
            changed[name] = np.asarray(rng.integers(0, 100, value.shape)).astype(value.dtype)[()]
        elif isinstance(value, str):
            changed[name] = value.replace("a", "é") + "x" * int(rng.integers(3))
    return changed


@pytest.mark.parametrize("writer", [name for name in WRITERS if "protocol 2" not in name])
@pytest.mark.parametrize("kind", RECORDS)
def test_records_of_one_kind_are_read_by_one_skeleton(monkeypatch, kind, writer):
    decoder, write = SkeletonDecoder(), WRITERS[writer]
    rng = np.random.default_rng(0)
    decoder.decode(write(RECORDS[kind]))
    records = [other_values(RECORDS[kind], rng) for _ in range(5)]
    data = [write(record) for record in records]
    expected = [outcome(decode, one) for one in data]
    monkeypatch.delattr(skeletons, "decode")  # the slow path
    assert [outcome(decoder.decode, one) for one in data] == expected
    assert expected == [comparable(record) for record in records]


@pytest.mark.parametrize("shape", [(16, 32, 64), (16, 32, 32)])
@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_large_arrays_which_pickle_writes_outside_of_frames_are_read_by_a_skeleton(monkeypatch, shape, protocol):
    decoder, array = SkeletonDecoder(), np.zeros(shape, np.float32)
    decoder.decode(pickle.dumps({"latent": array, "short_caption": "a cat", "label": 2}, protocol))
    monkeypatch.delattr(skeletons, "decode")
    decoded = decoder.decode(pickle.dumps({"latent": array + 1, "short_caption": "two cats", "label": 3}, protocol))
    assert decoded["latent"].min() == 1 and (decoded["short_caption"], decoded["label"]) == ("two cats", 3)


def edited(rng: np.random.Generator, data: bytes) -> bytes:
    """`data` with a byte, a bit or a size changed, cut, repeated or damaged like a hostile record."""
    position = int(rng.integers(len(data)))
    before, after = data[:position], data[position + 1 :]
    byte = data[position]
    count = int(rng.integers(1, 9))
    changes = [
        lambda: before + rng.bytes(1) + after,
        lambda: before + bytes([byte ^ (1 << (count - 1))]) + after,
        lambda: before + bytes([(byte + 1) % 256]) + after,
        lambda: before + bytes([(byte - 1) % 256]) + after,
        lambda: before + data[position + count :],
        lambda: before + data[position : position + count] + data[position:],
        lambda: before,
        lambda: data + rng.bytes(1),
        lambda: damaged(rng, data),
    ]
    return changes[rng.integers(len(changes))]()


@pytest.mark.parametrize("count", [50, pytest.param(3000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("kind", RECORDS)
def test_damaged_records_have_the_result_of_the_slow_path(kind, writer, count):
    rng, data = np.random.default_rng(0), WRITERS[writer](RECORDS[kind])
    decoder = SkeletonDecoder()
    decoder.decode(data)
    answers = []
    for _ in range(count):
        changed = edited(rng, data)
        expected = outcome(decode, changed)
        assert outcome(decoder.decode, changed) == expected, changed
        assert outcome(decoder.decode, changed) == expected, changed  # now it may have a skeleton of its own
        answers.append(type(expected))
    assert answers.count(str) > count / 10 and answers.count(list) > count / 20


def test_every_byte_outside_of_the_values_must_be_equal():
    data = encode(RECORDS["no long caption"])
    skeleton = skeleton_of(data, decode(data))
    for position in range(len(data)):
        changed = bytearray(data)
        for change in (1, 128, 255):
            changed[position] = data[position] ^ change
            fast, slow = skeleton.read(bytes(changed)), outcome(decode, bytes(changed))
            assert fast is None or comparable(fast) == slow
    names = [name for name in RECORDS["no long caption"] for name in (name.encode(), name.upper().encode())]
    assert skeleton.read(data.replace(names[0], names[1])) is None


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_records_are_refused_after_good_ones(name):
    decoder = SkeletonDecoder()
    for record in RECORDS.values():
        decoder.decode(encode(record))
    assert outcome(decoder.decode, HOSTILE[name][0]) == outcome(decode, HOSTILE[name][0])


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_code_in_a_record_of_a_known_length_is_refused(tmp_path, protocol):
    call = {"latent": Calls(os.system, f"touch {tmp_path}/pwned"), "label": 3}
    hostile = pickle.dumps(call, protocol)
    decoder = SkeletonDecoder()
    for count in range(64):  # one has the length of the hostile record, which may be padded
        decoder.decode(pickle.dumps({"latent": np.zeros(count + 1, np.uint8), "label": 3}, protocol))
    for padded in (hostile, *(hostile + bytes(count) for count in range(200))):
        with pytest.raises(RecordError, match="system is refused"):
            decoder.decode(padded)
    assert not list(tmp_path.iterdir())


def test_a_value_that_is_used_twice_has_no_skeleton():
    """A pickle that pickle would not write: the shape of the array is the label."""
    shared = b"\x80\x05}(\x8c\x05labelK\x04\x94\x8c\x06latent" + b"".join(
        [
            b"\x8c\x13numpy._core.numeric\x8c\x0b_frombuffer\x93(\x96\x04\0\0\0\0\0\0\0\1\2\3\4",
            b"\x8c\x05numpy\x8c\x05dtype\x93\x8c\x02u1\x89\x88\x87Rh\x00\x85\x8c\x01CtRu.",
        ]
    )
    record = decode(shared)
    assert record["label"] == 4 and record["latent"].shape == (4,)
    assert skeleton_of(shared, record) is None
    decoder = SkeletonDecoder()
    decoder.decode(shared)
    with pytest.raises(RecordError, match="cannot reshape"):
        decoder.decode(shared.replace(b"K\x04", b"K\x05"))


@pytest.mark.parametrize(
    "record",
    [
        {"numpy._core.numeric": 3},
        {"latent": np.asfortranarray(np.zeros((2, 3)))},
        {"latent": np.zeros((0, 3))},
        {"label": 2**40},
        {"sizes": [1, 2]},
        {"name" * 2000: 3},
        {str(i): i for i in range(40)},
    ],
)
def test_other_records_take_the_slow_path(record):
    data = encode(record)
    assert skeleton_of(data, decode(data)) is None
    assert outcome(SkeletonDecoder().decode, data) == outcome(decode, data)


def test_the_number_of_skeletons_is_limited(monkeypatch):
    monkeypatch.setattr(skeletons, "MAX_SKELETONS", 4)
    monkeypatch.setattr(skeletons, "MAX_ATTEMPTS", 6)
    decoder = SkeletonDecoder()
    made = []
    monkeypatch.setattr(skeletons, "skeleton_of", lambda *args: made.append(skeleton_of(*args)) or made[-1])
    for size in range(1, 9):
        assert len(decoder.decode(encode({"latent": np.zeros(size)}))["latent"]) == size
    assert len(made) == 4
    made.clear()
    decoder = SkeletonDecoder()
    for size in range(1, 9):
        decoder.decode(pickle.dumps({"latent": np.zeros(size)}, 2))
    assert made == [None] * 6
