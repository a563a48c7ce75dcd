"""How our networks go by in other projects: one `Architecture` each, looked up by `model.name`.

Tables that are read in both directions: what a `config.json` of diffusers must say to be read is what is written into it.
A network that gets an entry here, and layouts of its tensors, comes in and goes out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from flowdit.config import Config
from flowdit.interop.layouts import DIFFUSERS_DIT, DIFFUSERS_PIXART, Layout
from flowdit.interop.metadata import ForeignCondition, ForeignConfig, class_condition, text_condition


class DiffusersClass(NamedTuple):
    """A transformer class of diffusers, or one of `interop/exported` for it.

    honoured: the fields of `config.json` that change what it computes, with its defaults. `dropout` does so in training
        alone, `upcast_attention` changes rounding at most, and `norm_num_groups` nothing.
    fields: fields of `ModelConfig` that it can be told, and their names in `config.json`.
    fixed: fields of `ModelConfig` that it cannot be told, and what it computes with.
    """

    name: str
    honoured: Mapping[str, Any]
    fields: Mapping[str, str]
    fixed: Mapping[str, Any]


class Size(NamedTuple):
    """The field of `config.json` for the size of an axis of the tensors of our array `ours`, which have `more` rows."""

    field: str
    ours: str
    axis: int
    more: int = 0


class Architecture(NamedTuple):
    """One of our networks in other projects.

    layout: the tensors of diffusers' classes.
    constants: what `config.json` must say of the operations: the first value is written, each of them is read.
    sizes: what it says of tensors. The first is the size of the condition, in other formats too.
    nulls: what null stands for in it, given the side of the latents.
    position_scales: those of published models, which files do not always name (`interpolation_scale`).
    condition: what a model from elsewhere is conditioned on, from what its user says and the size of the condition.
    """

    stock: DiffusersClass
    own: DiffusersClass
    layout: Layout
    constants: Mapping[str, tuple[Any, ...]]
    sizes: tuple[Size, ...]
    nulls: Callable[[int], Mapping[str, Any]]
    position_scales: tuple[float, ...]
    condition: Callable[[Config, ForeignConfig, int], ForeignCondition]

    @property
    def classes(self) -> tuple[DiffusersClass, DiffusersClass]:
        return self.stock, self.own


_CONSTANTS = {
    "activation_fn": ("gelu-approximate",),
    "attention_bias": (True,),
    "norm_elementwise_affine": (False, None),
}
_HONOURED: dict[str, Any] = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": None,
    "num_layers": 28,
    "attention_bias": True,
    "sample_size": 32,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "norm_elementwise_affine": False,
}
_DIT = _HONOURED | {"num_embeds_ada_norm": 1000, "norm_type": "ada_norm_zero", "norm_eps": 1e-5}
_PIXART = _HONOURED | {
    "cross_attention_dim": 1152,
    "norm_type": "ada_norm_single",
    "norm_eps": 1e-6,
    "caption_channels": None,
    "attention_type": "default",
}
_OWN = {"interpolation_scale": 1.0, "qk_norm": False, "mlp_ratio": 4.0, "time_scale": 1000.0}
_OWN_FIELDS = ("qk_norm", "mlp_ratio", "mlp_norm_eps", "time_freq_shift", "time_scale", "interpolation_scale")
_STOCK_FIXED = {"qk_norm": False, "mlp_ratio": 4.0, "time_scale": 1000.0}

ARCHITECTURES: dict[str, Architecture] = {
    "ccdit": Architecture(
        stock=DiffusersClass(
            "DiTTransformer2DModel",
            _DIT,
            fields={"mlp_norm_eps": "norm_eps"},
            fixed=_STOCK_FIXED | {"time_freq_shift": 1.0, "interpolation_scale": 1.0},
        ),
        own=DiffusersClass(
            "FlowDiTClassTransformer",
            _DIT | _OWN | {"mlp_norm_eps": 1e-5, "time_freq_shift": 1.0},
            fields={field: field for field in _OWN_FIELDS},
            fixed={},
        ),
        layout=DIFFUSERS_DIT,
        constants=_CONSTANTS | {"norm_type": ("ada_norm_zero",)},
        sizes=(Size("num_embeds_ada_norm", "class_table", axis=0, more=1),),  # the null class
        nulls=lambda side: {},
        position_scales=(1.0,),
        condition=class_condition,
    ),
    "mmdit": Architecture(
        stock=DiffusersClass(
            "PixArtTransformer2DModel",
            _PIXART
            | {"out_channels": 8, "sample_size": 128, "interpolation_scale": None, "use_additional_conditions": None},
            fields={"interpolation_scale": "interpolation_scale", "micro_conditioning": "use_additional_conditions"},
            fixed=_STOCK_FIXED | {"time_freq_shift": 0.0, "mlp_norm_eps": 1e-6},
        ),
        own=DiffusersClass(
            "FlowDiTTextTransformer",
            _PIXART | _OWN | {"use_additional_conditions": False, "mlp_norm_eps": 1e-6, "time_freq_shift": 0.0},
            fields={field: field for field in _OWN_FIELDS} | {"micro_conditioning": "use_additional_conditions"},
            fixed={},
        ),
        layout=DIFFUSERS_PIXART,
        # `norm_eps` is that of the norm before attention too.
        constants=_CONSTANTS
        | {"norm_type": ("ada_norm_single",), "norm_eps": (1e-6,), "attention_type": ("default", None)},
        sizes=(
            Size("caption_channels", "caption_proj.up.weight", axis=1),
            Size("cross_attention_dim", "blocks.cross_attention.key_value.weight", axis=1),
        ),
        nulls=lambda side: {
            "interpolation_scale": float(max(side // 64, 1)),
            "use_additional_conditions": side == 128,
        },
        position_scales=(0.5, 1.0, 2.0),
        condition=text_condition,
    ),
}
