"""Fields of a diffusers `config.json`, and contradictions to its tensors."""

import inspect
import json
import shutil

import numpy as np
import pytest
from interop.foreign_folders import copied, unreadable, with_json, with_tensors, without
from interop.small_models import (
    DEFAULT_CLASS,
    DEFAULT_TEXT,
    STOCK_CLASS,
    STOCK_TEXT,
    converted,
    output_error,
    random_model,
    saved,
)

from flowdit.interop import read_source
from flowdit.interop.diffusers_config import CLASSES
from flowdit.interop.metadata import ForeignConfig

pytest.importorskip("torch", reason="needs torch")

import diffusers
import torch
from interop.exported_files import CLASSES_OF

# Fields of one class or the other; a class ignores the other's.
FOREIGN = {"time_freq_shift": 0.5, "time_scale": 1.0, "mlp_ratio": 3.0, "mlp_norm_eps": 0.1, "qk_norm": True}
HINTS = ForeignConfig(prediction="velocity", vae="openmoji")
HARMLESS = {"dropout", "norm_num_groups", "upcast_attention"}


def class_called(name: str) -> type:
    return getattr(diffusers, name, None) or getattr(CLASSES_OF, name)


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_fields_and_defaults_are_those_of_the_class(name):
    parameters = inspect.signature(class_called(name).__init__).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.name != "self"}
    honoured = CLASSES[name][1].honoured
    assert {field: defaults[field] for field in honoured} == honoured
    unused = {"num_embeds_ada_norm"} if "caption_channels" in defaults else set()  # a table that PixArt does not have
    assert defaults.keys() - honoured.keys() == HARMLESS | unused


@pytest.mark.parametrize(
    ("model", "changes", "removed"),
    [
        (STOCK_CLASS, FOREIGN | {"interpolation_scale": 2.0, "norm_eps": 0.1}, ()),
        (STOCK_TEXT, FOREIGN | {"interpolation_scale": 2.0, "upcast_attention": True}, ()),
        (STOCK_TEXT, {"interpolation_scale": None}, ("attention_type", "norm_eps", "activation_fn")),
        (DEFAULT_CLASS, {"norm_eps": 0.1}, ("mlp_norm_eps", "interpolation_scale", "time_scale")),
        (DEFAULT_TEXT, {"interpolation_scale": None}, ("mlp_norm_eps", "use_additional_conditions", "time_freq_shift")),
    ],
    ids=["class", "text", "text-defaults", "own-class-defaults", "own-text-defaults"],
)
def test_unknown_fields_are_ignored_and_missing_ones_have_defaults(meta, tmp_path, model, changes, removed):
    source = saved(random_model(meta, model), tmp_path / "source.safetensors")
    folder = converted(source, tmp_path / "out", to="diffusers", own_class=model.get("qk_norm", True)) / "transformer"
    without(folder / "config.json", *removed)
    with_json(folder / "config.json", **changes)
    name = json.loads((folder / "config.json").read_text())["_class_name"]
    transformer = class_called(name).from_pretrained(folder, low_cpu_mem_usage=False)
    error = output_error(transformer.eval(), read_source(str(folder), hints=HINTS))
    print(f"relative error {error:.2e}")
    assert error < 1e-5


@pytest.mark.parametrize("name", ["dit", "pixart"])
def test_class_by_its_published_name(stock, tmp_path, name):
    """DiT and PixArt on the hub have the class `Transformer2DModel`, which diffusers maps to one or the other."""
    folder = copied(stock, name, tmp_path)
    with_json(folder / "config.json", _class_name="Transformer2DModel")
    loaded = diffusers.Transformer2DModel.from_pretrained(folder, low_cpu_mem_usage=False)
    assert type(loaded).__name__ == json.loads((stock / name / "config.json").read_text())["_class_name"]
    ours, renamed = (read_source(str(path)).meta.config for path in (stock / name, folder))
    assert renamed == ours
    with_json(folder / "config.json", norm_type="layer_norm")
    assert "must be one of DiTTransformer2DModel, " in unreadable(folder)


# --- contradictions ---

WHOLE = "a valid integer"
NUMBER = "a valid number"
POSITIVE = "greater than 0"
FLAG = "a valid boolean"


@pytest.mark.parametrize(
    ("name", "field", "value", "rule"),
    [
        ("dit", "num_layers", 2.5, WHOLE),
        ("dit", "num_layers", "2", WHOLE),
        ("dit", "num_layers", True, WHOLE),
        ("dit", "num_layers", 3, "2, the number of blocks in its tensors"),
        ("dit", "num_layers", 1, "2, the number of blocks in its tensors"),
        ("dit", "attention_head_dim", 24.0, WHOLE),
        ("dit", "patch_size", [2, 2], WHOLE),
        ("dit", "sample_size", None, WHOLE),
        ("dit", "sample_size", [8, 8], WHOLE),
        ("dit", "norm_eps", "1e-5", NUMBER),
        ("dit", "norm_eps", 0, POSITIVE),
        ("dit", "norm_eps", float("nan"), "a finite number"),
        ("dit", "norm_eps", -1, POSITIVE),
        ("dit", "activation_fn", "geglu", "'gelu-approximate'"),
        ("dit", "norm_type", "layer_norm", "'ada_norm_zero'"),
        ("dit", "attention_bias", False, "True"),
        ("dit", "norm_elementwise_affine", True, "False"),
        ("pixart", "norm_eps", 1e-5, "1e-06"),
        ("pixart", "norm_type", "ada_norm_zero", "'ada_norm_single'"),
        ("pixart", "attention_type", "gated", "'default'"),
        ("pixart", "use_additional_conditions", "false", FLAG),
        ("pixart", "interpolation_scale", -1.0, POSITIVE),
        ("pixart", "interpolation_scale", 10**110, "less than 1000000000000000000000000000000"),
        ("pixart", "caption_channels", None, WHOLE),
    ],
)
def test_fields_of_another_type_or_architecture(stock, tmp_path, name, field, value, rule):
    folder = copied(stock, name, tmp_path)
    with_json(folder / "config.json", **{field: value})
    line = unreadable(folder)
    assert line.startswith(f"{folder / 'config.json'}: {field}: must be {rule}, got {repr(value)[:60]}")


