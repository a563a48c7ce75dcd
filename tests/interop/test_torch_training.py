"""Training an exported model in torch as in docs/interchange.md, and importing the result."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from interop.foreign_folders import refused, without
from interop.small_models import (
    DEFAULT_CLASS,
    DEFAULT_TEXT,
    STOCK_CLASS,
    STOCK_TEXT,
    converted,
    output_error,
    random_model,
    saved,
    text_inputs,
)
from runs import LATENT_SHAPE, REPOSITORY, train_here

from flowdit.interop import from_pretrained, read_source
from flowdit.interop.metadata import ForeignConfig

pytest.importorskip("torch", reason="needs torch")

import diffusers
import torch
from interop.exported_files import CLASSES_OF

EMBEDDER = "transformer_blocks.{}.norm1.emb.class_embedder.embedding_table.weight"


def documented() -> tuple[str, str, str]:
    """The section's code: training, sharing the embedder before the optimizer, copying it before saving."""
    text = (REPOSITORY / "docs" / "interchange.md").read_text()
    section = text.split("### Further training in torch\n")[1].split("\n### ")[0]
    training, share, separate = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    return training, share, separate


def train_as_documented(is_stock: bool, saving: str = 'pipe.save_pretrained("tuned")') -> torch.nn.Module:
    """Train two steps from `exported` to `tuned`; return the transformer."""
    training, share, separate = documented()
    if is_stock:
        training = training.replace("optimizer = ", f"{share}optimizer = ", 1)
        training = training.replace("pipe.save_pretrained", f"{separate}pipe.save_pretrained", 1)
    torch.manual_seed(0)
    batches = [(torch.randn(4, *LATENT_SHAPE), torch.tensor([0, 1, 2, 3])) for _ in range(2)]
    variables = {"batches": batches}
    exec(training.replace('pipe.save_pretrained("tuned")', saving), variables)
    return variables["transformer"].eval()


def exported(meta, model, tmp_path: Path):
    """A random model, exported to the folder `exported`."""
    portable = random_model(meta, model)
    source = saved(portable, tmp_path / "source.safetensors")
    converted(source, Path("exported"), to="diffusers", own_class=model.get("qk_norm", True))
    return portable


SAVINGS = {
    "safetensors": 'pipe.save_pretrained("tuned")',
    "bin": 'pipe.save_pretrained("tuned", safe_serialization=False)',
    "shards": 'pipe.save_pretrained("tuned", safe_serialization=False, max_shard_size="100KB")',
}


@pytest.mark.parametrize(
    ("model", "saving"),
    [
        (DEFAULT_CLASS, "safetensors"),
        (STOCK_CLASS, "safetensors"),
        (STOCK_CLASS, "bin"),
        (DEFAULT_CLASS, "shards"),
    ],
    ids=["own", "stock", "bin", "shards"],
)
def test_class_model_is_imported_with_its_metadata(meta, tmp_path, messages, model, saving):
    portable = exported(meta, model, tmp_path)
    transformer = train_as_documented(model is STOCK_CLASS, SAVINGS[saving])
    messages_before = messages()
    back = read_source("tuned")
    assert back.meta == portable.meta and messages() == messages_before
    assert output_error(transformer, back) < 1e-5
    moved = {name: np.abs(array - portable.arrays[name]).max() for name, array in back.arrays.items()}
    assert min(moved.values()) > 1e-5, moved


@pytest.mark.parametrize("model", [DEFAULT_TEXT, STOCK_TEXT], ids=["own", "stock"])
def test_text_model_saved_into_the_exported_folder(meta, tmp_path, model):
    portable = exported(meta, model, tmp_path)
    pipe = diffusers.DiffusionPipeline.from_pretrained("exported", trust_remote_code=True)
    transformer = pipe.transformer
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=1e-3)
    features, mask = map(torch.from_numpy, text_inputs())
    condition = {"encoder_hidden_states": features, "encoder_attention_mask": mask}
    transformer(
        torch.randn(2, *LATENT_SHAPE), timestep=torch.tensor([500.0, 10.0]), **condition
    ).sample.sum().backward()
    optimizer.step()
    transformer.save_pretrained("exported/transformer")
    pipe.save_pretrained("tuned")
    for folder in ("exported", "tuned"):
        back = read_source(folder)
        assert back.meta == portable.meta
        assert output_error(transformer.eval(), back) < 1e-5
        assert np.abs(back.arrays["patch_embed.weight"] - portable.arrays["patch_embed.weight"]).max() > 1e-5
        np.testing.assert_array_equal(back.arrays["null_caption"], portable.arrays["null_caption"])


def test_from_a_run_through_torch_to_a_run_and_images(whole_run, tiny_data, tmp_path):
    converted(whole_run / "6", Path("exported"), to="diffusers", own_class=True)
    train_as_documented(is_stock=False)
    checkpoint = converted("tuned", tmp_path / "checkpoint")
    options = ("train.num_steps=1", "optim.warmup_steps=0", f"train.init_from={checkpoint}")
    finished = train_here(tiny_data, tmp_path / "run", *options)
    assert finished.status == 0, finished.err
    assert "with another mean and scale" not in finished.out
    images = from_pretrained(str(checkpoint)).sample()  # those of the previews, which other tests draw too
    assert {image.size for image in images} == {(64, 64)} and np.ptp(np.asarray(images[0])) > 50


