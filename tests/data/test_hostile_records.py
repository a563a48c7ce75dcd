"""Records made to take memory or time: whatever a few bytes declare, to read them costs next to nothing."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from flowdit.data import records
from flowdit.data.opcodes import MAX_OPCODES, MAX_SHARED_TUPLES
from flowdit.data.records import RecordError, decode, encode

SECONDS, MEGABYTES = 2.0, 200
"""Limits of CPU time per record and of additional memory. Unchecked, most of these records need gigabytes or never finish."""

DECODE = """
import json, resource, sys, time
from flowdit.data.records import RecordError, decode

megabytes = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() >> 20
limit = megabytes + int(sys.argv[2]) << 20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for line in open(sys.argv[1]):
    start, answer = time.process_time(), "a record"
    try:
        decode(bytes.fromhex(line))
    except RecordError as error:
        answer = str(error)
    print(json.dumps([answer, time.process_time() - start]), flush=True)
"""


def decode_apart(payloads: list[bytes], folder: Path) -> list[tuple[str, float]]:
    """The result of each record and its seconds, in a process with limited memory."""
    path = folder / "payloads"
    path.write_text("".join(payload.hex() + "\n" for payload in payloads))
    command = [sys.executable, "-c", DECODE, str(path), str(MEGABYTES)]
    root = Path(records.__file__).parents[2]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=root, check=False)
    answers = [json.loads(line) for line in finished.stdout.splitlines()]
    assert len(answers) == len(payloads), (len(answers), finished.returncode, finished.stderr[-2000:])
    return answers


def number(value: int, width: int) -> bytes:
    return value.to_bytes(width, "little")


def text(value: str) -> bytes:
    return b"\x8c" + number(len(value), 1) + value.encode()


def call(module: str, name: str, *arguments: bytes) -> bytes:
    return text(module) + text(name) + b"\x93(" + b"".join(arguments) + b"tR"


def field(value: bytes) -> bytes:
    """A record with only this value."""
    return b"\x80\x05}" + text("x") + value + b"s."


def key(value: bytes) -> bytes:
    """A record with only this key."""
    return b"\x80\x05}" + value + b"Ns."


def doubled(levels: int, between: bytes = b"\x94") -> bytes:
    """A tuple of 2**levels leaves in a few bytes per level. `between` stores each tuple in the memo before it is doubled."""
    entries = between.count(b"\x94")
    return b")" + b"".join(between + b"h" + number(entries * (i + 1) - 1, 1) + b"\x86" for i in range(levels))


def doubled_lists(levels: int) -> bytes:
    """A list of 2**levels numbers in the same way; the outermost is the first entry in the memo."""
    return b"]\x94" * (levels + 1) + b"K\x00a" + b"".join(b"ah" + number(i, 1) + b"a" for i in range(levels, 0, -1))


def equal_hashes(count: int) -> bytes:
    keys = (b"\x8a\x0e" + number((2**61 - 1) * (2**40 + i), 14) + b"N" for i in range(count))
    return b"\x80\x05}(" + b"".join(keys) + b"u."


FLOAT = call("numpy", "dtype", text("f4"), b"\x89", b"\x88")
ARRAY = call("numpy._core.numeric", "_frombuffer", b"\x96" + number(4, 8) + bytes(4), FLOAT, b"K\x01\x85", text("C"))
LONG_TEXT = b"X" + number(1_000_000, 4) + b"a" * 1_000_000
COPY = b"c_codecs\nencode\nh\x00" + text("latin1") + b"\x86R"
SHARED = f"more than {MAX_SHARED_TUPLES} uses of tuples"
LONG = f"more than {MAX_OPCODES} opcodes"

HOSTILE = {
    "memo index": (
        b"\x80\x02}X\x06\x00\x00\x00latentK\x01r" + number(2**28, 4) + b"s.",
        "a memo with gaps is refused",
    ),
    "memo index in a byte": (b"\x80\x02}X\x06\x00\x00\x00latentK\x01q\x02s.", "a memo with gaps is refused"),
    "memo index as text": (b"\x80\x02}X\x01\x00\x00\x00xK\x01p268435456\ns.", "opcode b'p' is refused"),
    "length of bytes": (field(b"\x8e" + number(2**33, 8)), "cut short"),
    "length of a bytearray": (field(b"\x96" + number(2**33, 8)), "cut short"),
    "length of a text": (field(b"\x8d" + number(2**33, 8)), "cut short"),
    "length of an integer": (field(b"\x8b" + number(2**31 - 1, 4)), "opcode b'\\x8b' is refused"),
    "length of a frame": (b"\x80\x05\x95" + number(2**33, 8) + b"}.", "truncated"),
    "many digits": (field(b"I" + b"1" * 1_000_000 + b"\n"), "opcode b'I' is refused"),
    "many opcodes": (field(b"(" + b"N" * 1_000_000 + b"t"), LONG),
    "key of tuples": (key(doubled(60)), SHARED),
    "key of tuples, kept twice": (key(doubled(60, b"\x94\x94")), SHARED),
    "key of tuples, kept after a frame": (key(doubled(60, b"\x95" + bytes(8) + b"\x94")), SHARED),
    "key of tuples, kept after a header": (key(doubled(60, b"\x80\x05\x94")), SHARED),
    "key of tuples, kept after nothing was built": (key(doubled(60, b"Nb\x94")), SHARED),
    "key of tuples, kept after no items": (key(doubled(60, b"(u\x94")), SHARED),
    "key of tuples, kept by index": (key(b")" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(60))), SHARED),
    "key of tuples without a memo": (key(b")" + b"2\x86" * 60), "opcode b'2' is refused"),
    "key that is very deep": (key(b")" + b"\x85" * 2_000_000), LONG),
    "key that is as deep as can be": (key(b")" + b"\x85" * (MAX_OPCODES - 6)), "a field whose name is of type tuple"),
    "name of tuples": (key(LONG_TEXT + doubled(8)[1:]), "a field whose name is of type tuple"),
    "set of tuples": (field(b"(" + doubled(8) + b"\x91"), "opcode b'\\x91' is refused"),
    "keys of equal hashes": (equal_hashes(60_000), LONG),
    "keys of equal hashes, as many as can be": (
        equal_hashes(MAX_OPCODES // 2 - 3),
        "a field whose name is of type int",
    ),
    "codec of tuples": (field(call("_codecs", "encode", text("a"), doubled(40))), SHARED),
    "codec of lists": (field(call("_codecs", "encode", text("a"), doubled_lists(40))), "codec of type list is refused"),
    "dtype of lists": (field(call("numpy", "dtype", doubled_lists(40))), "dtype of type list is refused"),
    "text copied": (field(b"(" + LONG_TEXT + b"\x94" + COPY * 900 + b"t"), "more bytes than the record has"),
    "item of an array": (field(ARRAY + doubled_lists(26) + b"K\x00s"), "does not support item assignment"),
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> dict[str, tuple[str, float]]:
    found = decode_apart([payload for payload, _ in HOSTILE.values()], tmp_path_factory.mktemp("hostile"))
    return dict(zip(HOSTILE, found, strict=True))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_record_that_declares_much_costs_little(answers, name):
    (answer, seconds), expected = answers[name], HOSTILE[name][1]
    assert answer.startswith("not a readable record: ") and expected in answer
    assert "\n" not in answer and len(answer) < 300
    assert seconds < SECONDS


def damaged(rng: np.random.Generator, data: bytes) -> bytes:
    """`data` with a few bytes replaced or inserted, most of them opcodes or sizes."""
    edited = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        position = rng.integers(len(edited))
        opcode = rng.choice(
            list(b"().NKMJXCBGhjqrRbtu}]aes\x80\x85\x86\x87\x88\x89\x8a\x8b\x8c\x8d\x8e\x93\x94\x95\x96")
        )
        edited[position : position + rng.integers(2)] = bytes([opcode]) + rng.bytes(rng.integers(9))
    return bytes(edited)


def test_damaged_records_cost_little(tmp_path):
    rng = np.random.default_rng(0)
    record = {"latent": np.ones((1, 2, 2), np.float16), "label": 3, "short_caption": "a", "key": b"12345678"}
    whole = [pickle.dumps(record, protocol) for protocol in (2, 3, 4, 5)]
    payloads = [damaged(rng, data) for data in whole * 1000]
    for answer, seconds in decode_apart(payloads, tmp_path):
        assert "MemoryError" not in answer and seconds < SECONDS


def test_tuples_may_be_shared_in_moderation():
    size = (64, 64)
    decoded = decode(encode({"size": size, "crop": size, "sizes": [size] * 5, "list": list(range(2000))}))
    assert decoded["crop"] == size and decoded["sizes"] == [size] * 5
    with pytest.raises(RecordError, match=SHARED):
        decode(encode({"sizes": [size] * 11}))
