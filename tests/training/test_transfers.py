"""Copies from the devices in the training loop: the figures of a window, once per log line."""

import traceback

import jax
import numpy as np
import pytest
from jax._src.array import ArrayImpl
from runs import LATENT_SHAPE, metrics, train_here, train_text_here

from flowdit.tracking import Tracker


@pytest.fixture
def events(monkeypatch) -> list[str]:
    """Log entries and all copies of device arrays to the host, in order.

    On the CPU JAX's transfer guard does not detect these copies.
    """
    events: list[str] = []
    inside: list[str] = []

    def record(owner: object, name: str, seen=lambda *_: True) -> None:
        original = getattr(owner, name)

        def recorded(*args, **kwargs):
            if seen(*args) and not inside:  # not those within another one
                events.append(f"{name} at {traceback.extract_stack()[-2].line}")
            inside.append(name)
            try:
                return original(*args, **kwargs)
            finally:
                inside.pop()

        monkeypatch.setattr(owner, name, recorded)

    is_array = lambda x, *_: isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)
    record(jax, "device_get")
    for name in ("asarray", "array", "copy"):
        record(np, name, is_array)
    for name in ("__float__", "__int__", "__bool__", "__index__", "__array__", "__format__", "item", "tolist"):
        record(ArrayImpl, name)
    log = Tracker.log

    def logged(self, step, values):
        if "train/loss" in values:
            events.append("log")
        log(self, step, values)

    monkeypatch.setattr(Tracker, "log", logged)
    return events


@pytest.mark.parametrize("train", [train_here, train_text_here])
def test_one_copy_with_every_log_line_and_none_between(tiny_data, tmp_path, events, train):
    run = tmp_path / "run"
    finished = train(tiny_data, run, "train.log_every=3", "train.save_every=0")
    assert (finished.status, finished.err) == (0, "")
    assert sorted(metrics(run, "train/loss")) == [1, 3, 6]
    first, last = events.index("log"), len(events) - 1 - events[::-1].index("log")
    get = "device_get at window = jax.device_get(self._window)"
    assert events[first + 1 : last + 1] == [get, "log", get, "log"]
    assert events[first - 1] == get


def test_the_counter_detects_hidden_copies(events):
    array = jax.numpy.ones(LATENT_SHAPE).sum()
    for convert in (float, int, bool, np.asarray, np.array, "{:.1f}".format, lambda x: x.item(), jax.device_get):
        convert(array)
    assert len(events) == 8
