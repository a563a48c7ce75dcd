"""What processes tell each other."""

import json
import socket

from runs import finish, start

from flowdit.processes import gather

EXCHANGE = """
import json, sys
from flowdit.processes import gather, join_processes
from flowdit.sharding import MeshConfig

address, count, index = json.loads(sys.argv[1])
join_processes(MeshConfig(coordinator=address, num_processes=count, process_id=index))
values = [None, {"name": "\\u00e9" * 3000}, [1.5, "short"]]
print(gather(values[index]) == values, gather(index), flush=True)
"""


def test_gather_with_one_process():
    assert gather({"a": 1}) == [{"a": 1}]


def test_values_of_different_sizes_reach_all_processes_in_order():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = [start("-c", EXCHANGE, json.dumps([address, 3, i])) for i in range(3)]
    try:
        for process in processes:
            finished = finish(process)
            assert finished.status == 0, finished.err
            assert finished.out.splitlines()[-1] == "True [0, 1, 2]"
    finally:
        for process in processes:
            process.kill()
