"""Finding a source, locally or on the Hugging Face hub, and uploading a folder."""

from __future__ import annotations

import re
from pathlib import Path

import huggingface_hub
from etils import epath

from flowdit.checkpoint.retention import is_best_name
from flowdit.errors import first_line
from flowdit.storage import connect, is_remote

# Data only: code in a repository is neither downloaded nor run.
ITEMS = ("meta/*", "model_ema/*", "state/*", "dataset/*", "_CHECKPOINT_METADATA")  # of a flowdit checkpoint
PATTERNS = ("*.json", "*.safetensors", *ITEMS)
BIN = ("transformer/*.bin", "diffusion_pytorch_model*.bin")
UNUSED = ("text_encoder*/*", "safety_checker/*", "image_encoder/*")  # parts of pipelines; the first may be 20 GB


def find_source(name: str) -> epath.Path:
    """The local file or folder `name`, also `<run>/best`, or else a download from the hub. Raises `ValueError` if there is neither."""
    path = connect(name)
    if path.exists() or is_best_name(path):
        return path
    if is_remote(path):
        raise ValueError(f"there is no checkpoint or run folder {name}")
    is_local = path.parent != epath.Path() and path.parent.is_dir()
    if is_local or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        raise ValueError(f"there is no file or folder {name}")
    try:
        folder = _download(name, PATTERNS)
        # Repositories often hold their weights in both formats: `.bin` is only fetched if there is no safetensors.
        return epath.Path(folder if _has_weights(folder) else _download(name, (*PATTERNS, *BIN)))
    except Exception as problem:  # the client raises the errors of its HTTP library
        reason = first_line(problem)
        raise ValueError(
            f"must be a file, a folder or a reachable Hugging Face hub id, not {name!r} "
            f"({type(problem).__name__}: {reason})"
        ) from None


def _download(name: str, patterns: tuple[str, ...]) -> Path:
    return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(patterns), ignore_patterns=list(UNUSED)))


def _has_weights(folder: Path) -> bool:
    own = folder / "transformer" if (folder / "transformer").is_dir() else folder
    return (folder / "meta").is_dir() or any(own.glob("*.safetensors"))


def push(folder: Path, repo_id: str, private: bool) -> str:
    """Upload `folder` as a model repository and return its address. Raises `ValueError` if the hub refuses."""
    api = huggingface_hub.HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True, repo_type="model")
        if folder.is_file():
            api.upload_file(path_or_fileobj=folder, path_in_repo=folder.name, repo_id=repo_id)
        else:
            api.upload_folder(folder_path=folder, repo_id=repo_id)
    except Exception as problem:
        reason = first_line(problem)
        raise ValueError(
            f"push_to_hub: {repo_id} cannot be written ({type(problem).__name__}: {reason}); {folder} is complete"
        ) from None
    return f"{api.endpoint}/{repo_id}"
