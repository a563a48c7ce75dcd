"""Good folders and files of other projects, changes to them, and the line in which their conversion ends."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import safetensors.numpy
import torch
from original_models import DiT, randomised
from runs import call, error_line

from flowdit.convert import main as convert
from flowdit.interop import read_source
from flowdit.interop.metadata import ForeignConfig

WEIGHTS = "diffusion_pytorch_model.safetensors"
TIME_WEIGHT = "transformer_blocks.{}.norm1.emb.timestep_embedder.linear_1.weight"
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


def copied(stock: Path, name: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stock / name, tmp_path / name))


def refused(source: Path, *options: str) -> str:
    """The line with which a conversion ends that must not have left anything behind."""
    target = source.parent / "out" / "target"
    line = error_line(call(convert, f"source={source}", f"target={target}", *options))
    assert not target.parent.exists() or not list(target.parent.iterdir())
    return line


def unreadable(source: Path, **said: Any) -> str:
    """The line that `read_source` says. Hundreds of commands would take too long."""
    with pytest.raises(ValueError) as caught:
        read_source(str(source), said=ForeignConfig(**said))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def with_tensors(folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> Path:
    tensors = safetensors.numpy.load_file(folder / WEIGHTS)
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / WEIGHTS)
    return folder


def with_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def without(file: Path, *names: str) -> None:
    """Take fields out of a JSON file."""
    file.write_text(
        json.dumps({name: value for name, value in json.loads(file.read_text()).items() if name not in names})
    )
