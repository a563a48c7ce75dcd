"""Settings of `experiment=small`, `fast` and those for text: chosen from the data and the devices, each with its reason.

`choose` is a pure function. What the user types takes precedence, and the other choices follow it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from flowdit.data.manifest import Manifest
from flowdit.fields import under
from flowdit.hardware import Machine
from flowdit.models.config import MODELS, ModelConfig
from flowdit.training.estimate import Condition, NetworkSize, duration, network_size, step_memory, step_seconds

PASSES = 150
"""Passes over the training images after which models of these sizes only memorise them."""
FEW_IMAGES = 200
"""With fewer training images the samples are copies of them."""
FEW_FOR_DIT_S = 5_000
FEWEST_TOKENS = 16
MEMORY_SHARE = 0.7
"""Share of the memory that a step may take."""
PREVIEWS = 16


class Scale(NamedTuple):
    """The settings for a class of devices; `batch_size`, `max_tokens` and `max_steps` are limits.

    `learning_rate` is for the width of `model` and for batches of at least 64, or of `batch_size` where that is less.
    """

    model: dict[str, int]
    learning_rate: float
    batch_size: int
    max_tokens: int
    min_steps: int
    max_steps: int
    compute_dtype: str
    reason: str


CPU = Scale(
    model={"depth": 6, "hidden_dim": 128, "num_heads": 4},
    learning_rate=6e-3,
    batch_size=64,
    max_tokens=64,
    min_steps=600,
    max_steps=1_800,
    compute_dtype="float32",
    reason="on a CPU, more steps help more than a wider model",
)
CPU_MUON = CPU._replace(
    batch_size=32,
    min_steps=1_200,
    max_steps=3_600,
    reason="on a CPU, more steps help more than a wider model or, with Muon, a larger batch",
)
ACCELERATOR = Scale(
    model={"depth": 12, "hidden_dim": 384, "num_heads": 6},
    learning_rate=5e-4,
    batch_size=256,
    max_tokens=256,
    min_steps=1_000,
    max_steps=40_000,
    compute_dtype="bfloat16",
    reason="DiT-S",
)
ACCELERATOR_FEW_IMAGES = ACCELERATOR._replace(
    model={"depth": 8, "hidden_dim": 256, "num_heads": 4},
    learning_rate=1e-3,
    reason=f"smaller than DiT-S, for fewer than {FEW_FOR_DIT_S} images",
)


class Choice(NamedTuple):
    """Values of keys that belong together, and why."""

    values: dict[str, Any]
    reason: str


class Sizes(NamedTuple):
    """The choices, and lines on the data and on what to expect of the run."""

    title: str
    choices: list[Choice]
    expected: list[str]

    @property
    def values(self) -> dict[str, Any]:
        """The chosen value of each key."""
        return {key: value for choice in self.choices for key, value in choice.values.items()}

    def lines(self) -> list[str]:
        """What is printed before training."""
        return [self.title, *(f"  {_shown(c.values)}: {c.reason}" for c in self.choices if c.values), *self.expected]


def choose(
    manifest: Manifest,
    machine: Machine,
    network: str,
    condition: Condition,
    typed: Mapping[str, Any],
    *,
    optimizer: str = "adamw",
    time_shift: float = 1.0,
) -> Sizes:
    """Settings of a run on this data and these devices. Keys in `typed` are not chosen.

    `network` is a key of `models.config.MODELS`; the number of classes of `condition` is taken from the data.
    `optimizer` and `time_shift` are those of the preset: the shift is only chosen where the latents need a larger one.
    Raises `FieldError` where a typed setting of the model does not fit the data.
    """
    kind = typed.get("conditioning") or _kind(manifest, network)
    condition = condition._replace(num_classes=manifest.num_classes if kind == "labels" else 0)
    images = manifest.num_records("train")
    scale = _scale(machine, images, optimizer)
    shape = _fitting(manifest, machine, network, condition, scale, typed)
    steps, why_steps = _steps(images, shape.batch_size, scale)
    steps = typed.get("train.num_steps", steps)
    choices = [
        *([Choice({"conditioning": "none"}, _why_none(manifest))] if kind == "none" else []),
        Choice(_model_values(shape.model), f"{shape.size.parameters / 1e6:.1f} M parameters; {scale.reason}"),
        *_latents(manifest, shape.model, time_shift),
        Choice(
            {"train.batch_size": shape.batch_size, "train.gradient_accum": shape.gradient_accum},
            _why_batch(shape, scale),
        ),
        Choice({"train.num_steps": steps}, f"each image {_times(shape.batch_size * steps / images)}; {why_steps}"),
        _learning_rate(shape, scale, steps),
        Choice({"train.compute_dtype": scale.compute_dtype}, "the faster one on this device"),
        *_intervals(manifest, kind, steps),
    ]
    untyped = [Choice({k: v for k, v in c.values.items() if k not in typed}, c.reason) for c in choices]
    return Sizes(_title(manifest, machine), untyped, _expected(shape, machine, condition, images, steps))


def _scale(machine: Machine, images: int, optimizer: str) -> Scale:
    if not machine.is_accelerator:
        return CPU_MUON if optimizer == "muon" else CPU
    return ACCELERATOR_FEW_IMAGES if images < FEW_FOR_DIT_S else ACCELERATOR


class Shape(NamedTuple):
    """The model, its size, the batch and its micro-batches, and the bytes of a step on a device."""

    model: ModelConfig
    size: NetworkSize
    batch_size: int
    gradient_accum: int
    memory: float


def _kind(manifest: Manifest, network: str) -> str:
    if network == "pixart":
        return "text"
    return "labels" if manifest.class_names else "none"


def _why_none(manifest: Manifest) -> str:
    text = ", but captions: python train_stage2.py experiment=small_text reads them" if manifest.has_captions else ""
    return f"the images have no classes{text}"


def _fitting(
    manifest: Manifest,
    machine: Machine,
    network: str,
    condition: Condition,
    scale: Scale,
    typed: Mapping[str, Any],
) -> Shape:
    """The smallest patch, then the fewest micro-batches, whose step fits the memory."""
    unit = machine.num_devices * typed.get("train.gradient_accum", 1)
    batch = typed.get("train.batch_size") or _batch_size(manifest, unit, scale)
    patches = [typed["model.patch_size"]] if "model.patch_size" in typed else _patches(manifest, scale.max_tokens)
    accums = [typed["train.gradient_accum"]] if "train.gradient_accum" in typed else _accums(batch, machine)
    dtype, shape = typed.get("train.compute_dtype", scale.compute_dtype), None
    for patch in patches:
        model = _model(network, {**scale.model, "patch_size": patch}, typed)
        with under("model."):
            size = network_size(model, manifest.latent_shape, condition)
        for accum in accums:
            rows = max(batch // accum // machine.num_devices, 1)
            memory = step_memory(
                model,
                manifest.latent_shape,
                condition,
                parameters=size.parameters,
                images=rows,
                dtype=dtype,
                first_moment_dtype=typed.get("optim.first_moment_dtype", "float32"),
            )
            shape = Shape(model, size, batch, accum, memory)
            if memory <= MEMORY_SHARE * machine.memory:
                return shape
    assert shape is not None
    return shape


def _model(network: str, chosen: Mapping[str, int], typed: Mapping[str, Any]) -> ModelConfig:
    fields = {field.name for field in dataclasses.fields(MODELS[network])}
    ours = {key.removeprefix("model."): value for key, value in typed.items() if key.startswith("model.")}
    return MODELS[network](**{**chosen, **{name: value for name, value in ours.items() if name in fields}})


def _batch_size(manifest: Manifest, unit: int, scale: Scale) -> int:
    """A power of two up to a quarter of the images, and up to the smallest bucket, rounded up to a multiple of `unit`."""
    smallest = min(count for count in manifest.bucket_counts("train") if count)
    largest = min(scale.batch_size, max(manifest.num_records("train") // 4, 1), smallest)
    return math.ceil(2 ** (largest.bit_length() - 1) / unit) * unit


def _accums(batch: int, machine: Machine) -> list[int]:
    """Numbers of micro-batches to try in turn."""
    return [accum for accum in (1, 2, 4, 8) if batch % (accum * machine.num_devices) == 0] or [1]


def _patches(manifest: Manifest, max_tokens: int) -> list[int]:
    """Sides of a patch to try in turn: from 2, or from 1 where 2 leaves too few tokens, to those with fewer tokens."""
    _, height, width = manifest.latent_shape
    common = math.gcd(height, width, *(side for shape in manifest.bucket_shapes for side in shape[1:]))
    sides = [side for side in range(1, common + 1) if common % side == 0]
    tokens = {side: height * width // side**2 for side in sides}
    few_enough = [side for side in sides if tokens[side] <= max_tokens] or sides[-1:]
    usual = [side for side in few_enough if side >= 2 and tokens[side] >= FEWEST_TOKENS]
    return usual or few_enough[:1]


def _steps(images: int, batch: int, scale: Scale) -> tuple[int, str]:
    wanted = _rounded(PASSES * images / batch)
    if wanted < scale.min_steps:
        return scale.min_steps, "fewer steps draw only blobs; the model memorises so few images"
    if wanted > scale.max_steps:
        return scale.max_steps, "more steps give better samples"
    return wanted, "with more passes the model memorises the images"


def _model_values(model: ModelConfig) -> dict[str, Any]:
    return {f"model.{name}": getattr(model, name) for name in CPU.model}


def _latents(manifest: Manifest, model: ModelConfig, time_shift: float) -> list[Choice]:
    channels, height, width = manifest.latent_shape
    tokens = height * width // model.patch_size**2
    choices = [Choice({"model.patch_size": model.patch_size}, f"{tokens} tokens an image")]
    shift = round(math.sqrt(channels * height * width / 4096), 2)
    if shift > 1:
        values = {"train.time_shift": max(shift, time_shift), "train.sampler.time_shift": shift}
        choices.append(Choice(values, "more noise for large latents"))
    return choices


def _why_batch(shape: Shape, scale: Scale) -> str:
    size = "the largest for this model" if shape.batch_size >= scale.batch_size else "at most a quarter of the images"
    return size if shape.gradient_accum == 1 else f"{size}, in {shape.gradient_accum} micro-batches for the memory"


def _learning_rate(shape: Shape, scale: Scale, steps: int) -> Choice:
    rate = scale.learning_rate * min(scale.model["hidden_dim"] / shape.model.hidden_dim, 1)
    rate *= min(math.sqrt(shape.batch_size / min(scale.batch_size, 64)), 1)
    values = {"optim.learning_rate": float(f"{rate:.2g}"), "optim.warmup_steps": min(steps // 20, 1_000)}
    return Choice(values, "by width and batch; then a cosine to the end")


def _intervals(manifest: Manifest, kind: str, steps: int) -> list[Choice]:
    every = max(_rounded(steps / 8), 1)
    values: dict[str, Any] = {f"train.{name}": every for name in ("save_every", "validate_every", "sample_every")}
    values["train.log_every"] = max(_rounded(steps / 40), 1)
    if kind == "text" and not manifest.num_records("validation"):
        return [Choice({**values, "train.sample_every": 0}, "no previews, as no captions are held out")]
    choices = [Choice(values, "about eight times in the run")]
    if kind == "labels" and manifest.class_names and (each := PREVIEWS // manifest.num_classes) > 1:
        labels = [label for label in range(manifest.num_classes) for _ in range(each)]
        choices.append(Choice({"train.sample_labels": labels}, f"{each} previews of each class"))
    return choices


def _title(manifest: Manifest, machine: Machine) -> str:
    shape = "x".join(map(str, manifest.latent_shape))
    images = manifest.num_records("train")
    return (
        f"settings for {images} training images, latents {shape}, on {machine.kind} (a typed value replaces its own):"
    )


def _expected(shape: Shape, machine: Machine, condition: Condition, images: int, steps: int) -> list[str]:
    seconds = steps * step_seconds(shape.size, shape.batch_size, machine)
    loss = f"; the loss usually falls from 2.0 to about 0.9 by step {_rounded(steps / 4)}, and to 0.6 to 0.8 at the end"
    figures = f"about {duration(seconds)} after compilation, {shape.memory / 1e9:.1f} GB of memory"
    lines = [f"expected: {figures}{loss if steps >= CPU.min_steps else ''}"]
    if shape.memory > machine.memory:
        lines.append(f"this may not fit the memory of {machine.memory / 1e9:.0f} GB: type a smaller train.batch_size")
    if images < FEW_IMAGES:
        lines.append(f"{images} training images are few: samples will be copies of them; some hundred draw new images")
    return lines


def _times(passes: float) -> str:
    return f"{passes:.0f} times" if passes >= 1.5 else "about once" if passes >= 0.75 else "less than once"


def _rounded(value: float) -> int:
    """To two digits."""
    return int(float(f"{value:.2g}"))


def _shown(values: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={str(value).replace(' ', '')}" for key, value in values.items())
