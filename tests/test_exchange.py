"""What processes tell each other, and how they share work."""

import json

import jax
from runs import finish, free_address, start

from flowdit.processes import gather, own_share

EXCHANGE = """
import json, sys
import jax
from flowdit.processes import gather, require_equal, totals

address, count, index = json.loads(sys.argv[1])
jax.distributed.initialize(address, count, index)
values = [None, {"name": "\\u00e9" * 3000}, [1.5, "short"]]
print(gather(values[index]) == values, gather(index), totals({"all": 1, f"of {index}": index}), flush=True)
require_equal({"same": "x"})
try:
    require_equal({"same": "x", "seed": 0 if index < 2 else 7})
except ValueError as problem:
    print(problem, flush=True)
"""


def test_gather_with_one_process():
    assert gather({"a": 1}) == [{"a": 1}]


def test_values_are_gathered_summed_and_compared():
    address = free_address()
    processes = [start("-c", EXCHANGE, json.dumps([address, 3, i])) for i in range(3)]
    try:
        for process in processes:
            finished = finish(process)
            assert finished.status == 0, finished.err
            exchanged, refused = finished.out.splitlines()[-2:]
            assert exchanged == "True [0, 1, 2] {'all': 3, 'of 0': 0, 'of 1': 1, 'of 2': 2}"
            assert refused == "seed: must be equal in all processes, got 0 in process 0 and 7 in process 2"
    finally:
        for process in processes:
            process.kill()


def test_shares_are_balanced_and_cover_everything(monkeypatch):
    sizes = {"a": 5, "b": 4, "c": 3, "d": 3, "e": 3, "empty": 0}
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    shares = []
    for i in range(3):
        monkeypatch.setattr(jax, "process_index", lambda i=i: i)
        shares.append(own_share(sizes))
    assert sorted(name for share in shares for name in share) == sorted(sizes)
    assert sorted(sum(sizes[name] for name in share) for share in shares) == [5, 6, 7]
