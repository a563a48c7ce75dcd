"""Damaged files written by flowdit: one clear line."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from interop.foreign_folders import TIME_WEIGHT, refused, with_json, with_tensors
from interop.small_models import STOCK_CLASS, STOCK_TEXT, random_model, saved
from runs import call

from flowdit.convert import main as convert
from flowdit.interop import ConvertConfig, from_pretrained
from flowdit.interop import convert as convert_model


def test_damaged_flowdit_files(whole_run, tmp_path):
    exported = tmp_path / "exported"
    assert (
        call(
            convert, f"source={whole_run / '6'}", f"target={exported}", "to=diffusers", "own_class=true", "image=none"
        ).status
        == 0
    )
    with_json(exported / "flowdit.json", config={"model": {"depth": "x"}})
    assert "metadata" in refused(exported) or "depth" in refused(exported)
    (exported / "flowdit.json").write_text("{")
    assert "flowdit.json: is not JSON" in refused(exported)
    file = tmp_path / "single.safetensors"
    safetensors.numpy.save_file({"a": np.zeros(2)}, file, {"flowdit": "{}"})
    assert "metadata: format: is missing" in refused(file)


def test_damaged_exports(meta, tmp_path):
    """In flowdit's folders the copies of an embedder are compared too, and the null caption must exist."""
    for name, model in (("class", STOCK_CLASS), ("text", STOCK_TEXT)):
        source = saved(random_model(meta, model), tmp_path / f"{name}.safetensors")
        convert_model(ConvertConfig(source=source, target=str(tmp_path / name), to="diffusers", image="none"))

    def change(tensors):
        tensors[TIME_WEIGHT.format(1)] += 1

    line = refused(with_tensors(tmp_path / "class" / "transformer", change).parent)
    assert f"{TIME_WEIGHT.format(1)} must equal {TIME_WEIGHT.format(0)}" in line
    for damaged in (None, [[1.0, 2.0]], "text"):
        with_json(tmp_path / "text" / "model_index.json", null_caption=damaged)
        line = refused(tmp_path / "text")
        assert re.search(r"model_index.json: null_caption must hold the numbers of an array \[\d+\]$", line)


def test_flipped_byte_in_a_checkpoint(whole_run, tmp_path):
    folder = Path(shutil.copytree(whole_run / "6", tmp_path / "6"))
    victim = max((p for p in (folder / "model_ema").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    assert "content differs from its checksum" in refused(folder)


def test_from_pretrained_has_the_same_errors(tmp_path):
    with pytest.raises(ValueError, match="must be a checkpoint .* it is empty$"):
        from_pretrained(str(tmp_path))
