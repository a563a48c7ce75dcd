"""Writing the checkpoints of a run: in the background, again after a failure, and if the run ends with an error."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from flowdit.checkpoint import object_stores
from flowdit.checkpoint.files import TEMPORARY_SUFFIX, CheckpointError, list_steps, write_checksums, write_share
from flowdit.checkpoint.meta import Best, RunMeta
from flowdit.checkpoint.names import named_arrays, split_state
from flowdit.checkpoint.retention import BEST_FILE, Retention, write_best
from flowdit.errors import first_line
from flowdit.processes import any_process, from_first
from flowdit.storage import absolute, free_bytes, has_been_committed, is_remote, reason

logger = logging.getLogger(__name__)

WRITTEN = "async_write_complete"
"""Part of the name of Orbax's barrier at which a process waits when all its arrays are on disk."""
# Indices, checksums, file system blocks of small files, and the log and images written at the same time.
SPARE_BYTES = 8 << 20


class Moment(NamedTuple):
    """The state of a run after `step`, and of its data stream."""

    step: int
    state: Any
    dataset: dict[str, Any]


def whole_state(state: Any) -> dict[str, dict[str, Any]]:
    """The arrays of a checkpoint by item and name."""
    state_item, ema_item = split_state(state)
    return {"state": state_item, "model_ema": ema_item}


def only_averages(state: Any) -> dict[str, dict[str, Any]]:
    """The arrays of a snapshot of post-hoc EMA by item and name."""
    return {"averages": named_arrays(state.averages)}


