"""Reading and checking the encoder's fields in the Hugging Face `config.json` of a T5Gemma model."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from flowdit.fields import require, shown
from flowdit.json_input import STRICT, STRICT_PART, Count, Listed, Positive, parse
from flowdit.models.pretrained import check_sizes, numbers_after

MODEL_TYPES = ("t5gemma", "t5_gemma_module")
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)


@dataclass(frozen=True, config=STRICT)
class T5GemmaConfig:
    """The encoder of a T5Gemma model; the defaults are those of transformers' `T5GemmaModuleConfig`."""

    vocab_size: Count = 256_000
    hidden_size: Count = 2304
    intermediate_size: Count = 9216
    num_hidden_layers: Count = 26
    num_attention_heads: Count = 8
    num_key_value_heads: Count = 4
    head_dim: Count = 256
    rms_norm_eps: Positive = 1e-6
    query_pre_attn_scalar: Positive = 256.0
    attn_logit_softcapping: Positive | None = 50.0
    sliding_window: Annotated[int, Field(ge=1, lt=2**31)] = 4096
    layer_types: Listed[Literal["sliding_attention", "full_attention"]] = ()
    rope_theta: Positive = 10_000.0
    pad_token_id: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _check(self) -> "T5GemmaConfig":
        heads = self.num_attention_heads
        kv_heads = self.num_key_value_heads
        tokens = self.vocab_size
        rule = f"must be a divisor of num_attention_heads={heads}"
        require("num_key_value_heads", kv_heads, heads % kv_heads == 0, rule)
        require("head_dim", self.head_dim, self.head_dim % 2 == 0, "must be even")
        rule = f"must be a token below vocab_size={tokens}"
        require("pad_token_id", self.pad_token_id, self.pad_token_id < tokens, rule)
        return self

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
        content = {field.name: encoder[field.name] for field in dataclasses.fields(cls) if field.name in encoder}
        content["rope_theta"] = _rope_theta(encoder)
        content["pad_token_id"] = content.get("pad_token_id") or 0  # null where padding was never set; it is masked
        content["layer_types"] = content.get("layer_types") or []
        config = parse(cls, content)
        layers, depth = len(numbers_after("layers.", shapes)), config.num_hidden_layers
        rule = f"must be at most {layers}, the number of layers in its tensors"
        require("num_hidden_layers", depth, depth <= layers, rule)
        check_sizes(config, SIZES, shapes)
        if not config.layer_types:
            taking_turns = tuple("full_attention" if i % 2 else "sliding_attention" for i in range(depth))
            config = dataclasses.replace(config, layer_types=taking_turns)
        require("layer_types", list(config.layer_types), len(config.layer_types) == depth, f"must be a list of {depth}")
        return config


@dataclass(frozen=True, config=STRICT)
class _Rope:
    """Rotary positions that are not scaled; `T5GemmaConfig` checks the base of their frequencies."""

    rope_theta: Any = T5GemmaConfig.rope_theta
    rope_type: Literal["default"] = "default"


@dataclass(frozen=True, config=STRICT_PART)
class _Operations:
    """What the file must say of what is computed."""

    hidden_activation: Literal["gelu_pytorch_tanh"] = "gelu_pytorch_tanh"
    attention_bias: Literal[False] = False
    rope_scaling: None = None
    rope_parameters: _Rope | None = None


def _encoder_section(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    found = raw.get("model_type")
    if found not in MODEL_TYPES:
        raise ValueError(f"must be a T5Gemma checkpoint (model_type t5gemma), found model_type {shown(found)}")
    encoder = raw.get("encoder") if found == "t5gemma" else raw
    require("encoder", encoder, isinstance(encoder, Mapping), "must be an object with the encoder's settings")
    assert isinstance(encoder, Mapping)
    return encoder


def _rope_theta(encoder: Mapping[str, Any]) -> Any:
    """The base of the rotary frequencies; transformers 5 stores it in `rope_parameters`, 4 next to `rope_scaling`."""
    rope = parse(_Operations, encoder).rope_parameters
    if rope is None or not encoder["rope_parameters"]:
        return encoder.get("rope_theta", T5GemmaConfig.rope_theta)
    return rope.rope_theta
