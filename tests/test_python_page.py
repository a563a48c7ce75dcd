"""The examples of docs/python.md run, in their order."""

import re
from pathlib import Path

import pytest
from runs import REPOSITORY

PAGE = REPOSITORY / "docs" / "python.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def test_all_examples_run(tiny_data, whole_run, capsys):
    pytest.importorskip("wordllama")
    for folder in ("pretrained", "data"):
        Path(folder).mkdir()
    Path("pretrained/openmoji").symlink_to(whole_run / "6")  # smaller, on latents of the same shape
    Path("data/openmoji").symlink_to(tiny_data)
    page = PAGE.read_text()
    blocks = list(BLOCK.finditer(page))
    assert len(blocks) > 10
    names: dict = {"__name__": "page"}
    for block in blocks:
        line = page[: block.start()].count("\n") + 1
        # Padded, so that errors have the line of the page.
        exec(compile("\n" * line + block[1], str(PAGE), "exec"), names)
    printed = capsys.readouterr().out
    assert "(4, 64, 64, 3) uint8\n" in printed
    assert "(2, 16, 8, 8) [2 2] [1, 3]\n" in printed
    assert "(2, 16, 256) float32\n[3 0] [False False]\n" in printed
    assert Path("heart.png").is_file() and Path("exported/model.safetensors").is_file()
