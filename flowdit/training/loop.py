"""The training loop on the host."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import signal
from collections.abc import Iterator

import jax
from etils import epath

from flowdit.checkpoint.files import list_steps
from flowdit.checkpoint.restore import Found
from flowdit.checkpoint.writer import CheckpointWriter
from flowdit.config import Config
from flowdit.data.mixture import DataSet
from flowdit.processes import totals
from flowdit.sharding import prefetch_to_device
from flowdit.tracking import Progress, Tracker
from flowdit.training.ahead import ShapedStep, mean_flops
from flowdit.training.evaluations import Evaluation, Report, closing
from flowdit.training.evaluations.best import Metric, count, find_metric, is_unmeasured
from flowdit.training.run_data import shape_in_pixels
from flowdit.training.setup import Run, start_run
from flowdit.training.step import TrainState, TrainStep
from flowdit.training.watchdog import Watchdog

logger = logging.getLogger(__name__)


class TrainingDiverged(ValueError):
    """Too many steps in a row had a loss or gradient that was not finite."""


def train(config: Config, found: Found | None = None, resume_command: str = "") -> bool:
    """Train up to `train.num_steps`, from the start or from the newest intact checkpoint, `found` or else searched.

    Returns whether all steps are done.

    SIGTERM, and Ctrl-C in a single process, save and return; an error saves first, if possible. Raises `ValueError`
    with one line for errors that the user can fix, `TrainingDiverged` after `train.max_skipped_in_row` skipped steps,
    `CheckpointError` if checkpoints cannot be written. A run that ends early logs `resume_command`, if given.
    """
    run, settings = start_run(config, found), config.train
    state, start = run.state, int(run.state.step)
    step, stopping = start, False
    primary = jax.process_index() == 0
    tracker = Tracker(run.folder, config.wandb, dataclasses.asdict(config), run_id=run.meta.run_id, primary=primary)
    progress = Progress(settings.num_steps, settings.batch_size, settings.compute_dtype)
    announce(run, start, settings.num_steps)
    train_step = compiled_step(run, progress) if len(run.batches) > 1 and start < settings.num_steps else run.train_step
    if run.figures:
        tracker.log(start, run.figures)
    writer = CheckpointWriter(run.folder, settings.keep_last, settings.keep_every, run.meta)
    saved = saying_how_to_resume(writer, settings.num_steps, resume_command)
    metric = find_metric(settings, run.evaluations)
    watchdog = Watchdog(config.mesh.step_timeout, config.data.stall_timeout, run.stream, run.folder)
    with stop_signal() as signalled, tracker, saved, writer, closing(run.evaluations, tracker), watchdog:
        for evaluation in overdue(run, metric, start, start >= settings.num_steps):
            evaluate(evaluation, start, state, tracker, metric, writer)
        batches = prefetch_to_device(run.mesh, run.stream, run.conditioning.encode)
        for step, (batch, data_state) in zip(range(start + 1, settings.num_steps + 1), batches, strict=False):
            if step == start + 1 and len(run.batches) == 1:
                progress.image_flops = run.image_flops(batch)
            state, metrics = train_step(state, batch)
            writer.reached(step, state, data_state)
            progress.add(metrics)
            watchdog.started(step, metrics)
            last = step == settings.num_steps
            stopping = writer.reached_preemption(step) if jax.process_count() > 1 else bool(signalled)
            due = is_due(step, settings.log_every) or step == start + 1 or last or stopping
            if due:
                values = progress.summary(step) | totals(run.conditioning.figures() | bad_records(run.data))
                tracker.log(step, values)
                logger.info(progress.line(step, values))
                if skipped := run.diagnosis.step_to_explain(step, progress.last_window):
                    number = data_state["next_batch"] - 1 - (step - skipped.step)
                    with progress.paused(), watchdog.paused():
                        run.diagnosis.explain(skipped, state.parameters, number)
                with watchdog.paused():  # it waits for the last save
                    check_diverged(values, settings.max_skipped_in_row, writer, run.diagnosis.file)
            if is_due(step, settings.save_every) or last or stopping or (due and writer.has_failed()):
                with progress.paused(), watchdog.paused(f"saving step {step} in {run.folder}"):
                    tracker.flush()
                    writer.save(wait=last or stopping)
            if stopping:
                break
            for evaluation in run.evaluations:
                if evaluation.is_due(step, last):
                    with progress.paused(), watchdog.paused():
                        evaluate(evaluation, step, state, tracker, metric, writer)
        is_complete = step >= settings.num_steps
        logger.info("%s; checkpoint: %s", "done" if is_complete else "stopped by signal", writer.last_good())
    return is_complete


def compiled_step(run: Run, progress: Progress) -> TrainStep:
    """The step, compiled for each of several latent shapes. Rates count the average image of an epoch."""
    manifest = run.data.manifest
    sizes = dict(zip(manifest.bucket_shapes, run.stream.shares, strict=True))
    progress.image_flops = mean_flops(run.image_flops, run.batches, {shape: sizes[shape] for shape in run.batches})
    names = {shape: shape_in_pixels(manifest, shape) for shape in run.batches}
    return ShapedStep(run.train_step, run.template, run.batches, names)


def overdue(run: Run, metric: Metric | None, start: int, is_last: bool) -> list[Evaluation]:
    """The evaluations that were due at the step from which a run resumes, and are not done yet."""
    unmeasured = metric is not None and is_unmeasured(metric, run.meta.best, start, is_last)
    first = [metric.evaluation] if metric is not None and unmeasured else []
    return first + [evaluation for evaluation in run.evaluations if evaluation.is_overdue(start)]


def evaluate(
    evaluation: Evaluation,
    step: int,
    state: TrainState,
    tracker: Tracker,
    metric: Metric | None,
    writer: CheckpointWriter,
) -> None:
    """Call an evaluation, log its report, and count it for the best checkpoint if it is the one that reports `metric`."""
    report = Report()
    with tracker.warns_only(evaluation.folder):
        report = evaluation(step, state)
        tracker.report(step, report)
    if metric is not None and evaluation is metric.evaluation:
        count(metric, step, report.figures, writer)


@contextlib.contextmanager
def saying_how_to_resume(writer: CheckpointWriter, num_steps: int, command: str) -> Iterator[None]:
    """At the end, also after an error, log the command that continues the run, if it is not complete."""
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # of an object store that is gone; the error of the run says so
            steps = list_steps(writer.folder)
            if command and steps and steps[-1] < num_steps:
                logger.info("resume with: %s", command)


def is_due(step: int, every: int) -> bool:
    """Whether something done every `every` steps (0: never) is due at `step`."""
    return every > 0 and step % every == 0


def bad_records(data: DataSet) -> dict[str, int]:
    """Number of bad records read by this process, a few batches ahead of the step. Each is reported once."""
    found = [records for split in (data.train, data.validation) if split is not None for records in split.bad_records]
    for problem in (line for records in found for line in records.take_new()):
        logger.warning("bad record, the next one is read instead: %s", problem)
    bad = sum(map(len, found))
    return {"data/bad_records": bad} if bad else {}


def announce(run: Run, start: int, num_steps: int) -> None:
    """Describe the run on the console, before the first compilation."""
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(run.state.model))
    devices = f"{jax.device_count()} {jax.devices()[0].device_kind} device(s)"
    shape, *others = ("x".join(map(str, shape)) for shape in run.batches)
    shape += f" and {len(others)} other shapes" if others else ""
    records = run.stream.get_state()["num_records"]
    logger.info("model: %.2f M parameters; %s, mesh %s", parameters / 1e6, devices, dict(run.mesh.shape))
    logger.info("data: %d records, latents %s, %s", records, shape, run.conditioning.summary)
    if start < num_steps:
        logger.info("compiling the training step, then steps %d to %d", start + 1, num_steps)


def check_diverged(
    values: dict[str, float], limit: int, writer: CheckpointWriter, explanation: epath.Path | None
) -> None:
    """Raise `TrainingDiverged` if the last `limit` steps were all skipped; the weights are those before them."""
    if values["train/skipped_in_row"] >= limit:
        # Not saved: restarts that diverge again would remove the earlier checkpoints through `train.keep_last`.
        writer.forget()
        good = writer.last_good() or "none was saved yet"
        why = "" if explanation is None else f"; see {explanation}"
        raise TrainingDiverged(
            f"train.max_skipped_in_row: the last {int(values['train/skipped_in_row'])} steps had a loss or gradient that "
            f"was not finite and were skipped (limit {limit}): resume with a lower optim.learning_rate; last good "
            f"checkpoint: {good}{why}"
        )


@contextlib.contextmanager
def stop_signal() -> Iterator[list[int]]:
    """A list that is filled by SIGTERM or the first Ctrl-C; a second Ctrl-C interrupts at once.

    With several processes JAX's handler of SIGTERM is kept, as it makes them agree on the last step.
    """
    received: list[int] = []
    handled = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ()

    def note(number, _frame):
        received.append(number)
        signal.signal(signal.SIGINT, previous[signal.SIGINT])

    previous = {number: signal.signal(number, note) for number in handled}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
