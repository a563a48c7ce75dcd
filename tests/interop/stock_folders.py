"""Good folders and files of other projects, with random weights."""

from pathlib import Path

import diffusers
import torch
from original_models import DiT, randomised

SMALL = {"num_attention_heads": 2, "attention_head_dim": 24, "num_layers": 2, "in_channels": 4, "out_channels": 8}


def write_stock(root: Path) -> Path:
    """Folders of both stock classes, one of them in shards too, and a file of DiT's own repository."""
    dit = randomised(diffusers.DiTTransformer2DModel(**SMALL, sample_size=8, num_embeds_ada_norm=3))
    dit.transformer_blocks[1].norm1.emb.load_state_dict(dit.transformer_blocks[0].norm1.emb.state_dict())
    dit.save_pretrained(root / "dit")
    dit.save_pretrained(root / "sharded", max_shard_size="40KB")
    pixart = diffusers.PixArtTransformer2DModel(**SMALL, sample_size=8, cross_attention_dim=48, caption_channels=20)
    randomised(pixart).save_pretrained(root / "pixart")
    torch.save(randomised(DiT(dim=32, heads=2)).state_dict(), root / "dit.pt")
    return root
