"""The counterparts of our networks in other projects: one `Architecture` each, by `model.name`.

The tables are used in both directions: the fields required to read a diffusers `config.json` are those written to it. A
network with an entry here, and layouts of its tensors, can be imported and exported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from flowdit.config import Config
from flowdit.interop.layouts import DIFFUSERS_DIT, DIFFUSERS_PIXART, Layout
from flowdit.interop.metadata import ForeignCondition, ForeignConfig, class_condition, text_condition


class DiffusersClass(NamedTuple):
    """A transformer class of diffusers, or one of `interop/exported` for it.

    honoured: the fields of `config.json` that change its output, with its defaults. `dropout` matters only in training,
        `upcast_attention` only changes rounding, and `norm_num_groups` has no effect.
    fields: fields of `ModelConfig` that it supports, and their names in `config.json`.
    fixed: fields of `ModelConfig` that it does not support, and the values that it uses.
    """

    name: str
    honoured: Mapping[str, Any]
    fields: Mapping[str, str]
    fixed: Mapping[str, Any]


class Size(NamedTuple):
    """The field of `config.json` for the size of an axis of our array `ours`, minus `more` extra rows."""

    field: str
    ours: str
    axis: int
    more: int = 0


class Architecture(NamedTuple):
    """The counterparts of one of our networks in other projects.

    layout: the tensors of diffusers' classes.
    constants: required fields of `config.json`: the first value is written, all values are accepted.
    sizes: its fields for tensor sizes. The first is the size of the condition, also in other formats.
    nulls: the meaning of null fields, given the side of the latents.
    position_scales: `interpolation_scale` of published models, as files do not always contain it.
    condition: makes the condition of an imported model from the user's hints and the size of the condition.
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
_FIXED = {"norm": "layer", "mlp": "gelu", "positions": "sincos", "value_residual": False}
_STOCK_FIXED = _FIXED | {"qk_norm": False, "mlp_ratio": 4.0, "time_scale": 1000.0}

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
            fixed=_FIXED,
        ),
        layout=DIFFUSERS_DIT,
        constants=_CONSTANTS | {"norm_type": ("ada_norm_zero",)},
        sizes=(Size("num_embeds_ada_norm", "class_table", axis=0, more=1),),  # the null class
        nulls=lambda side: {},
        position_scales=(1.0,),
        condition=class_condition,
    ),
    "pixart": Architecture(
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
            fixed=_FIXED,
        ),
        layout=DIFFUSERS_PIXART,
        # `norm_eps` is also the epsilon of the norm before attention.
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
