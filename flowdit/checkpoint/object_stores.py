"""Orbax with `s3://` folders, which version 0.12 refuses although TensorStore, which writes its arrays, has a driver.

Importing this module replaces the one function of Orbax that names the driver of a folder. Other folders, also of
`gs://`, get what they got before.
"""

from __future__ import annotations

import os
import urllib.parse
from typing import Any

import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint._src.serialization import tensorstore_utils

from flowdit import stores
from flowdit.checkpoint.files import ITEMS, STEP_NAME, TEMPORARY_SUFFIX
from flowdit.storage import has_been_committed, is_remote

_build_kvstore_tspec = tensorstore_utils.build_kvstore_tspec


def _with_s3(directory: str, *args: Any, **kwargs: Any) -> Any:
    """TensorStore's specification of a folder; of one in S3 that of the same folder of `gs://` with the other driver."""
    scheme, _, inside = str(directory).partition("://")
    if scheme != "s3":
        return _build_kvstore_tspec(directory, *args, **kwargs)
    return _of_s3(_build_kvstore_tspec(f"gs://{inside}", *args, **kwargs))


tensorstore_utils.build_kvstore_tspec = _with_s3


def _of_s3(spec: Any) -> Any:
    if not isinstance(spec, dict):
        return spec
    spec = {name: _of_s3(value) for name, value in spec.items()}
    return spec | _s3_driver() if spec.get("driver") == "gcs" else spec


def _s3_driver() -> dict[str, Any]:
    """Driver, endpoint and credentials as s3fs has them, from the environment or `~/.aws`."""
    client = stores.file_system("s3").s3.meta
    driver: dict[str, Any] = {"driver": "s3"}
    if not (urllib.parse.urlsplit(client.endpoint_url).hostname or "").endswith(".amazonaws.com"):
        driver |= {"endpoint": client.endpoint_url, "aws_region": client.region_name or "us-east-1"}
    if "AWS_ACCESS_KEY_ID" in os.environ:
        # Without this it looks for `~/.aws` first, and prints errors if there is none.
        driver["aws_credentials"] = {"type": "environment"}
    return driver


def remove_unfinished(folder: epath.Path) -> None:
    """Remove what killed saves have left in a run folder of an object store: steps without the last object.

    Folders that hold anything but parts of a checkpoint stay: they may be runs with numbers for names.
    """
    if not is_remote(folder) or not folder.is_dir():
        return
    for path in folder.iterdir():
        if STEP_NAME.fullmatch(path.name) and not has_been_committed(path) and all(map(_is_part, path.iterdir())):
            path.rmtree(missing_ok=True)


def _is_part(path: epath.Path) -> bool:
    """Whether a file or folder in a step's folder is one that a save writes."""
    name = path.name
    return name.startswith(("_CHECKPOINT_METADATA", "checksums")) or name.removesuffix(TEMPORARY_SUFFIX) in ITEMS


def atomicity(folder: os.PathLike) -> ocp.options.AtomicityOptions:
    """How a checkpoint is finished: by renaming its folder, or in an object store by a last object."""
    modes = ocp.options.AtomicityMode
    return ocp.options.AtomicityOptions(mode=modes.COMMIT_FILE if is_remote(folder) else modes.AUTO)
