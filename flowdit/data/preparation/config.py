"""The settings of `prepare`."""

import dataclasses
from dataclasses import dataclass, field

from flowdit.data.images import MAX_PIXELS
from flowdit.data.preparation import buckets
from flowdit.data.preparation.engines import RayConfig, check_engine
from flowdit.data.preparation.filters import FilterConfig
from flowdit.data.sources.config import SourceConfig
from flowdit.features import FEATURES, FeatureWeights
from flowdit.fields import FREE_TEXT, require, require_choice, under
from flowdit.models.text_encoder import DTYPES as TEXT_DTYPES
from flowdit.storage import require_local

VAES = {"emoji_styles": "emoji"}
"""The embedded VAE that was trained on a source."""


@dataclass
class PrepareConfig(SourceConfig):
    """Settings of `python -m flowdit.prepare`.

    Attributes:
        out: folder of the data set; empty: `data/<name of the source>`.
        vae: `openmoji` or `emoji` (embedded), or a diffusers AutoencoderKL by folder or hub id; empty: `emoji` for the
            source `emoji_styles`, otherwise `openmoji`.
        image_size: side in pixels to which images are resized and cropped; a multiple of the VAE's stride. With buckets
            the side of a square one; the others have about its area.
        buckets: aspect ratios of the crops; null: all are square. `pixart`: the 40 sizes of PixArt's tables, from 0.25
            to 4.0; `computed`: those of `bucket_ratios`. An image goes to the bucket of the nearest ratio.
        bucket_ratios: height / width of computed buckets.
        bucket_multiple: pixels of which the sides of computed buckets are multiples; null: twice the VAE's stride, as
            most models have patches of 2.
        min_bucket_records: training images that a bucket must have; those of a smaller one go to the nearest bucket that
            has enough.
        batch_size: images per encoding batch.
        posterior_std: also store the posterior's standard deviation, so that training samples a new latent each time.
        hflip: add a mirrored copy of each training image.
        dtype: dtype of the latents on disk, `float16` or `float32`.
        license: licence of the images, for the manifest; empty: the source's own. To correct it later, repeat the
            command with another one.
        attribution: attribution of the images, for the manifest; empty: the source's own. Corrected in the same way.
        vae_check: number of evenly spread images that the VAE first encodes and decodes; their PSNR is printed, with a
            warning below 24 dB on average, and `vae_check.png` shows them beside their reconstructions. 0: none.
        max_rejected: fraction of the images, rounded up, that may be unreadable; they are left out and listed with the
            reason in `rejected.jsonl`. One more ends the run.
        max_pixels: pixels of the largest image that is decoded; larger ones are left out like unreadable ones.
        text_encoder: encoder for a cache of caption features, like `text.encoder` in training; empty: none.
        text_dtype: dtype of these features, `bfloat16` or `float32`.
        text_max_length: maximum number of tokens; longer captions are cut.
        text_cache: folder of the features; empty: `text_features` in `out`.
        features: feature network whose maps of the training images are written to a cache, for auxiliary losses:
            `efficientnet` (embedded), `inception`, `dinov2` or `clip`; empty: none. Give it also for a data set that is
            finished.
        feature_cache: folder of the maps; empty: `<features>_features` in `out`.
        weights: weights of the feature networks.
        filter: which images are used.
        engine: what does the work. `loop`: this process, one part after the other; `ray`: workers of Ray, here or on
            many machines. The data set is the same.
        ray: workers of `engine=ray`.
    """

    out: str = ""
    vae: str = ""
    image_size: int = 64
    buckets: str | None = None
    bucket_ratios: list[float] = field(default_factory=lambda: list(buckets.RATIOS))
    bucket_multiple: int | None = None
    min_bucket_records: int = 1
    batch_size: int = 32
    posterior_std: bool = False
    hflip: bool = False
    dtype: str = "float16"
    license: str = field(default="", metadata=FREE_TEXT)
    attribution: str = field(default="", metadata=FREE_TEXT)
    vae_check: int = 64
    max_rejected: float = 0.01
    max_pixels: int = MAX_PIXELS
    text_encoder: str = ""
    text_dtype: str = "bfloat16"
    text_max_length: int = 120
    text_cache: str = ""
    features: str = ""
    feature_cache: str = ""
    weights: FeatureWeights = field(default_factory=FeatureWeights)
    filter: FilterConfig = field(default_factory=FilterConfig)
    engine: str = "loop"
    ray: RayConfig = field(default_factory=RayConfig)

    def with_vae(self) -> "PrepareConfig":
        """These settings, with the VAE of the source if none is named."""
        default = VAES.get(self.source.partition(":")[0], "openmoji")
        return dataclasses.replace(self, vae=self.vae or default)

    def check(self) -> None:
        """Raise `FieldError` naming the first field that breaks a rule."""
        super().check()
        at_least_1 = ("image_size", "batch_size", "min_bucket_records", "bucket_multiple", "text_max_length")
        for name in at_least_1:
            value = getattr(self, name)
            require(name, value, value is None or value >= 1, "must be at least 1")
        if self.buckets is not None:
            require_choice("buckets", self.buckets, buckets.KINDS)
        are_ratios = bool(self.bucket_ratios) and all(1 / 16 <= ratio <= 16 for ratio in self.bucket_ratios)
        require("bucket_ratios", self.bucket_ratios, are_ratios, "must be one or more numbers from 1/16 to 16")
        require("vae_check", self.vae_check, self.vae_check >= 0, "must be 0 (no check) or more")
        require_local("out", self.out)
        require_local("text_cache", self.text_cache)
        require_local("feature_cache", self.feature_cache)
        if self.features:
            require_choice("features", self.features, FEATURES)
        require("max_rejected", self.max_rejected, 0 <= self.max_rejected <= 1, "must be in [0, 1]")
        require("max_pixels", self.max_pixels, 1 <= self.max_pixels <= MAX_PIXELS, f"must be in [1, {MAX_PIXELS}]")
        require_choice("dtype", self.dtype, ("float16", "float32"))
        require_choice("text_dtype", self.text_dtype, TEXT_DTYPES)
        with under("filter."):
            self.filter.check()
        check_engine(self.engine, self.ray)


LATER = {"source", "captions", "out", "license", "attribution", "vae_check", "max_rejected", "engine", "ray"}
"""Settings that two runs into one folder need not have in common; the source and its captions have keys instead."""
TEXT = {"text_encoder", "text_dtype", "text_max_length", "text_cache"}
MAPS = {"features", "feature_cache", "weights"}


def plan_settings(config: PrepareConfig) -> dict[str, object]:
    """The settings on which the data set depends, by the names under which they are typed."""
    settings = dataclasses.asdict(config)
    filters = {f"filter.{name}": value for name, value in settings.pop("filter").items()}
    return {name: value for name, value in settings.items() if name not in LATER | TEXT | MAPS} | filters
