"""Where a source is: a local path, or a repository of the Hugging Face hub; and a folder's way there."""

from __future__ import annotations

import re
from pathlib import Path

import huggingface_hub

# Data only: code that a repository may carry is neither downloaded nor run.
ITEMS = ("meta/*", "model_ema/*", "state/*", "dataset/*", "_CHECKPOINT_METADATA")  # of a flowdit checkpoint
PATTERNS = ("*.json", "*.safetensors", *ITEMS)
BIN = ("transformer/*.bin", "diffusion_pytorch_model*.bin")
UNUSED = ("text_encoder*/*", "safety_checker/*", "image_encoder/*")  # of pipelines; the first may be 20 GB


def find_source(name: str) -> Path:
    """The file or folder called `name`, downloaded from the hub if it is not here. Raises `ValueError` if it is neither."""
    path = Path(name)
    if path.exists():
        return path
    is_local = path.parent != Path() and path.parent.is_dir()
    if is_local or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        raise ValueError(f"source: there is no file or folder {name}")
    try:
        folder = _download(name, PATTERNS)
        # Repositories often hold their weights in both formats: the other one is fetched where it is the only one.
        return folder if _has_weights(folder) else _download(name, (*PATTERNS, *BIN))
    except Exception as problem:  # the client lets the errors of its HTTP library through, whichever that is
        reason = str(problem).strip().partition("\n")[0]
        raise ValueError(
            f"source: must be a file, a folder or a reachable Hugging Face hub id, not {name!r} "
            f"({type(problem).__name__}: {reason})"
        ) from None


def _download(name: str, patterns: tuple[str, ...]) -> Path:
    return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(patterns), ignore_patterns=list(UNUSED)))


def _has_weights(folder: Path) -> bool:
    own = folder / "transformer" if (folder / "transformer").is_dir() else folder
    return (folder / "meta").is_dir() or any(own.glob("*.safetensors"))


def push(folder: Path, repo_id: str, private: bool) -> str:
    """Upload what is in `folder` as a model repository; its address. Raises `ValueError` if the hub refuses."""
    api = huggingface_hub.HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True, repo_type="model")
        if folder.is_file():
            api.upload_file(path_or_fileobj=folder, path_in_repo=folder.name, repo_id=repo_id)
        else:
            api.upload_folder(folder_path=folder, repo_id=repo_id)
    except Exception as problem:
        reason = str(problem).strip().partition("\n")[0]
        raise ValueError(
            f"push_to_hub: {repo_id} cannot be written ({type(problem).__name__}: {reason}); {folder} is complete"
        ) from None
    return f"{api.endpoint}/{repo_id}"
