"""Settings of `python -m flowdit.serve`."""

from __future__ import annotations

import dataclasses

from flowdit.diffusion.sampling import check_count
from flowdit.fields import require

MOST_IMAGES = 64
"""Images of a draw are one batch."""


@dataclasses.dataclass
class ServeConfig:
    """Settings of `python -m flowdit.serve`. Defaults of the page's own settings are those of the training previews.

    Attributes:
        checkpoint: a checkpoint, a run folder (its newest intact checkpoint), or another `source` of `flowdit.convert`.
        compare: a second one, drawn beside the first with the same noise; of the same kind and latents.
        guide: a weaker model that guides the first in place of the null condition (autoguidance); null: none.
        vae: folder or hub id of the VAE of the latents; null: the one used by `prepare`.
        text_encoder: folder or hub id of the text encoder; null: the one of the training run.
        host: address to listen on; 127.0.0.1: this machine only, 0.0.0.0: everyone who reaches the machine.
        port: port to listen on; 0: a free one.
        root_path: path of the page behind a proxy that passes on a part of its addresses, such as `/flowdit`.
        title: heading of the page; null: the name of the checkpoint.
        max_images: most images of a draw; at most 64.
        max_steps: most steps of the solver.
        max_prompt: most characters of a prompt, and of a negative prompt.
        max_upload: most megabytes of a request.
        max_waiting: most draws that wait for their turn; one more is refused.
        max_waiting_each: most draws of one visitor (address) that wait or run.
        frames: pictures of the path from noise to image; 0: none, else at least 2.
    """

    checkpoint: str = "???"
    compare: str | None = None
    guide: str | None = None
    vae: str | None = None
    text_encoder: str | None = None
    host: str = "127.0.0.1"
    port: int = 7860
    root_path: str = ""
    title: str | None = None
    max_images: int = 16
    max_steps: int = 100
    max_prompt: int = 1000
    max_upload: int = 16
    max_waiting: int = 24
    max_waiting_each: int = 4
    frames: int = 13

    def check(self) -> None:
        """Raise `FieldError` naming the first field that breaks a rule."""
        for name in ("max_images", "max_steps", "max_prompt", "max_upload", "max_waiting", "max_waiting_each"):
            check_count(name, getattr(self, name))
        require("max_images", self.max_images, self.max_images <= MOST_IMAGES, f"must be at most {MOST_IMAGES}")
        require("port", self.port, 0 <= self.port < 2**16, "must be in [0, 65536)")
        is_path = not self.root_path or (self.root_path.startswith("/") and not self.root_path.endswith("/"))
        require("root_path", self.root_path, is_path, "must begin with / and not end with it")
        require("frames", self.frames, self.frames == 0 or 2 <= self.frames <= 60, "must be 0, or in [2, 60]")