# --- one embedder for all blocks ---


def small_class_model() -> torch.nn.Module:
    torch.manual_seed(0)
    model = CLASSES_OF.FlowDiTClassTransformer(4, 12, 4, num_layers=2, sample_size=8, num_embeds_ada_norm=10)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape))
    return model


def test_own_class_has_one_embedder_and_saves_a_copy_for_each_block(tmp_path):
    model = small_class_model()
    first, second = (block.norm1.emb for block in model.transformer_blocks)
    assert first is second
    state = model.state_dict()
    assert torch.equal(state[EMBEDDER.format(0)], state[EMBEDDER.format(1)])
    assert state[EMBEDDER.format(0)].data_ptr() != state[EMBEDDER.format(1)].data_ptr()
    model.save_pretrained(tmp_path / "model")
    stock, info = diffusers.DiTTransformer2DModel.from_pretrained(
        tmp_path / "model", output_loading_info=True, low_cpu_mem_usage=False
    )
    assert not any(info.values()), info
    x = torch.randn(2, 4, 8, 8)
    t = torch.tensor([3.0, 500.0])
    labels = torch.tensor([1, 10])
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x, t, labels).sample, stock.eval()(x, t, labels).sample)


def test_own_class_drops_a_label_for_all_blocks_at_once():
    model = small_class_model()
    x, t = torch.randn(1, 4, 8, 8).expand(200, -1, -1, -1), torch.full((200,), 500.0)
    with torch.no_grad():
        label, null = (model.eval()(x[:1], t[:1], torch.tensor([number])).sample for number in (3, 10))
        outputs = model.train()(x, t, torch.full((200,), 3)).sample
    is_label, is_null = (torch.isclose(outputs, one, atol=1e-5).all((1, 2, 3)) for one in (label, null))
    assert (is_label ^ is_null).all()
    assert 5 <= is_null.sum() <= 40  # of 200, one in ten


def test_embedders_that_were_trained_separately(meta, tmp_path):
    exported(meta, STOCK_CLASS, tmp_path)
    training, _, _ = documented()
    exec(training, {"batches": [(torch.randn(4, *LATENT_SHAPE), torch.tensor([0, 1, 2, 3]))] * 2})
    line = refused(Path("tuned"))
    assert re.search(
        r"tuned: transformer_blocks\.1\.norm1\.emb\.\S+ must equal transformer_blocks\.0\.norm1\.emb\.\S+: "
        r"all blocks must share one embedder during training in torch \(docs/interchange\.md\)$",
        line,
    )


# --- required and optional files ---


def test_saved_pipeline_without_its_metadata(meta, tmp_path, messages):
    """Otherwise the normalisation would be the VAE's, and silently wrong."""
    exported(meta, DEFAULT_CLASS, tmp_path)
    shutil.move("exported/flowdit.json", "flowdit.json")
    without(Path("exported/model_index.json"), "flowdit")
    message = "must hold flowdit.json, like the folder that its pipeline was loaded from"
    assert refused(Path("exported")) == f"error: source: exported {message}"
    hints = ForeignConfig(prediction="velocity", vae="openmoji")
    read_source("exported/transformer", hints=hints)
    warning = "exported/transformer has no flowdit metadata: latents are assumed to be normalised by shift and scale"
    assert messages()[-1].startswith(warning)
    shutil.move("flowdit.json", "exported/flowdit.json")
    assert read_source("exported").meta.dump()["manifest"] == meta["manifest"]


def test_state_dict_that_torch_saved(stock, tmp_path):
    for name in ("dit", "pixart"):
        folder = Path(shutil.copytree(stock / name, tmp_path / name))
        cls = json.loads((folder / "config.json").read_text())["_class_name"]
        state = getattr(diffusers, cls).from_pretrained(folder, low_cpu_mem_usage=False).state_dict()
        (folder / "diffusion_pytorch_model.safetensors").unlink()
        torch.save(state, folder / "diffusion_pytorch_model.bin")
        expected = read_source(str(stock / name)).arrays
        for key, array in read_source(str(folder)).arrays.items():
            np.testing.assert_array_equal(array, expected[key], err_msg=key)
        torch.save(state, tmp_path / "state.pt")
        message = "; a diffusers model is read as a folder, with its config.json"
        assert refused(tmp_path / "state.pt").endswith(message)


def test_bin_file_next_to_safetensors(stock, tmp_path, messages):
    folder = Path(shutil.copytree(stock / "dit", tmp_path / "dit"))
    torch.save({}, folder / "diffusion_pytorch_model.bin")
    read_source(str(folder))
    message = f"{folder} also holds diffusion_pytorch_model.bin, which is ignored: the safetensors file is read"
    assert message in messages()
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    assert "dit must hold tensors of transformer_blocks.0, none found" in refused(folder)
