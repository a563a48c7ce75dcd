"""The networks of the original repositories in torch, under their own names: DiT, SiT, PixArt-alpha.

Written from the papers and the repositories, for a batch. They are references for the conversion.
"""

import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


def modulate(x, shift, scale):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def positions(dim: int, grid: int, scale: float) -> torch.Tensor:
    """(1, tokens, dim): width first, sines then cosines."""
    rows, columns = np.meshgrid(np.arange(grid) / scale, np.arange(grid) / scale, indexing="ij")
    frequencies = 1 / 10_000 ** (np.arange(dim // 4) / (dim / 4))
    parts = [f(axis.reshape(-1, 1) * frequencies) for axis in (columns, rows) for f in (np.sin, np.cos)]
    return torch.from_numpy(np.concatenate(parts, axis=1)).float()[None]


class Embedder(nn.Module):
    """`mlp.0` and `mlp.2` over 256 sinusoidal features of a number, cosines first."""

    def __init__(self, dim: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t):
        frequencies = torch.exp(-math.log(10_000) * torch.arange(128, dtype=torch.float32) / 128)
        angles = t[:, None].float() * frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        batch, tokens, _ = x.shape
        query, key, value = self.qkv(x).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(x.shape))


class CrossAttention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_linear = nn.Linear(dim, dim)
        self.kv_linear = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, text, mask):
        query = self.q_linear(x).reshape(len(x), x.shape[1], self.heads, -1).transpose(1, 2)
        key, value = self.kv_linear(text).reshape(len(x), text.shape[1], 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None])
        return self.proj(out.transpose(1, 2).reshape(x.shape))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int, out: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, out)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def unpatchify(x, patch: int, channels: int):
    grid = math.isqrt(x.shape[1])
    x = x.reshape(len(x), grid, grid, patch, patch, channels)
    return torch.einsum("nhwpqc->nchpwq", x).reshape(len(x), channels, grid * patch, grid * patch)


class Patches(nn.Module):
    def __init__(self, channels: int, dim: int, patch: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, stride=patch)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class DiTBlock(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.attn, self.mlp = Attention(dim, heads), Mlp(dim, 4 * dim, dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_a[:, None] * self.attn(modulate(x, shift_a, scale_a))
        return x + gate_m[:, None] * self.mlp(modulate(x, shift_m, scale_m))


class DiT(nn.Module):
    """DiT, and SiT, which gets other times."""

    def __init__(self, depth=2, dim=48, heads=4, patch=2, channels=4, size=8, classes=10):
        super().__init__()
        self.patch, self.channels = patch, channels
        self.x_embedder, self.t_embedder = Patches(channels, dim, patch), Embedder(dim)
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(classes + 1, dim)})
        self.pos_embed = nn.Parameter(positions(dim, size // patch, 1.0), requires_grad=False)
        self.blocks = nn.ModuleList(DiTBlock(dim, heads) for _ in range(depth))
        ada_ln = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))
        linear = nn.Linear(dim, patch * patch * 2 * channels)  # learned sigma
        self.final_layer = nn.ModuleDict({"linear": linear, "adaLN_modulation": ada_ln})

    def forward(self, x, t, y):
        x, c = self.x_embedder(x) + self.pos_embed, self.t_embedder(t) + self.y_embedder["embedding_table"](y)
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.final_layer["adaLN_modulation"](c).chunk(2, dim=1)
        x = self.final_layer["linear"](modulate(x, shift, scale))
        return unpatchify(x, self.patch, 2 * self.channels)[:, : self.channels]


class PixArtBlock(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.attn = Attention(dim, heads)
        self.cross_attn = CrossAttention(dim, heads)
        self.mlp = Mlp(dim, 4 * dim, dim)
        self.scale_shift_table = nn.Parameter(torch.zeros(6, dim))

    def forward(self, x, text, mask, t0):
        parts = (self.scale_shift_table[None] + t0).unbind(1)
        x = x + parts[2][:, None] * self.attn(modulate(x, *parts[:2]))
        x = x + self.cross_attn(x, text, mask)
        return x + parts[5][:, None] * self.mlp(modulate(x, *parts[3:5]))


class FinalTable(nn.Module):
    def __init__(self, dim: int, out: int):
        super().__init__()
        self.linear, self.scale_shift_table = nn.Linear(dim, out), nn.Parameter(torch.zeros(2, dim))


class CaptionEmbedder(nn.Module):
    def __init__(self, text_dim: int, dim: int, tokens: int):
        super().__init__()
        self.y_proj = Mlp(text_dim, dim, dim)
        self.register_buffer("y_embedding", torch.randn(tokens, text_dim))


class PixArt(nn.Module):
    """PixArt-alpha; with `sizes` the 1024-pixel one, conditioned on (height, width). `dropped` captions are null."""

    def __init__(
        self, depth=2, dim=48, heads=4, patch=2, channels=4, size=8, text_dim=20, tokens=7, scale=1.0, sizes=False
    ):
        super().__init__()
        self.patch, self.channels = patch, channels
        self.x_embedder, self.t_embedder = Patches(channels, dim, patch), Embedder(dim)
        if sizes:
            self.csize_embedder, self.ar_embedder = Embedder(dim // 3), Embedder(dim // 3)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.y_embedder = CaptionEmbedder(text_dim, dim, tokens)
        self.register_buffer("pos_embed", positions(dim, size // patch, scale))
        self.blocks = nn.ModuleList(PixArtBlock(dim, heads) for _ in range(depth))
        self.final_layer = FinalTable(dim, patch * patch * 2 * channels)

    def forward(self, x, t, text, mask, dropped, sizes=None):
        x, t = self.x_embedder(x) + self.pos_embed, self.t_embedder(t)
        if sizes is not None:
            sides = [self.csize_embedder(sizes[:, i]) for i in range(2)]
            t = t + torch.cat([*sides, self.ar_embedder(sizes[:, 0] / sizes[:, 1])], dim=1)
        text = self.y_embedder.y_proj(torch.where(dropped[:, None, None], self.y_embedder.y_embedding, text))
        t0 = self.t_block(t).reshape(len(x), 6, -1)
        for block in self.blocks:
            x = block(x, text, mask, t0)
        shift, scale = (self.final_layer.scale_shift_table[None] + t[:, None]).unbind(1)
        x = self.final_layer.linear(modulate(x, shift, scale))
        return unpatchify(x, self.patch, 2 * self.channels)[:, : self.channels]


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Set all trained parameters to random values, with activations of about one at any width."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                std = min(0.1, parameter.shape[-1] ** -0.5)
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    return model.eval()
