"""Units of work done by the actors of Ray Data, on this machine or on a cluster. The only module that imports Ray."""

import contextlib
import logging
import os
import signal
import socket
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

# Ray reads them when it is imported, and its processes inherit them.
for _name, _value in {
    "RAY_USAGE_STATS_ENABLED": "0",  # no reports to its makers
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # no lines of its parts in C++
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".*",  # no paragraph for each worker that was lost
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}.items():
    os.environ.setdefault(_name, _value)

import ray
import ray.data
import ray.exceptions
from ray.cloudpickle import dumps, loads  # type: ignore[attr-defined]
from ray.experimental import internal_kv

from flowdit.data.preparation.engines import Item, RayConfig, Result
from flowdit.errors import first_line
from flowdit.fields import FieldError, require, shown

logger = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 256 * 2**20
"""Of a Ray started here: items and results are small. Ray's default is 30 % of the memory."""
CONNECT_SECONDS = 5.0
MAX_LOSSES = 10
"""Workers that may be lost at one item: it may be the cause, and Ray itself would try for ever."""


@contextlib.contextmanager
def open_ray(config: RayConfig) -> Iterator["RayEngine"]:
    """Start or join Ray, and leave it. A program that has joined a cluster already keeps its connection."""
    own = not ray.is_initialized()
    if own:
        _start(config)
    try:
        yield RayEngine(config)
    finally:
        if own:
            ray.shutdown()


def _start(config: RayConfig) -> None:
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if config.address:
        _require_reachable(config.address)
        options["address"] = config.address
    else:
        options |= {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with _without_stderr():
            ray.init(**options)
    except (ConnectionError, RuntimeError, TimeoutError) as error:
        raise FieldError("ray.address", f"cannot join {config.address or 'Ray'}: {first_line(error)}") from None
    if in_main_thread:
        signal.signal(signal.SIGTERM, handler)  # Ray sets one of its own


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    """Hide what C++ code writes, as the log level that is set above is itself a line of the log."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _require_reachable(address: str) -> None:
    """Raise `FieldError` if nothing answers at `address`: Ray itself would try for minutes."""
    if address == "auto":
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    require("ray.address", address, bool(host) and port.isdigit(), "must be host:port, ray://host:port or auto")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise FieldError("ray.address", f"no Ray cluster answers at {address}: {error}") from None


class RayEngine:
    """Runs items on actors: one that dies is replaced and its item done again, on another machine if need be."""

    def __init__(self, config: RayConfig):
        total = ray.cluster_resources()
        gpus = config.gpus_per_worker
        self._gpus = (1.0 if total.get("GPU") else 0.0) if gpus is None else gpus
        needed = {"CPU": config.cpus_per_worker, "GPU": self._gpus, "TPU": config.tpus_per_worker}
        most = min((int(total.get(name, 0) // amount) for name, amount in needed.items() if amount), default=1)
        machines = sum(node["Alive"] for node in ray.nodes())
        wanted = config.workers or (int(total["GPU"] // self._gpus) if self._gpus else machines)
        self._config = config
        has_devices = self._gpus or config.tpus_per_worker
        # Without an accelerator to wait for, one for each core; where the networks run on them too, as many as asked for.
        self._cores = int(total["CPU"] // max(config.cpus_per_worker, 1)) if has_devices else 0
        self._workers = wanted if config.workers else max(1, min(wanted, most))
        if self._workers > most:
            has = ", ".join(f"{total.get(name, 0):g} {name}" for name, amount in needed.items() if amount)
            asked = ", ".join(f"{amount:g} {name}" for name, amount in needed.items() if amount)
            raise FieldError("ray.workers", f"{self._workers} with {asked} each: Ray has {has}")
        machines_text = "1 machine" if machines == 1 else f"{machines} machines"
        logger.info("ray: %d worker%s, %s", self._workers, "" if self._workers == 1 else "s", machines_text)

    def run(
        self, make_worker: Callable[[], Callable[[Item], Result]], items: Sequence[Item], *, has_network: bool = True
    ) -> Iterator[Result]:
        """See `Engine.run`."""
        if not items:
            return
        _quiet()
        name = uuid.uuid4().hex
        rows = [{"item": dumps(item), "key": f"flowdit/{name}/{i}"} for i, item in enumerate(items)]
        config = self._config
        workers = self._workers if has_network else max(self._workers, self._cores)
        worker: Any = _Worker  # a class, of which Ray makes actors
        results = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            worker,
            fn_constructor_args=(dumps(make_worker), os.getcwd()),
            compute=ray.data.ActorPoolStrategy(size=min(workers, len(rows)), max_tasks_in_flight_per_actor=1),
            num_cpus=config.cpus_per_worker,
            num_gpus=self._gpus if has_network else 0,
            resources={"TPU": config.tpus_per_worker} if config.tpus_per_worker and has_network else None,
        )
        for row in _user_errors(results.iter_rows()):
            answer = _Answer(*loads(row["answer"]))  # of our own worker
            if answer.is_first_of_replacement:
                logger.warning(
                    "ray: a worker was lost (killed, out of memory, or with its machine): its unit is done again"
                )
            if answer.error is not None:
                raise answer.error
            yield answer.result


def _quiet() -> None:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def _user_errors(rows: Iterable[Any]) -> Iterator[Any]:
    """`rows`, with Ray's own failures as `ValueError` with one line."""
    try:
        yield from rows
    except ray.exceptions.RayTaskError:
        raise  # a fault of our code
    except ray.exceptions.RayError as error:
        raise ValueError(f"ray: {first_line(error)}") from None


def _enter(folder: str) -> None:
    """Work in the folder of the command, so that relative paths mean the same. Raises `ValueError` if it is not there."""
    try:
        os.chdir(folder)
    except OSError as error:
        raise ValueError(f"ray: {socket.gethostname()} must see the same folders as here, {folder}: {error}") from None


class _Answer(NamedTuple):
    error: Exception | None
    result: Any
    is_first_of_replacement: bool


class _Worker:
    """An actor: makes the worker with its first item, so that errors of both take the same way."""

    def __init__(self, make_worker: bytes, folder: str):
        self._make_worker = make_worker
        self._folder = folder
        self._work: Any = None
        context: Any = ray.get_runtime_context()
        self._is_replacement = self._is_news = bool(context.was_current_actor_reconstructed)

    def __call__(self, row: dict[str, Any]) -> dict[str, bytes]:
        error, result = None, None
        try:
            if self._work is None:
                _enter(self._folder)
                self._work = _loads(self._make_worker)()
            item = _loads(row["item"])
            if self._is_replacement:
                _check_losses(row["key"], item)
            result = self._work(item)
        except (ValueError, OSError) as problem:
            error = problem
        answer = _Answer(error, result, is_first_of_replacement=self._is_news)
        self._is_news = False
        return {"answer": dumps(tuple(answer))}


def _loads(pickled: bytes) -> Any:
    """What the command has pickled. Raises `ValueError` if it is of a package that this machine lacks."""
    try:
        return loads(pickled)
    except ImportError as error:
        raise ValueError(f"ray: {socket.gethostname()} must have the same packages as here: {error}") from None


def _check_losses(key: str, item: Any) -> None:
    """Raise `ValueError` if workers were lost at this item time and again. Called by those that replace a lost one."""
    tries = int(internal_kv._internal_kv_get(key) or 0) + 1
    internal_kv._internal_kv_put(key, str(tries))
    if tries > MAX_LOSSES:
        raise ValueError(f"ray: {MAX_LOSSES} workers were lost (killed, out of memory) at one unit: {shown(item)}")
