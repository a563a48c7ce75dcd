"""Metadata of a checkpoint: the `meta` item, read only after all files are verified."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import platform
import secrets
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import orbax.checkpoint as ocp
from etils import epath
from pydantic import Field, PlainValidator, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError, to_jsonable_python

from flowdit.checkpoint.files import CheckpointError, list_steps, verify_files, what_is_in
from flowdit.conditioning.meta import ConditioningMeta
from flowdit.config import Config
from flowdit.data.manifest import Manifest, as_json
from flowdit.errors import first_line
from flowdit.fields import FieldError, require, shortened
from flowdit.json_input import STRICT_PART, InputError, Listed, parse
from flowdit.power_ema import MAX_WIDTH
from flowdit.stored_config import from_stored

FORMAT = 1


def _stored_config(values: Any) -> Config:
    if isinstance(values, Config):
        return values
    try:
        return from_stored(values)
    except FieldError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as problem:
        rule = "must be a configuration of flowdit ({reason})"
        raise PydanticCustomError("config", rule, {"reason": shortened(first_line(problem))}) from None


@dataclass(frozen=True, config=STRICT_PART, kw_only=True)
class Best:
    """The best checkpoint of a run so far, by `metric`, a figure of its evaluations; the content of `best.json`.

    `mode` is "min" if lower values are better, else "max". `measured` is the last step whose evaluation is included.
    """

    metric: str
    mode: Literal["min", "max"]
    value: float
    step: Annotated[int, Field(ge=0)]
    measured: Annotated[int, Field(ge=0)]


@dataclass(frozen=True, config=STRICT_PART, kw_only=True)
class Averages:
    """Power-function averages of the weights, at a time of `updates`; `since`: the step at which they were switched on."""

    widths: Listed[Annotated[float, Field(gt=0, lt=MAX_WIDTH)]]
    updates: Annotated[int, Field(ge=0)] = 0
    since: Annotated[int, Field(ge=0)] = 0


@dataclass(frozen=True, config=STRICT_PART, kw_only=True)
class RunMeta(ConditioningMeta):
    """The metadata of a checkpoint, enough to sample from it and to refuse a resume that would not be exact.

    Attributes:
        step: number of training steps.
        manifest_id: `manifest.id` by the version that started the run; runs are compared by `manifest` itself.
        latent_mean, latent_scale: one value per channel; the network sees `(latent - mean) * scale`.
        run_id: the run in Weights & Biases.
        versions: of Python and packages.
        hardware: the devices of the run that wrote the checkpoint; empty: unknown.
        prediction: output of the network.
        source: format of an imported model.
        best: with `train.keep_best`, the best step by the evaluations before the checkpoint was written.
        averages: of post-hoc EMA, in the checkpoint or snapshot.
        features: the network of the feature maps that auxiliary losses read; empty: none.
    """

    format: Literal[1]
    step: Annotated[int, Field(ge=0)]
    config: Annotated[Config, PlainValidator(_stored_config)]
    manifest: Manifest
    manifest_id: str
    latent_mean: Listed[float]
    latent_scale: Listed[float]
    run_id: str
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    hardware: str = ""
    prediction: Literal["velocity", "noise"] = "velocity"
    source: str | None = None
    best: Best | None = None
    averages: Averages | None = None
    features: str = ""

    @model_validator(mode="after")
    def _check(self) -> RunMeta:
        channels = self.manifest.latent_shape[0]
        for name, values in (("latent_mean", self.latent_mean), ("latent_scale", self.latent_scale)):
            require(name, list(values), len(values) == channels, f"must hold {channels} numbers")
        return self

    @classmethod
    def parse(cls, stored: Any) -> RunMeta:
        """Parse JSON data; unknown keys are ignored.

        Raises `CheckpointError` with one line for the first key that is missing or breaks a rule.
        """
        try:
            return parse(cls, stored)
        except InputError as problem:
            raise CheckpointError(str(problem)) from None

    def dump(self) -> dict[str, Any]:
        """As JSON data. What is unknown or absent is left out, `prediction` and `source` for flowdit's own models."""
        # Fields first: pydantic itself would leave out those that only a subclass of `ModelConfig` has.
        values = to_jsonable_python(dataclasses.asdict(self) | {"manifest": as_json(self.manifest)})
        for name in ("hardware", "best", "averages", "features"):
            if not values[name]:
                del values[name]
        if self.source is None:
            del values["source"]
            if self.prediction == "velocity":
                del values["prediction"]
        return values


def run_meta(
    config: Config,
    manifest: Manifest,
    conditioning: ConditioningMeta,
    mean: Sequence[float],
    scale: Sequence[float],
) -> RunMeta:
    """Metadata of a new run, at step 0."""
    packages = ("flowdit", "jax", "equinox", "optax", "orbax-checkpoint", "grain")
    return RunMeta(
        format=FORMAT,
        step=0,
        config=config,
        manifest=manifest,
        manifest_id=manifest.id,
        latent_mean=tuple(mean),
        latent_scale=tuple(scale),
        run_id=secrets.token_hex(4),
        versions={"python": platform.python_version(), **{name: package_version(name) for name in packages}},
        **vars(conditioning),
    )


def package_version(package: str) -> str:
    """The version of an installed package; "source" if it runs from its source alone."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "source"


def read_meta(step_folder: epath.PathLike, *, is_verified: bool = False) -> RunMeta:
    """Verify all files of a checkpoint, unless that was done, and read its metadata.

    Raises `CheckpointError` if it is not a flowdit checkpoint of a known format, `DamagedCheckpoint` if its files
    changed.
    """
    step_folder = epath.Path(step_folder)
    if not (step_folder / "meta").is_dir():
        raise CheckpointError(f"{step_folder}: must be a checkpoint (<run>/<step>), {what_is_in(step_folder)}")
    if not is_verified:
        verify_files(step_folder)
    return verified_meta(step_folder)


def newest_meta(folder: epath.Path) -> RunMeta | None:
    """Metadata of the newest step in a run folder whose own metadata are intact; the other items are not read."""
    for step in reversed(list_steps(folder)):
        with contextlib.suppress(CheckpointError):
            verify_files(folder / str(step), ("meta",))
            return verified_meta(folder / str(step))
    return None


def verified_meta(step_folder: epath.Path) -> RunMeta:
    """Read the metadata of an already verified checkpoint. Raises `CheckpointError` for another format."""
    try:
        stored = read_json_item(step_folder / "meta")
    except Exception as problem:
        raise CheckpointError(f"{step_folder}: metadata cannot be read: {first_line(problem)}") from problem
    try:
        return RunMeta.parse(stored)
    except CheckpointError as problem:
        raise CheckpointError(f"{step_folder}: metadata: {problem}") from None


def read_json_item(item_folder: epath.Path) -> Any:
    """Read a JSON item."""
    # The handler directly: a checkpointer waits for all processes, but only the first one reads metadata.
    return ocp.JsonCheckpointHandler().restore(item_folder)