class CheckpointWriter:
    """Saves the last state passed to `reached`; keeps the newest `keep_last` steps and every multiple of `keep_every`.

    The best step is kept besides (`keep_best`), and named in `best.json` as long as its checkpoint is on disk.
    As a context manager it also saves if the run ends with an error. `meta` is stored in every checkpoint. A save that
    fails is logged. `arrays` says which of the state are saved.
    """

    def __init__(
        self,
        folder: epath.Path,
        keep_last: int | None,
        keep_every: int | None,
        meta: RunMeta,
        arrays: Callable[[Any], dict[str, dict[str, Any]]] = whole_state,
    ):
        self.folder = folder
        self._arrays = arrays
        self._meta = meta
        self._moment: Moment | None = None
        self._writing: int | None = None
        self._failure: CheckpointError | None = None
        self._best = meta.best
        self._published: Best | None = None
        self._retention = Retention(keep_last, keep_every)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._retention,
            # Of a run and its snapshots there are two managers in a process.
            multiprocessing_options=ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=folder.name),
            # In an object store Orbax would remove the previews, too: they are folders without a last object.
            cleanup_tmp_directories=not is_remote(folder),
            atomicity_options=object_stores.atomicity(folder),
            async_options=ocp.AsyncOptions(
                post_finalization_callback=self._write_checksums,
                barrier_sync_fn=self._barrier() if jax.process_count() > 1 else None,
                # In the background, threads would wait for minutes for folders that cannot be created.
                create_directories_asynchronously=False,
            ),
        )
        if jax.process_index() == 0:
            object_stores.remove_unfinished(folder)
        self._manager = ocp.CheckpointManager(absolute(folder), options=options)

    def reached(self, step: int, state: Any, dataset: dict[str, Any]) -> None:
        """Remember the state of the run. It may be donated to the next step, after which this is called again."""
        self._moment = Moment(step, state, dataset)

    def forget(self) -> None:
        """Forget the state, so that it is not saved."""
        self._moment = None

    def save(self, *, wait: bool = False) -> None:
        """Copy the last state to the host and write it in the background; with `wait`, until it is on disk.

        A step that is already saved is skipped. If this save or the previous one fails, another is tried at once,
        synchronously. Raises `CheckpointError` with the step and the last good checkpoint if that fails too.
        """
        assert self._moment is not None
        failure, self._failure = self._failure or self._settle(), None
        if self._moment.step == self._manager.latest_step():
            return
        # If one of several processes fails, the others would not try again with it.
        for _ in range(1 if failure or jax.process_count() > 1 else 2):
            if failure:
                logger.warning("%s; saving step %d at once", failure, self._moment.step)
            wait = wait or failure is not None
            failure = self._write(self._moment, wait)
            if failure is None:
                return
        assert failure is not None
        raise failure

    def keep_best(self, best: Best) -> None:
        """Keep the checkpoint of `best.step`, which is saved if it is the last step `reached` and is not yet saved.

        The former best one is deleted by the first save after the new one is on disk.
        """
        self._best = best
        if self._moment is not None and self._moment.step == best.step:
            self.save()
        self._publish()

    def best_so_far(self) -> Best | None:
        """The last argument of `keep_best`, or the one before if its checkpoint could not be written; None if gone.

        All processes must call it.
        """

        def choose() -> dict[str, Any] | None:
            steps = {*self._finished_steps(), self._writing}
            found = (best for best in (self._best, self._published) if best is not None and best.step in steps)
            return next(map(dataclasses.asdict, found), None)

        chosen = from_first(choose)
        self._best = None if chosen is None else Best(**chosen)
        return self._best

    def has_failed(self) -> bool:
        """Whether the background save has failed, so that the current state should be saved.

        All processes must call it, and get the same result.
        """
        if self._writing is not None and not self._manager.is_saving_in_progress():
            self._failure = self._settle()
        self._publish()
        return any_process(self._failure is not None)

    def last_good(self) -> epath.Path | None:
        """The newest finished checkpoint; waits for a running save."""
        self._failure = self._failure or self._settle()
        self._publish()
        steps = self._finished_steps()
        return self.folder / str(steps[-1]) if steps else None

    def reached_preemption(self, step: int) -> bool:
        """Whether the cluster has asked the processes of this run to stop (needs `jax.distributed`)."""
        return self._manager.reached_preemption(step)

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self._manager.close()
        elif isinstance(error, Exception) and not isinstance(error, CheckpointError):
            self._save_once_more()
        # After an error the manager is not closed, as that waits for threads that may never end.

    def _save_once_more(self) -> None:
        """Save the last state before the error that ends the run, if possible, without hiding that error."""
        # The other processes do not know of the error, and a save needs all of them.
        if self._moment is None or jax.process_count() > 1:
            return
        try:
            self.save(wait=True)
        except Exception as problem:  # a broken device or disk; the run still ends with its error
            logger.warning("step %d cannot be saved: %s", self._moment.step, first_line(problem))
        else:
            logger.warning("the run ends with an error; step %d is saved: %s", self._moment.step, self.last_good())

    def _write(self, moment: Moment, wait: bool) -> CheckpointError | None:
        """Try to save; return the error."""
        averages = self._meta.averages
        if averages is not None:
            averages = dataclasses.replace(averages, updates=moment.step - int(moment.state.skipped))
        meta = dataclasses.replace(self._meta, step=moment.step, best=self._best, averages=averages)
        # The former best one stays until `best.json` names the new one.
        self._retention.protected = {best.step for best in (self._best, self._published) if best is not None}
        arrays = self._arrays(moment.state)
        items: dict[str, Any] = {name: ocp.args.StandardSave(item) for name, item in arrays.items()}
        for name, content in (("dataset", moment.dataset), ("meta", meta.dump())):
            items |= {name: ocp.args.JsonSave(content)} if content else {}
        try:
            check_free_space(self.folder, arrays, meta)
            self._writing = moment.step
            self._manager.save(moment.step, args=ocp.args.Composite(**items), force=True)
        except Exception as problem:  # Orbax raises the errors of its storage
            return self._failed(moment.step, problem)
        return self._settle() if wait else None

    def _settle(self) -> CheckpointError | None:
        """Wait for the background save; return its error."""
        step = self._writing
        if step is None:
            return None
        try:
            self._manager.wait_until_finished()
        except Exception as problem:
            if not self._is_finished(step):
                return self._failed(step, problem)
            # The folder has its name, so it is complete; older ones are deleted after that.
            logger.warning("an old checkpoint cannot be deleted: %s", first_line(problem))
            self._look_again()
        self._writing = None
        return None

    def _publish(self) -> None:
        """Write `best.json`, once the checkpoint is on disk."""
        best = self._best
        if best is None or best == self._published or best.step == self._writing or not self._is_finished(best.step):
            return
        self._published = best
        if jax.process_index() == 0:
            try:
                write_best(self.folder, best)
            except OSError as problem:
                logger.warning("%s cannot be written (%s)", self.folder / BEST_FILE, reason(problem))

    def _look_again(self) -> None:
        # Orbax removes checkpoints from its list before deleting them, even if that fails.
        with contextlib.suppress(Exception):
            self._manager.reload()

    def _failed(self, step: int, problem: Exception) -> CheckpointError:
        self._writing = None
        if jax.process_index() == 0:  # a partial checkpoint may fill the disk
            with contextlib.suppress(OSError):
                if not (is_remote(self.folder) and has_been_committed(self.folder / str(step))):
                    self._temporary(step).rmtree(missing_ok=True)
        self._look_again()
        good = [s for s in self._finished_steps() if s != step]
        last = self.folder / str(good[-1]) if good else "none"
        return CheckpointError(
            f"checkpoint {self.folder / str(step)}: could not be written: {first_line(problem)}; last good: {last}"
        )

    def _temporary(self, step: int) -> epath.Path:
        """The folder of an unfinished checkpoint; in an object store its own, without the last object."""
        return self.folder / (str(step) if is_remote(self.folder) else f"{step}{TEMPORARY_SUFFIX}")

    def _is_finished(self, step: int) -> bool:
        with contextlib.suppress(OSError):  # of a store that does not answer
            return has_been_committed(self.folder / str(step))
        return False

    def _finished_steps(self) -> list[int]:
        try:
            return list_steps(self.folder)
        except OSError:  # of a store that does not answer
            return sorted(self._manager.all_steps())

    def _barrier(self) -> Callable[..., None]:
        """Orbax's barrier between its background threads; at the one after writing, each hashes its files first."""
        barrier = ocp.multihost.get_barrier_sync_fn()

        def hash_and_wait(*, key: str, timeout_ms: int) -> None:
            if WRITTEN in key and self._writing is not None:
                with contextlib.suppress(OSError):  # the first process reads what was not hashed
                    write_share(self._temporary(self._writing), jax.process_index())
            barrier(key=key, timeout_ms=timeout_ms)

        return hash_and_wait

    def _write_checksums(self) -> None:
        # Orbax calls this in the first process when all items are on disk and before it renames the temporary folder,
        # so that a finished checkpoint always has its checksums.
        assert self._writing is not None
        if jax.process_index() == 0:
            write_checksums(self._temporary(self._writing))


