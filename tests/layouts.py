"""Runs on one or several processes that print the records of every batch, and may be stopped at a step."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
from runs import FAST, NUM_STEPS, Finished, finish, free_address, start

from flowdit.data.loader import open_source
from flowdit.data.manifest import Manifest
from flowdit.data.schema import LabelField, record_schema

RECORDING = """
import hashlib, json, os, sys, time
import numpy as np
from flowdit import train
from flowdit.training import loop, setup

tasks, stop, is_stopped = json.loads(sys.argv[1])

def start_recording(config, found):
    run = setup.start_run(config, found)

    def train_step(state, batch):
        step, rows = int(state.step) + 1, {}
        for shard in batch["latent"].addressable_shards:
            for i, latent in enumerate(np.asarray(shard.data), shard.index[0].start or 0):
                rows[i] = hashlib.sha256(latent.tobytes()).hexdigest()
        print("rows", json.dumps([config.train.checkpoint_dir, step, rows]), flush=True)
        if step == stop[0] and is_stopped:
            os.kill(os.getpid(), stop[1])
        if 0 < stop[0] <= step:
            time.sleep(0.5)  # the steps are faster than the message to the others
        return run.train_step(state, batch)

    return run._replace(train_step=train_step)

loop.start_run = start_recording
for stage, *arguments in tasks:
    sys.argv = [stage, *arguments]
    getattr(train, stage)()
"""


class Layout(NamedTuple):
    """A number of processes, devices of each, and settings such as the mesh."""

    processes: int
    devices: int
    settings: tuple[str, ...] = ()


def task(stage: int, data: Path, run: Path, *settings: str) -> tuple[str, ...]:
    """A training command for `train_on`."""
    experiment = {1: "tiny", 2: "tiny_text"}[stage]
    return (
        f"stage{stage}",
        f"experiment={experiment}",
        *FAST,
        f"data.path={data}",
        f"train.checkpoint_dir={run}",
        *settings,
    )


def train_on(
    layout: Layout,
    *tasks: tuple[str, ...],
    stop: tuple[int, int] = (0, 0),
    stopped: int = 0,
) -> list[Finished]:
    """Run the tasks one after another; process `stopped` sends itself the signal `stop[1]` at the step `stop[0]`."""
    address, processes = free_address(), []
    for i in range(layout.processes):
        cluster = (f"mesh.coordinator={address}", f"mesh.num_processes={layout.processes}", f"mesh.process_id={i}")
        more = (*layout.settings, *(cluster if layout.processes > 1 else ()))
        given = [[(*one, *more) for one in tasks], stop, i == stopped]
        processes.append(start("-c", RECORDING, json.dumps(given), devices=layout.devices))
    try:
        return [finish(process) for process in processes]
    finally:
        for process in processes:
            process.kill()


def recorded(data: Path, finished: Sequence[Finished], run: Path) -> dict[int, list[int]]:
    """By step, the numbers of the records in the rows of the global batch, put together from all processes."""
    numbers = _numbers_by_latent(data)
    rows: dict[int, dict[int, int]] = {}
    for process in finished:
        for line in process.out.splitlines():
            if not line.startswith("rows "):
                continue
            folder, step, found = json.loads(line.removeprefix("rows "))
            for row, digest in found.items() if folder == str(run) else ():
                # Devices that differ in the tensor axis only have the same rows.
                assert rows.setdefault(step, {}).setdefault(int(row), numbers[digest]) == numbers[digest]
    return {step: [found[row] for row in range(len(found))] for step, found in rows.items()}


def _numbers_by_latent(data: Path) -> dict[str, int]:
    manifest = Manifest.read(data)
    schema = record_schema(manifest.latent_shape, {"label": LabelField(manifest.num_classes)})
    source = open_source(data, manifest, schema=schema)
    batch: dict[str, Any] = source.read_batch(range(len(source)))
    digests = [hashlib.sha256(latent.astype(np.float32).tobytes()).hexdigest() for latent in batch["latent"]]
    assert len(set(digests)) == len(source)
    return {digest: number for number, digest in enumerate(digests)}


def _order(batch_size: int) -> dict[int, list[int]]:
    numbers = grain.MapDataset.range(NUM_RECORDS).seed(0).shuffle().repeat()
    order = [np.asarray(numbers[i]).item() for i in range(NUM_STEPS * batch_size)]
    return {step + 1: order[step * batch_size :][:batch_size] for step in range(NUM_STEPS)}


NUM_RECORDS = 48
ORDER = {1: _order(8), 2: _order(16)}
"""By stage and step, the records that the tiny presets see of `write_tiny_data`'s: one epoch in stage 1, two in 2."""


def assert_every_record_once(rows: dict[int, list[int]]) -> None:
    """Every epoch must have every record once."""
    seen = [number for step in sorted(rows) for number in rows[step]]
    for first in range(0, len(seen), NUM_RECORDS):
        assert sorted(seen[first : first + NUM_RECORDS]) == list(range(NUM_RECORDS))
