"""flowdit: flow-matching Diffusion Transformers in JAX and Equinox.

```python
import flowdit

sampler = flowdit.load("pretrained/openmoji")
for images in sampler.draw(labels=["heart"] * 8, seed=0):  # uint8 (n, height, width, 3)
    ...
```
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowdit.inference.sampler import Sampler
    from flowdit.interop.loading import load

__all__ = ["Sampler", "load"]
__version__ = "0.1.0"

# Without a handler of the program's own, Python would print warnings on stderr.
logging.getLogger(__name__).addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    """Import on first access, as `flowdit.train` sets environment variables before JAX starts."""
    if name == "load":
        from flowdit.interop.loading import load

        return load
    if name == "Sampler":
        from flowdit.inference.sampler import Sampler

        return Sampler
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