@pytest.mark.parametrize(
    ("name", "field", "value", "tensor"),
    [
        ("dit", "in_channels", 8, "pos_embed.proj.weight of shape [48, 4, 2, 2]"),
        ("dit", "patch_size", 4, "pos_embed.proj.weight of shape [48, 4, 2, 2]"),
        ("dit", "out_channels", 4, "proj_out_2.bias of shape [32]"),
        ("dit", "out_channels", None, "proj_out_2.bias of shape [32]"),
        ("dit", "num_embeds_ada_norm", 1000, "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight of"),
        ("pixart", "out_channels", 16, "proj_out.bias of shape [32]"),
        ("pixart", "caption_channels", 4096, "caption_projection.linear_1.weight of shape [48, 20]"),
        ("pixart", "cross_attention_dim", 1152, "transformer_blocks.0.attn2.to_k.weight of shape [48, 48]"),
    ],
)
def test_sizes_that_the_tensors_do_not_have(stock, tmp_path, name, field, value, tensor):
    folder = copied(stock, name, tmp_path)
    with_json(folder / "config.json", **{field: value})
    line = unreadable(folder)
    assert line.startswith(f"{folder / 'config.json'}: {field}: must fit the tensor {tensor}")
    assert line.endswith(f", got {value}")


def test_heads_that_contradict_the_width(stock, tmp_path):
    folder = copied(stock, "dit", tmp_path)
    with_json(folder / "config.json", num_attention_heads=3)
    assert "num_attention_heads x attention_head_dim: must fit the tensor pos_embed.proj.weight" in unreadable(folder)


def test_mlp_ratio_that_contradicts_the_tensors(meta, tmp_path):
    source = saved(random_model(meta, DEFAULT_CLASS), tmp_path / "source.safetensors")
    folder = converted(source, tmp_path / "out", to="diffusers", own_class=True) / "transformer"
    with_json(folder / "config.json", mlp_ratio=3.0)
    assert "mlp_ratio: must fit the tensor transformer_blocks.0.ff.net.0.proj.bias of shape [192]" in unreadable(folder)
    with_json(folder / "config.json", mlp_ratio=4.0, qk_norm="no")
    assert "qk_norm: must be a valid boolean, got 'no'" in unreadable(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr: must be False, got True"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas: must be None, got [0.1, 0.2]"),
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True},
            "invert_sigmas: must be False, got True",
        ),
    ],
)
def test_schedules_of_another_kind(stock, tmp_path, changes, message):
    folder = tmp_path / "pipeline"
    shutil.copytree(stock / "dit", folder / "transformer")
    (folder / "model_index.json").write_text("{}")
    diffusers.DDIMScheduler(beta_schedule="linear", beta_end=0.02).save_pretrained(folder / "scheduler")
    with_json(folder / "scheduler" / "scheduler_config.json", **changes)
    assert unreadable(folder).endswith(f"scheduler_config.json: {message}")


# --- NaN and infinity ---


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["dit", "pixart"])
def test_tensors_of_nan_or_infinity(stock, tmp_path, name, value):
    def change(tensors):
        tensors["transformer_blocks.1.attn1.to_q.weight"][3, 4] = value

    folder = with_tensors(copied(stock, name, tmp_path), change)
    file = folder / "diffusion_pytorch_model.safetensors"
    message = "tensors must hold finite numbers, but NaN or infinity is in transformer_blocks.1.attn1.to_q.weight"
    assert unreadable(folder) == f"{file}: {message}"


def test_nan_in_a_torch_file(stock, tmp_path):
    state = torch.load(stock / "dit.pt")
    state["blocks.0.mlp.fc1.bias"][:] = torch.nan
    torch.save(state, tmp_path / "dit.pt")
    line = unreadable(tmp_path / "dit.pt", format="dit", num_heads=2)
    assert line.endswith("dit.pt: tensors must hold finite numbers, but NaN or infinity is in blocks.0.mlp.fc1.bias")


# --- flowdit's metadata ---


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("depth", 3, "model.depth must be 2 in flowdit's metadata, as in config.json, got 3"),
        ("interpolation_scale", 2.0, "model.interpolation_scale must be 1.0 in flowdit's metadata, as"),
        ("time_scale", 1.0, "model.time_scale must be 1000.0 in flowdit's metadata, as"),
        ("qk_norm", False, "model.qk_norm must be True in flowdit's metadata, as"),
    ],
)
def test_metadata_that_disagree_with_the_config(meta, tmp_path, field, value, message):
    source = saved(random_model(meta, DEFAULT_CLASS), tmp_path / "source.safetensors")
    folder = converted(source, tmp_path / "exported", to="diffusers", own_class=True)
    stored = json.loads((folder / "flowdit.json").read_text())
    stored["config"]["model"][field] = value
    (folder / "flowdit.json").write_text(json.dumps(stored))
    assert unreadable(folder).startswith(f"{folder}: {message}")
