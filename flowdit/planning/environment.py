"""Environment of the TPU compiler where there is no TPU. Standard library only: JAX reads it when it starts."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence

COMPILER_ONLY = {
    "TPU_SKIP_MDS_QUERY": "1",  # no question to a metadata server about the TPUs of this machine
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",  # any: without it, and the next, libtpu prints errors
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several plans at once, or beside a run
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}


@contextlib.contextmanager
def compiler_only() -> Iterator[None]:
    """Set what libtpu reads when it is loaded; what the user has set stays.

    Afterwards it is removed: JAX would take the machine for a host of a TPU slice.
    """
    missing = COMPILER_ONLY.keys() - os.environ.keys()
    os.environ.update({name: COMPILER_ONLY[name] for name in missing})
    try:
        yield
    finally:
        for name in missing:
            os.environ.pop(name, None)


def leave_devices_alone(arguments: Sequence[str]) -> None:
    """Before JAX starts: if `arguments` name only TPUs, use none of this machine's devices."""
    if any(re.fullmatch(r"topology=\[?(v\d+\w*:[\dx]+,? *)+\]?", argument.lower()) for argument in arguments):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
