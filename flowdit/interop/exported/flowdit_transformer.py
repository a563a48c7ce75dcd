"""flowdit's transformers as diffusers models: the stock classes with additional settings.

This file depends only on torch and diffusers: it is copied into the `transformer` folder of an exported model. With the
defaults of the additional fields, each class computes the same as its stock parent.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.embeddings import PatchEmbed, Timesteps
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.normalization import RMSNorm

DROP_RATE = 0.1


class FlowDiTTextTransformer(PixArtTransformer2DModel):
    """PixArt-alpha's transformer, optionally with Q/K norms, another MLP and other time features.

    Additional fields: `qk_norm` applies an RMSNorm to each head's queries and keys, in self- and cross-attention.
    `mlp_ratio` is the width of the MLP over that of the model, `mlp_norm_eps` the epsilon of the norm before it.
    `time_freq_shift` is the `downscale_freq_shift` of the time features, and `time_scale` multiplies the flow time in
    [0, 1]: 1000 for diffusers' timesteps.
    """

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        out_channels: int | None = None,
        num_layers: int = 28,
        dropout: float = 0.0,
        norm_num_groups: int = 32,
        cross_attention_dim: int | None = 1152,
        attention_bias: bool = True,
        sample_size: int = 32,
        patch_size: int = 2,
        activation_fn: str = "gelu-approximate",
        num_embeds_ada_norm: int | None = 1000,
        upcast_attention: bool = False,
        norm_type: str = "ada_norm_single",
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-6,
        interpolation_scale: float | None = 1.0,
        use_additional_conditions: bool | None = False,
        caption_channels: int | None = None,
        attention_type: str | None = "default",
        qk_norm: bool = False,
        mlp_ratio: float = 4.0,
        mlp_norm_eps: float = 1e-6,
        time_freq_shift: float = 0.0,
        time_scale: float = 1000.0,
    ):
        super().__init__(**_stock_settings(PixArtTransformer2DModel, self.config))
        for block in self.transformer_blocks:
            block.norm2.eps = mlp_norm_eps
            block.ff = _feed_forward(block.ff, self.config)
            if qk_norm:
                _add_head_norms(block.attn1, block.attn2)
        _set_time_features(self.adaln_single.emb.time_proj, time_freq_shift, time_scale)

    def set_default_attn_processor(self) -> None:
        """Use scaled dot-product attention: the default processor of stock classes ignores Q/K norms."""
        self.set_attn_processor(AttnProcessor2_0())


class FlowDiTClassTransformer(DiTTransformer2DModel):
    """DiT's transformer, optionally with Q/K norms, scaled positions, another MLP and other time features.

    `interpolation_scale` divides the positions. The fields after it are those of `FlowDiTTextTransformer`; diffusers'
    DiT has `time_freq_shift` 1 and `mlp_norm_eps` 1e-5, which replaces `norm_eps` here.

    All blocks share one time and class embedder, while diffusers' DiT trains one per block. In training mode the label
    of an example is dropped for all blocks at once, with probability `DROP_RATE`; in diffusers' DiT for each block
    independently.
    """

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        out_channels: int | None = None,
        num_layers: int = 28,
        dropout: float = 0.0,
        norm_num_groups: int = 32,
        attention_bias: bool = True,
        sample_size: int = 32,
        patch_size: int = 2,
        activation_fn: str = "gelu-approximate",
        num_embeds_ada_norm: int | None = 1000,
        upcast_attention: bool = False,
        norm_type: str = "ada_norm_zero",
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-5,
        interpolation_scale: float = 1.0,
        qk_norm: bool = False,
        mlp_ratio: float = 4.0,
        mlp_norm_eps: float = 1e-5,
        time_freq_shift: float = 1.0,
        time_scale: float = 1000.0,
    ):
        super().__init__(**_stock_settings(DiTTransformer2DModel, self.config))
        if interpolation_scale != 1:
            sizes = (sample_size, sample_size, patch_size, in_channels, self.inner_dim)
            self.pos_embed = PatchEmbed(*sizes, interpolation_scale=interpolation_scale)
        embedder = self.transformer_blocks[0].norm1.emb
        embedder.class_embedder.dropout_prob = 0.0  # `forward` drops
        _set_time_features(embedder.time_proj, time_freq_shift, time_scale)
        for block in self.transformer_blocks:
            block.norm1.emb = embedder
            block.norm3.eps = mlp_norm_eps
            block.ff = _feed_forward(block.ff, self.config)
            if qk_norm:
                _add_head_norms(block.attn1)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | None = None,
        class_labels: torch.Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Like the stock class, for latents (n, channels, height, width), timesteps and class numbers (n,)."""
        if self.training and class_labels is not None:
            is_dropped = torch.rand(class_labels.shape, device=class_labels.device) < DROP_RATE
            class_labels = torch.where(is_dropped, self.config.num_embeds_ada_norm, class_labels)
        return super().forward(hidden_states, timestep, class_labels, cross_attention_kwargs, return_dict)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """State with a copy of the embedder per block, as safetensors does not support shared tensors."""
        state = super().state_dict(*args, **kwargs)
        copies = [name for name in state if ".norm1.emb." in name and "transformer_blocks.0." not in name]
        state.update({name: state[name].clone() for name in copies})
        return state


def _stock_settings(stock: type, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that the stock class accepts. It registers them again, with the same values."""
    return {name: settings[name] for name in inspect.signature(stock.__init__).parameters if name in settings}


def _feed_forward(stock: FeedForward, settings: Mapping[str, Any]) -> FeedForward:
    """The block's MLP, replaced if it is not four times as wide as the model."""
    width = settings["num_attention_heads"] * settings["attention_head_dim"]
    inner = int(width * settings["mlp_ratio"])
    if inner == 4 * width:
        return stock
    return FeedForward(width, dropout=settings["dropout"], activation_fn=settings["activation_fn"], inner_dim=inner)


def _add_head_norms(*attentions: Attention) -> None:
    """Add Q/K norms per head, which `AttnProcessor2_0` applies if an attention has them."""
    for attention in attentions:
        head_dim = attention.inner_dim // attention.heads
        attention.norm_q, attention.norm_k = (RMSNorm(head_dim, eps=1e-6) for _ in range(2))


def _set_time_features(features: Timesteps, freq_shift: float, scale: float) -> None:
    """Set the time features. `scale` multiplies the flow time; diffusers' timesteps are 1000 times the flow time."""
    features.downscale_freq_shift = freq_shift
    features.scale = scale / 1000
