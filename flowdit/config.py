"""The typed configuration: `resolve` turns the composed Hydra configuration into checked dataclasses.

Every component owns its part (`ModelConfig`, `OptimConfig`, ...) and gets only that. No module below uses Hydra.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from flowdit.data.loader import DataConfig
from flowdit.data.prepare import PrepareConfig
from flowdit.data.schema import FeatureMapField
from flowdit.diffusion.auxiliary import AUXILIARY, RESERVED_NAMES, AuxiliaryLoss
from flowdit.diffusion.sampling import SamplerConfig
from flowdit.fields import FREE_TEXT, FieldError, require, shown, under
from flowdit.joining import ProcessConfig, check_processes
from flowdit.models.config import MODELS, DiTConfig, ModelConfig
from flowdit.models.text_encoder import TextConfig
from flowdit.optim import OptimConfig
from flowdit.sharding import MeshConfig
from flowdit.storage import require_local
from flowdit.tracking import WandbConfig
from flowdit.train_config import TrainConfig


@dataclasses.dataclass
class Config:
    """Settings of `train_stage1.py` and `train_stage2.py`.

    Attributes:
        seed: seed of initialisation, order of the data, noise and times; in [0, 2**32).
        conditioning: `labels` or `none` in stage 1, `text` in stage 2; null: `labels` or `text`, by `model.name`.
        train: the run.
        data: the training data and its loader.
        model: the network.
        text: the frozen text encoder, only with `conditioning=text`.
        optim: the optimizer.
        mesh: devices and processes.
        wandb: Weights & Biases.
        auxiliary: settings of each registered auxiliary loss, by its name.
    """

    seed: int = 0
    conditioning: str | None = None
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: ModelConfig = dataclasses.field(default_factory=DiTConfig)
    text: TextConfig = dataclasses.field(default_factory=TextConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    wandb: WandbConfig = dataclasses.field(default_factory=WandbConfig)
    auxiliary: dict[str, Any] = dataclasses.field(default_factory=lambda: {n: loss() for n, loss in AUXILIARY.items()})

    def check(self) -> None:
        """Check the rules that need neither data nor devices; `Conditioning.check` has those of the conditioning."""
        require("seed", self.seed, 0 <= self.seed < 2**32, "must be in [0, 2**32)")
        parts = {"train": self.train, "data": self.data, "optim": self.optim, "mesh": self.mesh, "wandb": self.wandb}
        parts |= {f"auxiliary.{loss.name}": loss for loss in self.auxiliary_losses()}
        for name, part in parts.items():
            with under(f"{name}."):
                part.check()
        warmup, steps = self.optim.warmup_steps, self.train.num_steps
        require("optim.warmup_steps", warmup, 0 <= warmup < steps, f"must be in [0, train.num_steps={steps})")
        decay, rule = self.optim.decay_steps, f"must be at most train.num_steps - optim.warmup_steps = {steps - warmup}"
        if self.optim.schedule == "wsd" and decay is not None:
            require("optim.decay_steps", decay, decay <= steps - warmup, rule)
        rule = "must be a name of the network that model=<name> chooses"
        require("model.name", self.model.name, MODELS.get(self.model.name) is type(self.model), rule)
        check_processes(self.mesh)
        for loss in self.auxiliary_losses():
            depth, rule = self.model.depth, f"must be blocks in [1, model.depth={self.model.depth}]"
            require(f"auxiliary.{loss.name}.depths", loss.depths(), all(1 <= i <= depth for i in loss.depths()), rule)
        self._check_guidance_head()

    def _check_guidance_head(self) -> None:
        """A guidance head is trained, and only used, where there is one."""
        head, weight = self.model.guidance_head, self.train.sampler.internal_guidance
        for loss in self.auxiliary_losses():
            rule = f"must be a block, after which the head of auxiliary.{loss.name} is"
            require("model.guidance_head", head, head is not None or not loss.reads_weak, rule)
        is_trained = head is None or any(loss.reads_weak for loss in self.auxiliary_losses())
        require("model.guidance_head", head, is_trained, "must be null without auxiliary.internal_guidance.weight")
        rule = "must be 1 without model.guidance_head"
        require("train.sampler.internal_guidance", weight, weight == 1 or head is not None, rule)

    def auxiliary_losses(self) -> tuple[AuxiliaryLoss, ...]:
        """The auxiliary losses that are switched on. Raises `ValueError` for an unknown one."""
        for name in self.auxiliary:
            known = ", ".join(AUXILIARY) or "none is registered"
            require(f"auxiliary.{name}", name, name in AUXILIARY, f"no such auxiliary loss ({known})")
            own_name = AUXILIARY[name].name
            require(f"auxiliary.{name}", own_name, own_name == name, f"its name must be its key, {name}")
            is_free = name.isidentifier() and name not in RESERVED_NAMES
            rule = f"its name must be an identifier, none of {', '.join(RESERVED_NAMES)}"
            require(f"auxiliary.{name}", name, is_free, rule)
        return tuple(loss.for_model(self.model) for loss in self.auxiliary.values() if loss.weight)

    @property
    def map_readers(self) -> list[str]:
        """The auxiliary losses that are switched on and read the feature cache of the data."""
        return [
            loss.name
            for loss in self.auxiliary_losses()
            if any(isinstance(field, FeatureMapField) for field in loss.fields().values())
        ]


@dataclasses.dataclass
class SamplingMesh(ProcessConfig):
    """How several processes find each other for sampling; all their devices share each batch."""


@dataclasses.dataclass
class SampleConfig:
    """Settings of `python -m flowdit.sample`. Null sampler settings default to the checkpoint's `train.sampler`.

    The default labels and prompts are those of the run's previews.

    Attributes:
        checkpoint: a checkpoint, a run folder (its newest intact checkpoint), or another `source` of `flowdit.convert`.
        labels: class numbers or names, one or a list, for a class model.
        prompt: one prompt for a text model, read as it is written.
        prompts: prompts, one or a list, for a text model.
        prompts_file: text file with one prompt per line, instead of `prompts`.
        negative_prompt: text that guidance moves away from; empty: the model's null caption.
        num_images: images per label or prompt; in total for an unconditional model.
        image_size: height and width of the images in pixels, such as `[48,96]`, or the side of square ones; null: those of
            the training data. A model is good at the sizes that it was trained on.
        columns: images per row of `grid.png`.
        batch_size: maximum number of images per batch.
        seed: seed of the noise; in [0, 2**32).
        out: folder of the images; it must not contain images.
        overwrite: remove the images of an earlier run from `out`.
        vae: folder or hub id of the VAE of the latents; null: the one used by `prepare`.
        text_encoder: folder or hub id of the text encoder; null: the one of the training run.
        save_latents: also write the normalised latents, to `latents.npy`.
        solver: solver of the ODE, as `train.sampler.solver`: `euler`, `heun`, `midpoint`, `dopri5` or `tsit5`.
        steps: number of steps of the solver, as `train.sampler.steps`.
        guidance: as `train.sampler.guidance`, or a list: the images are drawn with each, one row of the grid per value.
        internal_guidance: as `train.sampler.internal_guidance`.
        guidance_low: as `train.sampler.guidance_low`.
        guidance_high: as `train.sampler.guidance_high`.
        time_shift: as `train.sampler.time_shift`.
        rtol: as `train.sampler.rtol`.
        ema_width: width of the EMA that is made from the run's power-function averages (`train.ema_snapshot_every`), as a
            fraction of the run; null: the EMA of `train.ema_decay`.
        guide: a weaker model that guides in place of the null condition (autoguidance), named like `checkpoint`; null: none.
        mesh: processes.
    """

    checkpoint: str = "???"
    labels: Any = None
    prompt: str | None = dataclasses.field(default=None, metadata=FREE_TEXT)
    prompts: Any = dataclasses.field(default=None, metadata=FREE_TEXT)
    prompts_file: str | None = None
    negative_prompt: str = dataclasses.field(default="", metadata=FREE_TEXT)
    num_images: int = 1
    image_size: Any = None
    columns: int = 8
    batch_size: int = 64
    seed: int = 0
    out: str = "samples"
    overwrite: bool = False
    vae: str | None = None
    text_encoder: str | None = None
    save_latents: bool = False
    solver: str | None = None
    steps: int | None = None
    guidance: Any = None
    internal_guidance: float | None = None
    guidance_low: float | None = None
    guidance_high: float | None = None
    time_shift: float | None = None
    rtol: float | None = None
    ema_width: float | None = None
    guide: str | None = None
    mesh: SamplingMesh = dataclasses.field(default_factory=SamplingMesh)

    def __post_init__(self) -> None:
        self.labels = as_list(self.labels)
        prompts = as_list(self.prompts)
        self.prompts = prompts and [str(prompt) for prompt in prompts]  # `prompts=[2024]` is read as a number

    def samplers(self) -> list[dict[str, Any]]:
        """The fields of `SamplerConfig`, None if not set, for each value of `guidance`."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(SamplerConfig)}
        values = [None if value is None else float(value) for value in as_list(self.guidance) or [None]]
        return [fields | {"guidance": value} for value in values]

    def check(self) -> None:
        """Raise `ValueError` naming the first field that breaks a rule; `inference.sampler` checks the others."""
        check_processes(self.mesh)
        require("columns", self.columns, self.columns >= 1, "must be at least 1")
        sides = as_list(self.image_size)
        is_size = sides is None or (len(sides) <= 2 and bool(sides) and all(type(side) is int for side in sides))
        require("image_size", self.image_size, is_size, "must be null, a side or [height,width] in pixels")
        require_local("out", self.out)
        given = [name for name in ("prompt", "prompts", "prompts_file") if getattr(self, name) is not None]
        if len(given) > 1:
            raise FieldError(
                given[1], f"must not be given together with {given[0]}, got {shown(getattr(self, given[1]))}"
            )
        numbers = as_list(self.guidance) or []
        is_number = all(isinstance(value, int | float) and not isinstance(value, bool) for value in numbers)
        require("guidance", self.guidance, is_number and self.guidance != [], "must be a number or a list of numbers")