def checkpoint_bytes(state: Any, meta: RunMeta) -> int:
    """Upper estimate of the size of a checkpoint on disk: arrays, metadata, and overhead of the format."""
    arrays = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    return int(1.05 * arrays) + len(json.dumps(meta.dump())) + SPARE_BYTES


def check_free_space(folder: epath.Path, state: Any, meta: RunMeta) -> None:
    """Raise `CheckpointError` if there is not enough disk space for a checkpoint of this state (or of its shapes)."""
    needed = checkpoint_bytes(state, meta)
    free = free_bytes(folder)
    if free is not None and free < needed:
        raise CheckpointError(
            f"train.checkpoint_dir: a checkpoint needs {needed / 1e6:.0f} MB, {folder} has {free / 1e6:.0f} MB free"
        )


def save_weights(target: epath.PathLike, ema: Any, meta: RunMeta, dtype: str = "float16") -> None:
    """Write a checkpoint with only `model_ema`, in `dtype`, and `meta`; it can be sampled but not resumed."""
    target = epath.Path(target)
    if target.exists():
        raise CheckpointError(f"{target}: must not exist")
    arrays = {name: value.astype(jnp.dtype(dtype)) for name, value in named_arrays(ema).items()}
    items = ocp.args.Composite(model_ema=ocp.args.StandardSave(arrays), meta=ocp.args.JsonSave(meta.dump()))
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(target.resolve(), args=items)
    for marker in Path(target).rglob("commit_success.txt"):  # epath finds no files in sub-folders
        marker.unlink()  # object stores need it while writing; it contains the author's paths
    write_checksums(target)
