"""Files with one wrong value or tensor: reading them succeeds, or gives one line that names file and field.

`make test` reads a sample of the changes, `make test-slow` all of them.
"""

import json
import random
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from interop.foreign_folders import WEIGHTS, copied, unreadable, with_json, with_tensors
from interop.mutations import (
    Mutation,
    of_checkpoint,
    of_header,
    of_json,
    of_tensors,
    of_tokenizer,
    of_torch,
    problem_of,
)
from interop.small_models import DEFAULT_CLASS, DEFAULT_TEXT, converted, random_model, saved
from models.text_folders import write_t5gemma

from flowdit.interop import read_source
from flowdit.interop.metadata import ForeignConfig
from flowdit.models.text_encoder import TextConfig, load_text_encoder
from flowdit.models.vae import load_vae

pytest.importorskip("torch", reason="needs torch")

import diffusers
import torch
from original_models import PixArt, randomised

SAMPLE = 10


def reader(**hints: Any) -> Callable[[Path], Any]:
    return lambda path: read_source(str(path), hints=ForeignConfig(**hints))


def read_encoder(path: Path) -> Any:
    encoder = load_text_encoder(TextConfig(str(path), max_length=8, dtype="float32"))
    return encoder.encode(["a red apple", ""])


class Case(NamedTuple):
    """`source` is a folder or file in the `sources`, `file` the one in it that is changed."""

    source: str
    file: str
    changes: Callable[[Path], list[Mutation]]
    read: Callable[[Path], Any] = reader(prediction="noise")


CASES = [
    Case("dit", "config.json", of_json),
    Case("dit", WEIGHTS, of_tensors),
    Case("pixart", "config.json", of_json),
    Case("pixart", WEIGHTS, of_tensors),
    Case("sharded", f"{WEIGHTS}.index.json", of_json),
    Case("pipeline", "model_index.json", of_json),
    Case("pipeline", "scheduler/scheduler_config.json", of_json, reader()),
    Case("pipeline", "vae/config.json", of_json),
    Case("pipeline/vae", "config.json", of_json, load_vae),
    Case("pipeline/vae", WEIGHTS, of_tensors, load_vae),
    Case("t5gemma", "config.json", of_json, read_encoder),
    Case("t5gemma", "model.safetensors", of_tensors, read_encoder),
    Case("t5gemma", "tokenizer.json", of_tokenizer, read_encoder),
    Case("dit.pt", "", of_torch, reader(format="dit", num_heads=2)),
    Case("pixart.pth", "", of_torch, reader(num_heads=2)),
    Case("text.safetensors", "", of_header),
    Case("text.safetensors", "", of_tensors),
    Case("exported", "flowdit.json", of_json),
    Case("exported", "transformer/config.json", of_json),
    Case("exported", f"transformer/{WEIGHTS}", of_tensors),
    Case("checkpoint", "", of_checkpoint),
]


@pytest.fixture(scope="session")
def sources(stock, tmp_path_factory) -> Path:
    root = Path(shutil.copytree(stock, tmp_path_factory.mktemp("sources") / "all"))
    torch.save(randomised(PixArt(dim=32, heads=2)).state_dict(), root / "pixart.pth")
    shutil.copytree(stock / "dit", root / "pipeline" / "transformer")
    diffusers.DDIMScheduler(beta_schedule="linear", beta_end=0.02).save_pretrained(root / "pipeline" / "scheduler")
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = diffusers.AutoencoderKL(**kinds, block_out_channels=(8, 8), norm_num_groups=4, scaling_factor=0.13)
    vae.save_pretrained(root / "pipeline" / "vae")
    index = {
        "_class_name": "DiTPipeline",
        "transformer": ["diffusers", "DiTTransformer2DModel"],
        "id2label": {"0": "x"},
    }
    (root / "pipeline" / "model_index.json").write_text(json.dumps(index))
    write_t5gemma(root / "t5gemma")
    return root


@pytest.fixture(scope="module")
def own_sources(meta, sources) -> Path:
    """With flowdit's own formats."""
    source = saved(random_model(meta, DEFAULT_TEXT), sources / "text.safetensors")
    converted(source, sources / "exported", to="diffusers", own_class=True)
    saved(random_model(meta, DEFAULT_CLASS), sources / "checkpoint")
    return sources


@pytest.mark.parametrize("count", [SAMPLE, pytest.param(None, marks=pytest.mark.slow)], ids=["some", "all"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.source} {case.file}")
def test_one_line_or_success(own_sources, tmp_path, case, count):
    original, path = own_sources / case.source, tmp_path / case.source
    path.parent.mkdir(exist_ok=True)
    (shutil.copytree if original.is_dir() else shutil.copyfile)(original, path)
    case.read(path)
    changes = case.changes(path / case.file)
    changes = changes if count is None else random.Random(0).sample(changes, min(count, len(changes)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    problems = [problem for change in changes if (problem := problem_of(change, case.read, path))]
    assert not problems, "\n".join(problems)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kilobytes


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("_class_name", ["DiTTransformer2DModel"], "must be one of DiTTransformer2DModel, "),
        ("_class_name", {"name": "x"}, "must be one of DiTTransformer2DModel, "),
        ("num_layers", 0, "must be greater than or equal to 1, got 0"),
        ("patch_size", 0, "must be greater than or equal to 1, got 0"),
        ("norm_eps", 0, "must be greater than 0, got 0"),
        ("norm_eps", -1, "must be greater than 0, got -1"),
        ("norm_type", ["ada_norm_zero"], "must be 'ada_norm_zero', got ['ada_norm_zero']"),
    ],
)
def test_the_field_of_the_file_is_named(stock, tmp_path, field, value, message):
    folder = copied(stock, "dit", tmp_path)
    with_json(folder / "config.json", **{field: value})
    assert unreadable(folder).startswith(f"{folder / 'config.json'}: {field}: {message}")


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("dit", "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"),
        ("dit", "proj_out_2.weight"),
        ("dit", "proj_out_2.bias"),
        ("pixart", "proj_out.weight"),
        ("pixart", "proj_out.bias"),
        ("pixart", "caption_projection.linear_1.weight"),
        ("pixart", "pos_embed.proj.weight"),
    ],
)
def test_scalars_in_place_of_tensors(stock, tmp_path, name, tensor):
    def change(tensors):
        tensors[tensor] = np.zeros((), np.float32)

    line = unreadable(with_tensors(copied(stock, name, tmp_path), change))
    assert str(tmp_path / name) in line and tensor in line


def test_integers_in_place_of_names(stock, tmp_path):
    tensors = torch.load(stock / "dit.pt")
    torch.save(dict(enumerate(tensors.values())), tmp_path / "dit.pt")
    line = unreadable(tmp_path / "dit.pt", format="dit")
    assert line == f"{tmp_path / 'dit.pt'} must hold tensors by name, it has the key 0"
