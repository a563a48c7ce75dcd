"""What the class- and the text-conditional transformer share: their shape, and the way in, through and out."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flowdit.models.attention import AttentionShape
from flowdit.models.layers import Linear, layer_norm, modulate, patchify, sincos_positions, unpatchify
from flowdit.sharding import gather, is_gathering, keep_all_but_gathered

MODEL_NAMES = ("ccdit", "mmdit")

REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@dataclasses.dataclass
class ModelConfig:
    """Shape of a transformer. Latent shape, number of classes and width of the text come from data and encoder.

    Attributes:
        name: the network: `ccdit` (class-conditional DiT) or `mmdit` (PixArt-alpha's text-conditional transformer).
        depth: number of blocks.
        hidden_dim: width of the residual stream, divisible by 4 and by `num_heads`.
        num_heads: attention heads.
        patch_size: side of a patch in latent pixels.
        mlp_ratio: hidden width of the MLP over `hidden_dim`.
        qk_norm: RMSNorm of queries and keys.
        remat: what the backward pass keeps: `none` (everything), `dots` (matrix products) or `full` (only block inputs).
        micro_conditioning: add height, width and aspect ratio of the image to the time embedding (SDXL; PixArt-alpha at 1024
            pixels); only `mmdit`.
        interpolation_scale: position coordinates are divided by it; PixArt uses 0.5 at 256 pixels, 1 at 512, 2 at 1024.
        time_freq_shift: 1 in diffusers' DiT, which divides the exponents of its time frequencies by 127 in place of 128.
        time_scale: factor of the flow time before it is embedded; 1 in SiT.
        mlp_norm_eps: epsilon of the norm before the MLP; 1e-5 in diffusers' DiT.
        null_tokens: rows of the null caption: 1 for one vector at every token, 120 in PixArt-alpha's own checkpoints; `mmdit`
            alone.
    """

    name: str = "ccdit"
    depth: int = 28
    hidden_dim: int = 1152
    num_heads: int = 16
    patch_size: int = 2
    mlp_ratio: float = 4.0
    qk_norm: bool = True
    remat: str = "none"
    micro_conditioning: bool = False
    interpolation_scale: float = 1.0
    time_freq_shift: float = 0.0
    time_scale: float = 1000.0
    mlp_norm_eps: float = 1e-6
    null_tokens: int = 1

    def check(self, latent_shape: tuple[int, int, int]) -> None:
        """Raise `ValueError` for a combination that cannot be built on latents of (channels, height, width)."""
        if self.name not in MODEL_NAMES:
            raise ValueError(f"model.name: must be one of {', '.join(MODEL_NAMES)}, got {self.name!r}")
        if self.remat not in REMAT_POLICIES:
            raise ValueError(f"model.remat: must be one of {', '.join(REMAT_POLICIES)}, got {self.remat!r}")
        for field in ("depth", "hidden_dim", "num_heads", "patch_size", "null_tokens"):
            if (value := getattr(self, field)) < 1:
                raise ValueError(f"model.{field}: must be at least 1, got {value}")
        for field in ("mlp_ratio", "interpolation_scale", "time_scale", "mlp_norm_eps"):
            if (value := getattr(self, field)) <= 0:
                raise ValueError(f"model.{field}: must be positive, got {value}")
        if not 0 <= self.time_freq_shift < 128:
            raise ValueError(f"model.time_freq_shift: must be in [0, 128), got {self.time_freq_shift}")
        self._check_divisibility(latent_shape)

    def _check_divisibility(self, latent_shape: tuple[int, int, int]) -> None:
        dim = self.hidden_dim
        if dim % self.num_heads:
            raise ValueError(f"model.hidden_dim: must be divisible by model.num_heads={self.num_heads}, got {dim}")
        if dim % 4:
            raise ValueError(f"model.hidden_dim: must be divisible by 4 (2-D positions), got {dim}")
        if self.micro_conditioning and self.name != "mmdit":
            raise ValueError(
                f"model.micro_conditioning: must be false unless model.name=mmdit, got true with {self.name}"
            )
        if self.null_tokens > 1 and self.name != "mmdit":
            raise ValueError(f"model.null_tokens: must be 1 unless model.name=mmdit, got {self.null_tokens}")
        if self.micro_conditioning and dim % 3:
            raise ValueError(f"model.hidden_dim: must be divisible by 3 with model.micro_conditioning=true, got {dim}")
        if any(side % self.patch_size for side in latent_shape[1:]):
            raise ValueError(
                f"model.patch_size: must divide the latents' height and width {latent_shape[1:]}, got {self.patch_size}"
            )

    def attention_shapes(
        self, latent_shape: tuple[int, int, int], text_tokens: int | None = None
    ) -> list[AttentionShape]:
        """What `attend` is asked for: self-attention over the patches, and with a text the cross-attention to it."""
        head_dim = self.hidden_dim // self.num_heads
        patches = latent_shape[1] * latent_shape[2] // self.patch_size**2
        to_text = [] if text_tokens is None else [AttentionShape(head_dim, patches, text_tokens)]
        return [AttentionShape(head_dim, patches), *to_text]


def embed_patches(
    x_t: Float[Array, "channels height width"], linear: Linear, patch_size: int, interpolation_scale: float
) -> Float[Array, "tokens dim"]:
    """Patches through `linear`, plus their positions, in the dtype of the parameters."""
    x = linear(patchify(x_t, patch_size).astype(linear.weight.dtype))
    height, width = (side // patch_size for side in x_t.shape[1:])
    return x + jnp.asarray(sincos_positions(x.shape[1], height, width, interpolation_scale), x.dtype)


def scan_blocks(blocks: Any, x: Float[Array, "tokens dim"], *inputs: Any, remat: str) -> Float[Array, "tokens dim"]:
    """`x = block(x, *inputs)` for every block of a module whose leaves lead with the depth axis.

    A scan, so compile time does not grow with depth. `remat` names what the backward pass keeps (`REMAT_POLICIES`);
    weights that had to be gathered it never keeps.
    """

    def body(x, block):
        return gather(block, "blocks")(x, *inputs), None

    if remat != "none":
        body = jax.checkpoint(body, policy=REMAT_POLICIES[remat], prevent_cse=False)
    elif is_gathering():
        body = jax.checkpoint(body, policy=keep_all_but_gathered, prevent_cse=False)
    return jax.lax.scan(body, x, blocks)[0]


def project_velocity(
    x: Float[Array, "tokens dim"],
    shift: Float[Array, " dim"],
    scale: Float[Array, " dim"],
    linear: Linear,
    patch_size: int,
    latent_shape: tuple[int, int, int],
) -> Float[Array, "channels height width"]:
    """The final layer: norm, modulation and projection to patches, put together as a float32 latent."""
    patches = linear(modulate(layer_norm(x), shift, scale))
    return unpatchify(patches, patch_size, latent_shape).astype(jnp.float32)
