"""The settings of `python -m flowdit.inspect`."""

from __future__ import annotations

import dataclasses

from flowdit.fields import FREE_TEXT, require
from flowdit.storage import require_local


@dataclasses.dataclass
class InspectConfig:
    """Settings of `python -m flowdit.inspect`.

    Attributes:
        data: folder of the data set, also in an object store (`s3://`, `gs://`).
        originals: the images that the data set was made of, like `source` of `flowdit.prepare`; empty: none are shown.
        num_images: records whose latents are decoded and shown, evenly spaced; 0: none, and no VAE is loaded.
        num_outliers: records shown of each kind of outlier.
        max_records: records that the histograms and outliers are taken from, evenly spaced over the data set; of an
            object store, the records of as many whole shards.
        vae: VAE that decodes the latents, by folder or hub id; null: the one that is named in the data set.
        text_cache: folder of the text features, for the numbers of tokens; null: `text_features` in `data`, if it is
            there.
        title: title of the page; null: the name of the folder.
        out: the HTML file. An earlier page of this command is replaced, another file is not.
    """

    data: str = "???"
    originals: str = dataclasses.field(default="", metadata=FREE_TEXT)
    num_images: int = 32
    num_outliers: int = 8
    max_records: int = 20_000
    vae: str | None = None
    text_cache: str | None = None
    title: str | None = dataclasses.field(default=None, metadata=FREE_TEXT)
    out: str = "inspection.html"

    def check(self) -> None:
        """Raise `FieldError` naming the first field that breaks a rule."""
        for name in ("num_images", "num_outliers"):
            value = getattr(self, name)
            require(name, value, 0 <= value <= 1000, "must be in [0, 1000]")
        require("max_records", self.max_records, self.max_records >= 1, "must be at least 1")
        require("out", self.out, self.out.lower().endswith(".html"), "must be a file that ends in .html")
        require_local("out", self.out)
