"""Where units of work are done: one after the other in this process, or by the workers of Ray, on any number of machines."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

from flowdit.fields import require, require_choice, under

ENGINES = ("loop", "ray")
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass
class RayConfig:
    """Workers of `engine=ray`.

    Attributes:
        address: `host:port` of a Ray cluster, `auto` for the one that this machine belongs to; empty: Ray is started on
            this machine alone, and ended with the command.
        workers: number of workers, each with a VAE of its own; null: one for each GPU, and without GPUs one for each
            machine.
        cpus_per_worker: CPU cores that Ray reserves for a worker.
        gpus_per_worker: GPUs of a worker; null: 1 if the cluster has any.
        tpus_per_worker: TPU chips of a worker: all of its machine, or 0.
    """

    address: str = ""
    workers: int | None = None
    cpus_per_worker: float = 1.0
    gpus_per_worker: float | None = None
    tpus_per_worker: int = 0

    def check(self) -> None:
        """Raise `FieldError` naming the first field that breaks a rule."""
        require("workers", self.workers, self.workers is None or self.workers >= 1, "must be at least 1")
        # Ray's own rule: a fraction is a part of one device, and more than one are whole ones.
        rule = "must be a fraction of 1 or a whole number"
        amounts = {"cpus_per_worker": self.cpus_per_worker, "gpus_per_worker": self.gpus_per_worker}
        for name, amount in amounts.items():
            require(name, amount, amount is None or 0 <= amount < 1 or amount == int(amount) >= 1, rule)
        require("tpus_per_worker", self.tpus_per_worker, self.tpus_per_worker >= 0, "must be at least 0")


@runtime_checkable
class Engine(Protocol):
    """Does units of work."""

    def run(
        self, make_worker: Callable[[], Callable[[Item], Result]], items: Sequence[Item], *, has_network: bool = True
    ) -> Iterator[Result]:
        """Yield `make_worker()(item)` for every item as soon as it is done, in any order.

        Workers that run no network (`has_network`) get no accelerator, so there may be more of them.

        All of them can be pickled. A worker does many items, so it loads networks when it is made. An item may be begun
        several times, so its work must give the same result again, and must not be harmed by an earlier try that was
        killed or is still running. A `ValueError` or `OSError` of a worker is raised here.
        """
        ...


class _Loop:
    def run(
        self, make_worker: Callable[[], Callable[[Item], Result]], items: Sequence[Item], *, has_network: bool = True
    ) -> Iterator[Result]:
        if items:
            yield from map(make_worker(), items)


LOOP: Engine = _Loop()


def check_engine(engine: str, ray: RayConfig) -> None:
    """Raise `FieldError` for invalid settings `engine` and `ray.*`."""
    require_choice("engine", engine, ENGINES)
    is_used = engine == "ray" or not ray.address
    require("ray.address", ray.address, is_used, "must be empty without engine=ray")
    with under("ray."):
        ray.check()


@contextlib.contextmanager
def open_engine(engine: str, ray: RayConfig) -> Iterator[Engine]:
    """Start the engine, and end it with its workers.

    Raises `ValueError` with one line if Ray is not installed, or its cluster cannot be reached or is too small.
    """
    if engine == "loop":
        yield LOOP
        return
    try:
        from flowdit.data.preparation import ray_engine
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in ("ray", "pyarrow", "pandas"):
            raise
        raise ValueError("engine: ray is not installed: pip install 'flowdit[ray]', or engine=loop") from None
    with ray_engine.open_ray(ray) as opened:
        yield opened
