"""Environment of a process that uses the TPU compiler without a TPU. Standard library only: it is set before JAX starts."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

COMPILER_ONLY = {
    "TPU_SKIP_MDS_QUERY": "1",  # no question to a metadata server about the TPUs of this machine
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",  # any: without it, and the next, libtpu prints errors
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several plans at once, or beside a run
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}


def use_compiler_only(arguments: Sequence[str] = ()) -> None:
    """Set the environment; what the user has set stays. If `arguments` name only TPUs, JAX leaves all devices alone.

    Programs for TPUs that are not there cannot be read back from JAX's compilation cache, so it is off then.
    """
    for name, value in COMPILER_ONLY.items():
        os.environ.setdefault(name, value)
    if any(re.fullmatch(r"topology=\[?(v\d+\w*:[\dx]+,? *)+\]?", argument.lower()) for argument in arguments):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
