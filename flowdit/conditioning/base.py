"""What every kind of conditioning answers, and what it need not answer itself."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray

from flowdit.config import Config, TrainConfig
from flowdit.data.captions import TextReader
from flowdit.data.loader import Source
from flowdit.data.manifest import Manifest
from flowdit.data.schema import Field
from flowdit.diffusion.objective import Batch, Example
from flowdit.fields import under
from flowdit.models.attention import AttentionShape
from flowdit.models.config import ModelConfig

DEFAULT_PREVIEWS = 16
"""Images in a preview whose content the configuration leaves open."""


@dataclasses.dataclass(frozen=True)
class Requests:
    """Images to draw. Conditions are made a batch at a time, so that many requests take no memory.

    `captions` is what to write below each image. `encode` takes the numbers of images and returns their conditions and
    null conditions, both with a leading batch axis; the null conditions are None where there is nothing to guide from.
    """

    captions: list[str]
    encode: Callable[[Sequence[int]], tuple[Any, Any]]

    def __len__(self) -> int:
        return len(self.captions)


@dataclasses.dataclass(frozen=True)
class Exported:
    """How a model is asked for images as a pipeline of diffusers (`interop/exported/pipeline.py`), and what its card says.

    task: of the hub's tasks. title: what the card begins with. call: an example, of the pipeline `pipe`.
    values: arguments of the pipeline. parts: arguments of its `from_pretrained` that the folder does not hold.
    facts: rows for the card's table of data.
    """

    title: str
    call: str
    task: str = "unconditional-image-generation"
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    parts: tuple[str, ...] = ()
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Conditioning(abc.ABC):
    """One kind of conditioning: its records, conditions, requests for images, and what is said of it.

    `condition` and `null` see one example, are traced, and return pytrees of the same shapes, so that either can stand
    in the other's place.
    """

    model: ClassVar[str]
    """The network that it conditions, a key of `models.config.MODELS`."""
    starts_from: ClassVar[tuple[str, ...]]
    """The networks whose weights a run may start from, with `train.init_from`."""
    wishes: ClassVar[tuple[str, ...]] = ()
    """What requests for images may say: arguments of `requests`."""
    preview_field: ClassVar[str | None] = None
    """The field of `train` that says what previews show, for the first of the `wishes`; those of other kinds are null."""

    @classmethod  # noqa: B027
    def check(cls, config: Config) -> None:
        """Raise `ValueError` for the first setting that this kind cannot use; needs neither data nor devices."""

    @classmethod
    @abc.abstractmethod
    def for_training(cls, config: Config, manifest: Manifest, mesh: Mesh) -> Conditioning:
        """Raises `ValueError` where the data lack what is needed."""

    @classmethod
    @abc.abstractmethod
    def from_checkpoint(cls, config: Config, manifest: Manifest, meta: Mapping[str, Any]) -> Conditioning:
        """That of a stored model. Loads nothing: what samples need is loaded when they are asked for."""

    def with_encoder(self, name: str) -> Conditioning:
        """The same with another text encoder, by folder or hub id. Raises `ValueError` where none is used."""
        raise ValueError(f"text_encoder: must not be given, as this model reads no text, got {name!r}")

    # --- the network ---

    @abc.abstractmethod
    def build_model(self, config: Any, channels: int, *, key: PRNGKeyArray) -> Any:
        """A freshly initialised float32 network for latents of `channels`, called as model(x_t, t, condition) on one example.

        `config` is of the class `models.config.MODELS[self.model]`.
        """

    def check_model(self, config: ModelConfig) -> None:  # noqa: B027
        """Raise `ValueError` for a shape of the network that does not fit what it is conditioned on."""

    def attention_shapes(self, config: ModelConfig, latent_shape: tuple[int, int, int]) -> list[AttentionShape]:
        """What the network asks of attention kernels."""
        return config.attention_shapes(latent_shape)

    def model_builder(self, config: Config, manifest: Manifest) -> Callable[[], Any]:
        """A function that initialises the network of this configuration, on these latents; it works under jit."""
        with under("model."):
            config.model.check(manifest.latent_shape)
        self.check_model(config.model)
        return lambda: self.build_model(config.model, manifest.latent_shape[0], key=jax.random.key(config.seed))

    # --- a batch, from the records to the loss ---

    @abc.abstractmethod
    def fields(self) -> dict[str, Field]:
        """The fields of a record beside its latent."""

    def reader(self, split: str) -> TextReader | None:
        """What makes arrays of the captions of a split, where there are any."""
        return None

    def encode(self, batch: Batch) -> Batch:
        """A batch on the devices as the loader made it, as the step takes it. Runs ahead of the step."""
        return batch

    @abc.abstractmethod
    def condition(self, example: Example) -> Any:
        """One example's condition."""

    @abc.abstractmethod
    def null(self, condition: Any) -> Any:
        """The counterpart of a condition that says nothing, for dropout in training and for guidance."""

    # --- images that are asked for ---

    @abc.abstractmethod
    def requests(self, count: int = 1, **wishes: Any) -> Requests:
        """`count` images of each of the `wishes`. Raises `ValueError` for what the model was not trained on."""

    @abc.abstractmethod
    def previews(self, train: TrainConfig, source: Source | None) -> Requests:
        """What is drawn during training; `source` has records of the data, to choose from where nothing is asked for."""

    # --- what is said of it ---

    @property
    @abc.abstractmethod
    def summary(self) -> str:
        """For a line on the console."""

    def describe(self) -> dict[str, Any]:
        """What a checkpoint says of it beside the configuration and the data, as JSON."""
        return {"text": None}

    def exported(self) -> Exported | None:
        """For a pipeline of diffusers and its model card; None where the pipeline knows no such condition."""
        return None

    def figures(self) -> dict[str, int]:
        """Counts to log, over what this process has read so far."""
        return {}

    # --- starting and resuming ---

    def check_resumable(self, stored: Mapping[str, Any]) -> None:  # noqa: B027
        """Raise `ValueError` unless a run whose checkpoint says `stored` can go on with this conditioning."""

    def fresh_parts(self, theirs: Conditioning, their_model: ModelConfig, model: ModelConfig) -> dict[str, str]:
        """The parts of our network that theirs, of the same architecture, cannot fill, and why."""
        return {}

    def differences(self, theirs: Conditioning) -> list[str]:
        """What is no obstacle to a start from their network but should be known."""
        return []


def check_wishes(conditioning: Conditioning, wishes: Mapping[str, Any]) -> None:
    """Raise `ValueError` naming the first thing asked for that this kind of model cannot follow."""
    for name, value in wishes.items():
        is_asked = value is not None and not (isinstance(value, str) and not value)
        if is_asked and name not in conditioning.wishes:
            takes = " and ".join(conditioning.wishes) or "no condition"
            raise ValueError(f"{name}: not supported by this model, which takes {takes}")


def repeated(items: Sequence[Any], count: int) -> list[Any]:
    """Every item `count` times in a row."""
    return [item for item in items for _ in range(count)]
