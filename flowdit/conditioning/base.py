"""The base class of all kinds of conditioning."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray

from flowdit.conditioning.meta import ConditioningMeta
from flowdit.config import Config, TrainConfig
from flowdit.data.captions import TextReader
from flowdit.data.manifest import Manifest
from flowdit.data.mixture import Mixture, Part
from flowdit.data.schema import Field
from flowdit.diffusion.objective import Batch, Example
from flowdit.fields import FieldError, under
from flowdit.models.attention import AttentionShape
from flowdit.models.config import ModelConfig

DEFAULT_PREVIEWS = 16
"""Number of images in a preview by default."""


@dataclasses.dataclass(frozen=True)
class Requests:
    """Images to draw. Conditions are made batch by batch, so memory does not grow with the number of requests.

    `captions` are the texts below the images. `encode` takes image indices and returns their conditions and null
    conditions, both with a leading batch axis; the null conditions are None without guidance. `arguments` takes an
    image index and returns the arguments of `Conditioning.requests` that ask for this image alone, as JSON data.
    """

    captions: list[str]
    encode: Callable[[Sequence[int]], tuple[Any, Any]]
    arguments: Callable[[int], dict[str, Any]]

    def __len__(self) -> int:
        return len(self.captions)


@dataclasses.dataclass(frozen=True)
class Exported:
    """Arguments of the exported diffusers pipeline (`interop/exported/pipeline.py`), and entries of its model card.

    task: one of the hub's tasks. title: the beginning of the card. call: an example call of the pipeline `pipe`.
    values: arguments of the pipeline. parts: arguments of its `from_pretrained` that are not in the folder.
    facts: rows for the card's table of data.
    """

    title: str
    call: str
    task: str = "unconditional-image-generation"
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    parts: tuple[str, ...] = ()
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Conditioning(abc.ABC):
    """One kind of conditioning: its record fields, conditions, requests for images, and metadata.

    `condition` and `null` take one example, are traced, and return pytrees of the same shapes, so that one can replace
    the other.
    """

    model: ClassVar[str]
    """The network that it conditions, a key of `models.config.MODELS`."""
    starts_from: ClassVar[tuple[str, ...]]
    """The networks that are allowed in `train.init_from`."""
    request_args: ClassVar[tuple[str, ...]] = ()
    """Names of the arguments of `requests`."""
    preview_field: ClassVar[str | None] = None
    """The field of `train` for the first of `request_args` in previews; those of other kinds must be null."""
    same_in_mixtures: ClassVar[tuple[str, ...]] = ()
    """Fields of the manifest in which the data sets of a mixture must agree."""

    @classmethod  # noqa: B027
    def check(cls, config: Config) -> None:
        """Raise `ValueError` for the first setting that is invalid for this kind, without data or devices."""

    @classmethod
    @abc.abstractmethod
    def for_training(cls, config: Config, manifest: Manifest, mesh: Mesh) -> Conditioning:
        """The conditioning of a run. Raises `ValueError` if the data do not have the required fields."""

    @classmethod
    @abc.abstractmethod
    def from_checkpoint(cls, config: Config, manifest: Manifest, meta: ConditioningMeta) -> Conditioning:
        """The conditioning of a stored model. Anything needed for sampling is loaded on first use."""

    def with_encoder(self, name: str) -> Conditioning:
        """The same with another text encoder, by folder or hub id. Raises `ValueError` if there is no text encoder."""
        raise FieldError("text_encoder", f"must not be given, as this model has no text encoder, got {name!r}")

    def at_size(self, height: int, width: int) -> Conditioning:
        """The same for requests of images of another size in pixels."""
        return self

    # --- the network ---

    @abc.abstractmethod
    def build_model(self, config: Any, channels: int, *, key: PRNGKeyArray) -> Any:
        """A freshly initialised float32 network for latents of `channels`, called as model(x_t, t, condition) on one example.

        `config` is of the class `models.config.MODELS[self.model]`.
        """

    def check_model(self, config: ModelConfig) -> None:  # noqa: B027
        """Raise `ValueError` for a network shape that does not fit the condition."""

    def attention_shapes(self, config: ModelConfig, latent_shape: tuple[int, int, int]) -> list[AttentionShape]:
        """The attention shapes of the network."""
        return config.attention_shapes(latent_shape)

    def model_builder(self, config: Config, manifest: Manifest) -> Callable[[], Any]:
        """Return a function that initialises the network of this configuration for these latents; usable under jit."""
        with under("model."):
            for shape in dict.fromkeys((manifest.latent_shape, *manifest.bucket_shapes)):
                config.model.check(shape)
        self.check_model(config.model)
        return lambda: self.build_model(config.model, manifest.latent_shape[0], key=jax.random.key(config.seed))

    # --- a batch, from the records to the loss ---

    @abc.abstractmethod
    def fields(self) -> dict[str, Field]:
        """The fields of a record besides its latent."""

    def reader(self, split: str, part: Part) -> TextReader | None:
        """The reader for the captions of a split of one of the run's data sets, if any."""
        return None

    def encode(self, batch: Batch) -> Batch:
        """Transform a batch of the loader on the devices to the input of the step. Runs ahead of the step."""
        return batch

    def encoded(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and dtype of what the reader and `encode` make of one record's captions, by name."""
        return {}

    @abc.abstractmethod
    def condition(self, example: Example) -> Any:
        """One example's condition."""

    @abc.abstractmethod
    def null(self, condition: Any) -> Any:
        """The null condition for a condition, for dropout in training and for guidance."""

    # --- requests for images ---

    @abc.abstractmethod
    def requests(self, count: int = 1, **arguments: Any) -> Requests:
        """Requests for `count` images of each value. Raises `ValueError` for values that the model does not support."""

    @abc.abstractmethod
    def previews(self, train: TrainConfig, data: Mixture | None) -> Requests:
        """The requests for previews during training; defaults may be chosen from the records of `data`."""

    # --- descriptions ---

    @property
    @abc.abstractmethod
    def summary(self) -> str:
        """A description for the console."""

    def describe(self) -> ConditioningMeta:
        """Metadata for a checkpoint, in addition to configuration and data."""
        return ConditioningMeta()

    def exported(self) -> Exported | None:
        """Entries for the diffusers pipeline and model card; None if the pipeline does not support the condition."""
        return None

    def figures(self) -> dict[str, int]:
        """Counts to log, of what this process has read so far."""
        return {}

    # --- another model beside this one ---

    def unlike(self, theirs: Conditioning) -> str | None:
        """Why conditions of this kind mean something else to a model of kind `theirs`, which cannot guide; None if not."""
        ours, other = (type(part).__name__.lower() for part in (self, theirs))
        return None if ours == other else f"must have the conditioning of the model, {ours}, it has {other}"

    # --- starting and resuming ---

    def check_resumable(self, stored: ConditioningMeta) -> None:  # noqa: B027
        """Raise `ValueError` unless a run with checkpoint metadata `stored` can be resumed with this conditioning."""

    def fresh_parts(self, theirs: Conditioning, their_model: ModelConfig, model: ModelConfig) -> dict[str, str]:
        """The parts of our network that cannot be copied from theirs, of the same architecture, with the reason."""
        return {}

    def differences(self, theirs: Conditioning) -> list[str]:
        """Differences to report when starting from their network."""
        return []


def check_request_args(conditioning: Conditioning, arguments: Mapping[str, Any]) -> None:
    """Raise `ValueError` naming the first argument that this kind of model does not support."""
    for name, value in arguments.items():
        is_asked = value is not None and not (isinstance(value, str) and not value)
        if is_asked and name not in conditioning.request_args:
            takes = " and ".join(conditioning.request_args) or "no condition"
            raise FieldError(name, f"not supported by this model, which takes {takes}")


def repeated(items: Sequence[Any], count: int) -> list[Any]:
    """Repeat every item `count` times."""
    return [item for item in items for _ in range(count)]
