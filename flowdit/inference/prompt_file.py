"""A text file with one prompt per line."""

from __future__ import annotations

from pathlib import Path

from flowdit.fields import require


def read_prompts(file: str) -> list[str]:
    """The lines that are not empty. Raises `ValueError` naming `prompts_file` if there are none or it cannot be read."""
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as problem:
        raise ValueError(f"prompts_file: {file} cannot be read: {problem}") from None
    prompts = [line.strip() for line in lines if line.strip()]
    require("prompts_file", file, bool(prompts), "must hold at least one prompt")
    return prompts
