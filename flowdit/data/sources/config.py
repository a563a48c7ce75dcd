"""Settings of a source of images: where it is, and what its columns are."""

import dataclasses
from dataclasses import dataclass

from flowdit.fields import FREE_TEXT, require


@dataclass
class SourceConfig:
    """Which images, and what is known about them.

    A column is a field of a table (Parquet, Hugging Face, a file of captions), the suffix of a file in a WebDataset tar
    (`txt`, `cls`), or a field of its `.json` file.

    Attributes:
        source: `openmoji` (embedded), `emoji_styles` (in the repository), or images by path: a folder with one
            sub-folder per class, or without labels; a folder or file of WebDataset tars or of Parquet; a folder of
            Hugging Face `datasets`. Several files by `*` or `{000..099}`, in quotes. Local, or at `s3://`, `gs://`,
            `https://`. The kind is seen from the files; name it with `folder:`, `webdataset:`, `parquet:`,
            `huggingface:` or a registered source before the path.
        captions: captions of a folder: a JSON Lines file with `file` (path of an image within `source`),
            `short_caption` and optionally `long_caption`, or with `file_name` and `text`; a CSV file with such columns;
            `side_files` for a `.txt` or `.json` file beside each image. Empty: `metadata.jsonl` or `metadata.csv` in
            the folder, if there is one.
        split: split of a Hugging Face data set, such as `train`; needed if it has several.
        image_column: column of the images; empty: found by its type or name.
        label_column: column of the labels; empty: `label` or `cls`, if there is one. Of `emoji_styles`: `subgroup`
            (empty: this), `style` or `both`.
        caption_column: column of the captions, or of the short ones; empty: `short_caption`, `caption`, `text` or `txt`,
            if there is one.
        long_caption_column: column of the long captions; empty: `long_caption`, if there is one.
        key_column: column of the name by which an image is known, and held out; empty: the name of its file, or the
            number of its row.
        keep_columns: columns that are copied to the records, such as `license` or `url`.
        limit: number of images that are read, from the beginning, to try; null: all.
        held_out_fraction: fraction of the images in the validation split, in [0, 1), chosen by their names; fixed for
            `openmoji` and `emoji_styles`.
        records_per_shard: records of a file; null: about 128 files of 512 to 16,384. A tar is always one file.
    """

    source: str = dataclasses.field(default="openmoji", metadata=FREE_TEXT)
    captions: str = dataclasses.field(default="", metadata=FREE_TEXT)
    split: str = ""
    image_column: str = dataclasses.field(default="", metadata=FREE_TEXT)
    label_column: str = dataclasses.field(default="", metadata=FREE_TEXT)
    caption_column: str = dataclasses.field(default="", metadata=FREE_TEXT)
    long_caption_column: str = dataclasses.field(default="", metadata=FREE_TEXT)
    key_column: str = dataclasses.field(default="", metadata=FREE_TEXT)
    keep_columns: list[str] = dataclasses.field(default_factory=list)
    limit: int | None = None
    held_out_fraction: float = 0.05
    records_per_shard: int | None = None

    def check(self) -> None:
        """Raise `FieldError` naming the first field that breaks a rule."""
        for name in ("limit", "records_per_shard"):
            value = getattr(self, name)
            require(name, value, value is None or value >= 1, "must be at least 1")
        fraction = self.held_out_fraction
        require("held_out_fraction", fraction, 0 <= fraction < 1, "must be in [0, 1)")