def as_list(value: Any) -> list[Any] | None:
    """Convert a single value, such as a string, to a list of one. None stays None."""
    if value is None or isinstance(value, list):
        return value
    return list(value) if isinstance(value, Iterable) and not isinstance(value, str) else [value]


def register_schemas(training: type[Config] = Config) -> None:
    """Register the dataclasses with Hydra, which checks names and types of all overrides against them.

    `training` is the class of the configurations of both stages.
    """
    store = ConfigStore.instance()
    # The model is of the base class until a group of `model` says which: a node can only become a subclass's.
    train = OmegaConf.structured(training(model=ModelConfig()))
    for name, schema in (("train_schema", train), ("sample_schema", SampleConfig), ("prepare_schema", PrepareConfig)):
        store.store(name=name, node=schema)
    for name, model in MODELS.items():
        store.store(group="model", name=f"{name}_schema", node=model)  # what configs/model/<name>.yaml starts from


def resolve(composed: DictConfig, schema: type) -> Any:
    """Convert the composed configuration to `schema`. Raises `ValueError` for unknown or missing fields."""
    refuse_unknown(composed, schema)
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise FieldError(missing[0], f"must be given, as in {missing[0]}=...")
    return OmegaConf.to_object(composed)


def refuse_unknown(composed: DictConfig, schema: type) -> None:
    """Raise `FieldError` for a key without a field: `+new.key=1` passes Hydra's check and would be silently dropped."""
    default = schema()
    if isinstance(default, Config):
        model_class = OmegaConf.get_type(composed, "model")
        assert model_class is not None
        default.model = model_class()
    unknown = _unknown_keys(OmegaConf.to_container(composed), default)
    if unknown:
        raise FieldError(unknown[0], "no such field in the configuration (overrides with + are not supported)")


def _unknown_keys(values: Any, default: Any, prefix: str = "") -> list[str]:
    known = (
        default
        if isinstance(default, dict)
        else {f.name: getattr(default, f.name) for f in dataclasses.fields(default)}
    )
    unknown = []
    for name, value in values.items():
        if name not in known:
            unknown.append(prefix + name)
        elif isinstance(known[name], dict) or dataclasses.is_dataclass(known[name]):
            unknown += _unknown_keys(value, known[name], f"{prefix}{name}.")
    return unknown
