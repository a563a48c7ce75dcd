"""What the processes of a run must have in common, checked before any work on the devices."""

from __future__ import annotations

import contextlib
import secrets
import time

import jax
from etils import epath

from flowdit.processes import from_first, gather, require_equal

_VISIBLE_SECONDS = 10.0
"""Network file systems may show a new file to other hosts only after some seconds."""


def require_one_data_set(data_id: str) -> None:
    """Raise `ValueError` unless all processes read the data set with this id."""
    require_equal({"data.path": f"the data set {data_id[:12]}"})


def require_shared_folder(folder: epath.Path) -> None:
    """Raise `ValueError` unless all processes see in `folder` what the first one writes there."""
    if jax.process_count() == 1:
        return
    token = folder / from_first(lambda: _new_token(folder))
    seen = gather(_appears(token))
    from_first(token.unlink)
    if not all(seen):
        raise ValueError(
            f"train.checkpoint_dir: must be a folder that all processes share, process {seen.index(False)} does not see "
            f"what process 0 writes to {folder}"
        )


def _new_token(folder: epath.Path) -> str:
    name = f".shared-{secrets.token_hex(8)}"
    (folder / name).write_text("")
    return name


def _appears(file: epath.Path) -> bool:
    end = time.monotonic() + _VISIBLE_SECONDS
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            if file.exists():
                return True
        time.sleep(0.1)
    return False
