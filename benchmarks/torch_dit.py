"""diffusers' DiT in torch, of the same shape as one of flowdit's."""

from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel


def diffusers_dit(
    depth: int, hidden_dim: int, num_heads: int, patch_size: int, latent_shape: tuple[int, int, int], num_classes: int
) -> DiTTransformer2DModel:
    """Randomly initialised, in float32 on the CPU. It embeds time and class in every block, flowdit once."""
    return DiTTransformer2DModel(
        num_attention_heads=num_heads,
        attention_head_dim=hidden_dim // num_heads,
        num_layers=depth,
        patch_size=patch_size,
        sample_size=latent_shape[1],
        in_channels=latent_shape[0],
        out_channels=latent_shape[0],
        num_embeds_ada_norm=num_classes,
    )
