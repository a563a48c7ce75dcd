"""Reading and checking the encoder's fields in the Hugging Face `config.json` of a T5Gemma model."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flowdit.fields import require, shown
from flowdit.models.pretrained import numbers_after

MODEL_TYPES = ("t5gemma", "t5_gemma_module")
ATTENTION = ("sliding_attention", "full_attention")
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
COUNTS = (*SIZES, "num_hidden_layers", "sliding_window")
NUMBERS = ("rms_norm_eps", "query_pre_attn_scalar", "rope_theta")


@dataclasses.dataclass(frozen=True)
class T5GemmaConfig:
    """The encoder of a T5Gemma model; the defaults are those of transformers' `T5GemmaModuleConfig`."""

    vocab_size: int = 256_000
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 256
    rms_norm_eps: float = 1e-6
    query_pre_attn_scalar: float = 256.0
    attn_logit_softcapping: float | None = 50.0
    sliding_window: int = 4096
    layer_types: tuple[str, ...] = ()
    rope_theta: float = 10_000.0
    pad_token_id: int = 0

    @property
    def is_sliding(self) -> tuple[bool, ...]:
        """For each layer, whether its attention is limited to the sliding window."""
        return tuple(kind == "sliding_attention" for kind in self.layer_types)

    @classmethod
    def from_huggingface(cls, raw: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> "T5GemmaConfig":
        """Parse the encoder's settings in a `config.json` of a full model, of its encoder, or of the bare module.

        Args:
            raw: the file's content.
            shapes: of the encoder's tensors. A larger network is refused before one is built.

        Raises:
            ValueError: naming the first field that is invalid, of another architecture, or does not match the tensors.
        """
        encoder = _encoder_section(raw)
        values: dict[str, Any] = {
            field.name: encoder.get(field.name, field.default) for field in dataclasses.fields(cls)
        }
        values["rope_theta"] = _rope_theta(encoder)
        values["pad_token_id"] = values["pad_token_id"] or 0  # may be null; padding is masked
        _check_numbers(values)
        _check_sizes(values, shapes)
        if not values["layer_types"]:
            values["layer_types"] = [ATTENTION[i % 2] for i in range(values["num_hidden_layers"])]
        _check_attention(values)
        values["layer_types"] = tuple(values["layer_types"])
        # JSON may have 50 or 50.0, which must give the same fingerprint.
        values |= {
            name: float(values[name]) for name in (*NUMBERS, "attn_logit_softcapping") if values[name] is not None
        }
        return cls(**values)


def _encoder_section(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    found = raw.get("model_type")
    if found not in MODEL_TYPES:
        raise ValueError(f"must be a T5Gemma checkpoint (model_type t5gemma), found model_type {shown(found)}")
    encoder = raw.get("encoder") if found == "t5gemma" else raw
    require("encoder", encoder, isinstance(encoder, Mapping), "must be an object with the encoder's settings")
    assert isinstance(encoder, Mapping)
    activation, bias = encoder.get("hidden_activation", "gelu_pytorch_tanh"), encoder.get("attention_bias", False)
    require("hidden_activation", activation, activation == "gelu_pytorch_tanh", "must be 'gelu_pytorch_tanh'")
    require("attention_bias", bias, bias is False, "must be false")
    return encoder


def _rope_theta(encoder: Mapping[str, Any]) -> Any:
    """The base of the rotary frequencies; transformers 5 stores it in `rope_parameters`, 4 next to `rope_scaling`."""
    scaling = encoder.get("rope_scaling")
    require("rope_scaling", scaling, scaling is None, "must be null: scaled rotary positions are not implemented")
    rope = encoder.get("rope_parameters") or {"rope_theta": encoder.get("rope_theta", T5GemmaConfig.rope_theta)}
    is_plain = isinstance(rope, Mapping) and set(rope) <= {"rope_theta", "rope_type"}
    is_plain = is_plain and rope.get("rope_type", "default") == "default"
    require(
        "rope_parameters", rope, is_plain, "must be of rope_type 'default': no other rotary positions are implemented"
    )
    return rope.get("rope_theta", T5GemmaConfig.rope_theta)


def _check_numbers(values: Mapping[str, Any]) -> None:
    for name in COUNTS:
        require(name, values[name], type(values[name]) is int and values[name] > 0, "must be a whole number above 0")
    for name in NUMBERS:
        require(name, values[name], _is_positive(values[name]), "must be a number above 0")
    window = values["sliding_window"]
    require("sliding_window", window, window < 2**31, "must be below 2**31")
    cap, pad = values["attn_logit_softcapping"], values["pad_token_id"]
    require("attn_logit_softcapping", cap, cap is None or _is_positive(cap), "must be null or a number above 0")
    is_token = type(pad) is int and 0 <= pad < values["vocab_size"]
    require("pad_token_id", pad, is_token, f"must be a token below vocab_size={values['vocab_size']}")


def _check_sizes(values: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    layers = len(numbers_after("layers.", shapes))
    depth = values["num_hidden_layers"]
    require(
        "num_hidden_layers", depth, depth <= layers, f"must be at most {layers}, the number of layers in its tensors"
    )
    largest = max((size for shape in shapes.values() if 0 not in shape for size in shape), default=0)
    for name in SIZES:
        require(name, values[name], values[name] <= largest, f"must be at most {largest}, the largest size of a tensor")


def _check_attention(values: Mapping[str, Any]) -> None:
    heads, kv_heads, head_dim = values["num_attention_heads"], values["num_key_value_heads"], values["head_dim"]
    require("num_key_value_heads", kv_heads, heads % kv_heads == 0, f"must be a divisor of num_attention_heads={heads}")
    require("head_dim", head_dim, head_dim % 2 == 0, "must be even")
    kinds, depth = values["layer_types"], values["num_hidden_layers"]
    are_kinds = isinstance(kinds, list) and len(kinds) == depth and all(kind in ATTENTION for kind in kinds)
    require("layer_types", kinds, are_kinds, f"must be a list of {depth}, each one of {', '.join(ATTENTION)}")


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < 1e100  # a JSON number may be too large for a float
