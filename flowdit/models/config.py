"""The configuration of the transformers: what both have in common, and one class for each."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

from flowdit.fields import about, require, require_choice
from flowdit.models.attention import LAYER_KINDS, AttentionShape
from flowdit.models.layers import MLPS, NORMS
from flowdit.models.positions import POSITIONS, Positions
from flowdit.models.remat import NAMES, remat_policy


@dataclasses.dataclass
class ModelConfig:
    """Shape of a transformer. Channels, number of classes and width of the text come from data and encoder.

    Attributes:
        name: the network: `ccdit` (class-conditional DiT) or `pixart` (text-conditional; `mmdit` means the same).
        depth: number of blocks.
        hidden_dim: width of the residual stream, divisible by 4 and by `num_heads`.
        num_heads: attention heads.
        patch_size: side of a patch in latent pixels; 2, 4 or 8 in DiT.
        mlp_ratio: hidden width of the MLP over `hidden_dim`; SwiGLU has two thirds of it, rounded down to a multiple of 8.
        qk_norm: RMSNorm of queries and keys.
        norm: the norm before attention, MLP and final layer: `layer` or `rms`, without learned parameters.
        mlp: the MLP of a block: `gelu` or `swiglu`.
        positions: `sincos` (a fixed table, added to the tokens) or `rope` (2-D rotary, on queries and keys).
        value_residual: mix the first block's values into those of every block, with learned weights (ResFormer).
        guidance_head: block after which a second final layer predicts the velocity, for internal guidance; trained with
            `auxiliary.internal_guidance.weight` above 0; null: none.
        remat: what the backward pass keeps: `none` (everything), `names` (what is dear to compute), `lean` (less: outputs of
            attention and MLP; the best on TPUs), `dots` (matrix products), `full` (block inputs alone), or some names,
            such as `qkv+attended+up`; `up@host` moves it to the host's memory (not counted in a plan's time).
        kernels: how the layers of a block are computed: `plain`; `fast`, the same numbers up to rounding, written for
            compilers without a fused attention, without forward-mode derivatives; or `auto`: `fast` on TPUs and CPUs,
            elsewhere `plain`, with cuDNN's attention on NVIDIA GPUs.
        scan_blocks: compile one block and loop over all; false: compile every block, for a faster step on TPUs and many
            times the compile time.
        interpolation_scale: position coordinates are divided by it; PixArt uses 0.5 at 256 pixels, 1 at 512, 2 at 1024.
        position_base: side, in patches, whose coordinates every grid spans (PixArt's base size); null: no rescaling.
        time_freq_shift: 1 in diffusers' DiT, which divides the exponents of its time frequencies by 127, not 128.
        time_scale: factor of the flow time before it is embedded; 1 in SiT.
        mlp_norm_eps: epsilon of the norm before the MLP; 1e-5 in diffusers' DiT.
    """

    name: str = "ccdit"
    depth: int = 28
    hidden_dim: int = 1152
    num_heads: int = 16
    patch_size: int = 2
    mlp_ratio: float = 4.0
    qk_norm: bool = True
    norm: str = "layer"
    mlp: str = "gelu"
    positions: str = "sincos"
    value_residual: bool = False
    guidance_head: int | None = None
    remat: str = "none"
    kernels: str = "auto"
    scan_blocks: bool = True
    interpolation_scale: float = 1.0
    position_base: int | None = None
    time_freq_shift: float = 0.0
    time_scale: float = 1000.0
    mlp_norm_eps: float = 1e-6

    not_named: ClassVar[tuple[str, ...]] = ()
    """What `remat` cannot keep, as these blocks do not have it."""

    @property
    def head_dim(self) -> int:
        return self.hidden_dim // self.num_heads

    @property
    def grid_positions(self) -> Positions:
        return Positions(self.positions, self.interpolation_scale, self.position_base)

    def position_base_on(self, latent_shape: tuple[int, int, int]) -> int | None:
        """`position_base`; where that is null, the one with the same positions on square latents of this shape."""
        _, height, width = latent_shape
        same = height // self.patch_size if height == width else None
        return same if self.position_base is None else self.position_base

    def check(self, latent_shape: tuple[int, int, int]) -> None:
        """Raise `FieldError` for a combination that cannot be built on latents of (channels, height, width)."""
        for field, choices in (("kernels", LAYER_KINDS), ("norm", NORMS), ("mlp", MLPS), ("positions", POSITIONS)):
            require_choice(field, getattr(self, field), tuple(choices))
        with about("remat"):
            remat_policy(self.remat, [name for name in NAMES if name not in self.not_named])
        for field in ("depth", "hidden_dim", "num_heads", "patch_size"):
            require(field, value := getattr(self, field), value >= 1, "must be at least 1")
        for field in ("mlp_ratio", "interpolation_scale", "time_scale", "mlp_norm_eps"):
            require(field, value := getattr(self, field), 0 < value < math.inf, "must be positive and finite")
        shift, base = self.time_freq_shift, self.position_base
        head, is_block = self.guidance_head, self.guidance_head is None or 1 <= self.guidance_head < self.depth
        require("guidance_head", head, is_block, f"must be null or a block in [1, depth={self.depth})")
        require("time_freq_shift", shift, 0 <= shift < 128, "must be in [0, 128)")
        require("position_base", base, base is None or base >= 1, "must be null or at least 1")
        self._check_divisibility(latent_shape)

    def _check_divisibility(self, latent_shape: tuple[int, int, int]) -> None:
        dim, heads = self.hidden_dim, self.num_heads
        require("hidden_dim", dim, dim % heads == 0, f"must be divisible by num_heads={heads}")
        require("hidden_dim", dim, dim % 4 == 0, "must be divisible by 4 (2-D positions)")
        is_even = self.positions != "rope" or self.head_dim % 4 == 0
        require("hidden_dim", dim, is_even, f"must be divisible by 4 x num_heads={4 * heads} with positions=rope")
        sides = latent_shape[1:]
        divides = all(side % self.patch_size == 0 for side in sides)
        require("patch_size", self.patch_size, divides, f"must divide the latents' height and width {sides}")

    def attention_shapes(
        self, latent_shape: tuple[int, int, int], text_tokens: int | None = None
    ) -> list[AttentionShape]:
        """The shapes passed to `attend`: self-attention over the patches, and with a text the cross-attention to it."""
        patches = latent_shape[1] * latent_shape[2] // self.patch_size**2
        to_text = [] if text_tokens is None else [AttentionShape(self.head_dim, patches, text_tokens)]
        return [AttentionShape(self.head_dim, patches), *to_text]


@dataclasses.dataclass
class DiTConfig(ModelConfig):
    """The class-conditional DiT (Peebles & Xie 2023), `models/dit.py`. All fields are `ModelConfig`'s."""

    not_named = ("cross_qkv", "cross_attended", "cross_out")


@dataclasses.dataclass
class PixArtConfig(ModelConfig):
    """The text-conditional transformer of PixArt-alpha (Chen et al. 2023), `models/pixart.py`.

    Attributes:
        micro_conditioning: add height, width and aspect ratio of the image to the time embedding (SDXL; PixArt at 1024):
            the record's `image_size`, else that of `dataset.json`.
        null_tokens: vectors in the null caption: 1, used at every token, or one per token (120 in PixArt-alpha's files).
    """

    name: str = "pixart"
    micro_conditioning: bool = False
    null_tokens: int = 1

    not_named = ("modulation",)

    def __post_init__(self) -> None:
        self.name = OTHER_NAMES.get(self.name, self.name)

    def check(self, latent_shape: tuple[int, int, int]) -> None:
        super().check(latent_shape)
        require("null_tokens", self.null_tokens, self.null_tokens >= 1, "must be at least 1")
        is_divisible = not self.micro_conditioning or self.hidden_dim % 3 == 0
        rule = "must be divisible by 3 with micro_conditioning=true"
        require("hidden_dim", self.hidden_dim, is_divisible, rule)


MODELS: dict[str, type[ModelConfig]] = {"ccdit": DiTConfig, "pixart": PixArtConfig}
"""The configuration class by `model.name`."""

OTHER_NAMES = {"mmdit": "pixart"}
"""Other accepted names of a network, in checkpoints and on the command line."""


def stored_model(values: dict[str, Any]) -> tuple[type[ModelConfig], dict[str, Any]]:
    """Class and fields of a model's configuration in a checkpoint.

    Old checkpoints hold the fields of both classes: those of the other one are left out. Raises `ValueError` for an
    unknown name.
    """
    name = values.get("name", "ccdit")
    name = OTHER_NAMES.get(name, name) if isinstance(name, str) else name
    if not isinstance(name, str) or name not in MODELS:
        raise ValueError(f"model.name: must be one of {', '.join(MODELS)}, got {name!r}")
    ours = {field.name for field in dataclasses.fields(MODELS[name])}
    others = {field.name for model in MODELS.values() for field in dataclasses.fields(model)} - ours
    return MODELS[name], {field: value for field, value in values.items() if field not in others}
