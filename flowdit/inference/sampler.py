"""Sampling images from a model: from requests and noise to latents and pixels, batch by batch, compiled once."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from flowdit.checkpoint.names import named_arrays
from flowdit.conditioning import KINDS, Requests
from flowdit.conditioning.base import check_request_args
from flowdit.diffusion.sampling import (
    Guidance,
    Guide,
    SamplerConfig,
    Samples,
    check_count,
    check_solved,
    image_noise,
    sample,
)
from flowdit.diffusion.watch import UNWATCHED, Watch
from flowdit.fields import FieldError, require
from flowdit.hashing import tensors_fingerprint
from flowdit.inference.images import Decode, load_matching_vae, make_decoder
from flowdit.inference.trained import Trained, check_guide
from flowdit.models.compute import Compute, choose_compute
from flowdit.models.vae import AutoencoderKL
from flowdit.sharding import batch_sharding, batch_shards, make_local_mesh, replicated

DrawLatents = Callable[..., Samples]
MOST_COMPILED = 24
"""Compiled functions that a sampler keeps, by `_draw_latents`; the least recently used goes first."""


class Drawn(NamedTuple):
    """A batch of uint8 images (n, height, width, 3), their normalised latents and their indices.

    `evaluations` is the number of evaluations of the velocity field for each, `size` the batch size that they were drawn
    with, and `path` the latents on the way from the noise, (n, frames, channels, height, width), if they were watched.
    """

    images: np.ndarray
    latents: np.ndarray
    evaluations: np.ndarray
    numbers: list[int]
    size: int = 1
    path: np.ndarray | None = None


class Sampler:
    """A model for sampling. Weights, VAE, text encoder and compiled functions are created on first use and kept.

    ```python
    sampler = flowdit.load("checkpoints")
    for images in sampler.draw(labels=["heart"] * 8, seed=0):  # uint8 (n, height, width, 3)
        ...
    ```

    `trained` is the model with its metadata; `trained.model` is the network for one example, called as `model(x_t, t,
    condition)`. It is on `mesh`, by default all devices of this process, which share each batch. `guide` is a weaker
    model whose velocity takes the place of that of the null condition in guidance (autoguidance); `check_guide` says
    what it must have in common with the model.
    """

    def __init__(
        self, trained: Trained, mesh: Mesh | None = None, vae: str | None = None, guide: Trained | None = None
    ):
        self.mesh = mesh or make_local_mesh()
        on_mesh = lambda part: part._replace(model=jax.device_put(part.model, replicated(self.mesh)))
        self.trained = on_mesh(trained)
        self.guide = None
        if guide is not None:
            check_guide(trained, guide)
            self.guide = on_mesh(guide)
        self._vae_name = vae or trained.manifest.vae.name
        dtype = "float32" if self.mesh.devices.flat[0].platform == "cpu" else "bfloat16"
        shapes = [shape for part in (trained, guide) if part is not None for shape in part.attention_shapes()]
        self.compute = choose_compute(self.mesh, dtype, shapes)
        self._compiled: dict[tuple, DrawLatents] = {}
        self._tell: Callable[[float], None] | None = None

    @functools.cached_property
    def vae(self) -> AutoencoderKL:
        """The VAE of the latents. Raises `ValueError` if it is missing or not the data's."""
        return load_matching_vae(self._vae_name, self.trained.manifest)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images in pixels."""
        manifest = self.trained.manifest
        _, height, width = manifest.latent_shape
        return height * manifest.vae.stride, width * manifest.vae.stride

    def at_size(self, height: int, width: int) -> Sampler:
        """A sampler of the same model for images of another size in pixels, such as that of a bucket of its data.

        Raises `FieldError` for a size that is not a multiple of the side of a patch.
        """
        guide = None if self.guide is None else self.guide.at_size(height, width)
        other = Sampler(self.trained.at_size(height, width), self.mesh, self._vae_name, guide)
        if "vae" in self.__dict__:  # already loaded
            other.__dict__["vae"] = self.vae
        return other

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hex digits that tell the weights of the network, and those of a guide, from others."""
        models = [part.model for part in (self.trained, self.guide) if part is not None]
        return "-".join(weights_fingerprint(model) for model in models)

    @functools.cached_property
    def decode(self) -> Decode:
        """Decode normalised latents to uint8 images. Raises `ValueError` if the VAE is missing or not the data's."""
        return make_decoder(self.vae, self.trained.mean, self.trained.scale, self.mesh)

    def draw(
        self, *, num_images: int = 1, seed: int = 0, batch_size: int = 64, **settings: Any
    ) -> Iterator[np.ndarray]:
        """Yield batches of uint8 images (n, height, width, 3), in the order of the requests.

        Only one batch is kept in memory. The noise of an image depends only on `seed` and its index. Its pixels are
        bit-identical for the same batch shape, kind of device and versions, and within 1e-4 otherwise (in float32); the
        batch size is the power of two that holds all images, at most `batch_size`, rounded up to a multiple of the
        number of devices.

        Args:
            num_images: per label or prompt; in total for an unconditional model.
            seed: of the noise.
            batch_size: maximum number of images per batch.
            settings: `labels`, or `prompts` and `negative_prompt`, one or a list, and fields of `SamplerConfig` (`solver`,
                `steps`, `guidance`, ...). Defaults are those of the training previews.

        Raises:
            ValueError: with one line, naming the invalid setting.
        """
        check_settings(num_images, seed, batch_size)
        names = [field.name for field in dataclasses.fields(SamplerConfig)]
        known = [*(name for kind in KINDS.values() for name in kind.request_args), *names]
        if unknown := [name for name in settings if name not in known]:
            every = ", ".join([*known, "num_images", "seed", "batch_size"])
            raise ValueError(f"{unknown[0]}: no such setting, must be one of {every}")
        config = self.sampler_config({name: settings.pop(name) for name in names if name in settings})
        requests = self.requests(num_images, settings)
        return (drawn.images for drawn in self.batches(requests, config, seed, batch_size))

    def sample(self, **settings: Any) -> list[Image.Image]:
        """All images of `draw` with these settings, as a list of PIL images."""
        return [Image.fromarray(image) for images in self.draw(**settings) for image in images]

    def sampler_config(self, changes: Mapping[str, Any]) -> SamplerConfig:
        """The sampler of the training previews with `changes`; None means no change. Raises `ValueError` if invalid."""
        given = {name: value for name, value in changes.items() if value is not None}
        config = dataclasses.replace(self.trained.config.train.sampler, **given)
        config.check()
        self.check_internal_guidance(config)
        return config

    def check_internal_guidance(self, config: SamplerConfig) -> None:
        """Raise `FieldError` for internal guidance of a model without a guidance head."""
        weight, head = config.internal_guidance, self.trained.config.model.guidance_head
        rule = "must be 1, as the model has no guidance head (model.guidance_head)"
        require("internal_guidance", weight, weight == 1 or head is not None, rule)

    def requests(self, num_images: int, arguments: Mapping[str, Any]) -> Requests:
        """Requests for `num_images` images of each label or prompt, by default those of the training previews.

        Raises `ValueError` for arguments that the model does not take, and for a negative prompt beside a guide.
        """
        conditioning = self.trained.conditioning
        check_request_args(conditioning, arguments)
        if self.guide is not None and (negative := arguments.get("negative_prompt")):
            raise FieldError("negative_prompt", f"must not be given with a guide, which replaces it, got {negative!r}")
        arguments = {
            name: value for name, value in arguments.items() if value is not None and name in conditioning.request_args
        }
        if conditioning.preview_field is not None:
            previewed = getattr(self.trained.config.train, conditioning.preview_field)
            arguments = {conditioning.request_args[0]: previewed} | arguments
        return conditioning.requests(num_images, **arguments)

    def batches(
        self,
        requests: Requests,
        config: SamplerConfig,
        seed: int = 0,
        batch_size: int = 64,
        numbers: Sequence[int] | None = None,
        watch: Watch = UNWATCHED,
    ) -> Iterator[Drawn]:
        """Yield the images with indices `numbers` (default: all) of the `requests`, batch by batch.

        A `watch` sees each solve without changing the images; one at a time may tell the progress.
        """
        numbers = range(len(requests)) if numbers is None else numbers
        size = self.batch_shape(len(numbers), batch_size)
        draw = self.drawing(config, seed, watch)
        for start in range(0, len(numbers), size):
            rows = list(numbers[start : start + size])
            padded = rows + rows[-1:] * (size - len(rows))
            samples = draw(np.asarray(padded, np.int32), *requests.encode(padded))
            parts = {
                name: np.asarray(part)[: len(rows)] for name, part in samples._asdict().items() if part is not None
            }
            check_solved(parts["evaluations"], config)
            yield Drawn(images=self.decode(parts["latents"], size), numbers=rows, size=size, **parts)

    def batch_shape(self, count: int, batch_size: int) -> int:
        """The batch size that `count` images are drawn with."""
        return batch_shape(count, batch_size, batch_shards(self.mesh))

    def drawing(
        self, config: SamplerConfig, seed: int, watch: Watch = UNWATCHED
    ) -> Callable[[np.ndarray, Any, Any], Samples]:
        """Return a function from image numbers, conditions and null conditions to samples on the devices.

        It returns before they are computed.
        """
        self._tell = watch.progress
        draw, guide = self._draw_latents(config, watch), None if self.guide is None else self.guide.model
        inputs = (guidance_inputs(config), self.trained.model, np.uint32(seed))
        return lambda numbers, condition, null: draw(*inputs, numbers, condition, null, guide)

    def _draw_latents(self, config: SamplerConfig, watch: Watch) -> DrawLatents:
        """The compiled function of these settings; it serves all weights of guidance and every `watch.progress`."""
        steps = (config.solver, config.steps, config.time_shift, config.rtol)
        guided = (config.guidance == 1, config.internal_guidance == 1)
        key = (*steps, *guided, watch.frames, watch.progress is None)
        if (draw := self._compiled.pop(key, None)) is None:
            predictions = [part.prediction for part in (self.trained, self.guide) if part is not None]
            watch = watch if watch.progress is None else watch._replace(progress=self._told)
            draw = compile_draw(
                latent_shape=self.trained.manifest.latent_shape,
                config=config,
                prediction=predictions[0],
                compute=self.compute,
                mesh=self.mesh,
                watch=watch,
                guide_prediction=predictions[-1],
            )
        self._compiled[key] = draw  # at the end, as the last used
        while len(self._compiled) > MOST_COMPILED:
            del self._compiled[next(iter(self._compiled))]
        return draw

    def _told(self, fraction: float) -> None:
        if self._tell is not None:
            self._tell(fraction)


def weights_fingerprint(model: Any) -> str:
    """16 hex digits that tell the weights of a network from others."""
    return tensors_fingerprint({name: np.asarray(array) for name, array in named_arrays(model).items()})


def guidance_inputs(config: SamplerConfig) -> Guidance:
    """Guidance as inputs of a compiled solve, so that other values compile nothing."""
    return jax.tree.map(np.float32, Guidance.of(config))


def make_draw(
    latent_shape: tuple[int, int, int], config: SamplerConfig, prediction: str, compute: Compute, mesh: Mesh
) -> DrawLatents:
    """Return a jitted (model, seed, image indices, conditions, null conditions) -> samples, split over the mesh.

    The results are replicated, so that each process can read them: latents are small.
    """
    draw = compile_draw(latent_shape, config, prediction, compute, mesh)
    return functools.partial(draw, guidance_inputs(config))


def compile_draw(
    latent_shape: tuple[int, int, int],
    config: SamplerConfig,
    prediction: str,
    compute: Compute,
    mesh: Mesh,
    watch: Watch = UNWATCHED,
    guide_prediction: str = "velocity",
) -> DrawLatents:
    """`make_draw` for all solves with these steps and the same kinds of guidance: takes `guidance_inputs` first.

    A guide is its last argument, and `guide_prediction` what that predicts.
    """

    def draw(guidance, model, seed, numbers, condition, null, guide=None):
        inputs = (image_noise(seed, numbers, latent_shape), condition, null)
        noise, condition, null = jax.lax.with_sharding_constraint(inputs, batch_sharding(mesh))
        weak = None if guide is None else Guide(compute.cast(guide), guide_prediction)
        options = {"watch": watch, "guidance": guidance, "guide": weak}
        return sample(compute.cast(model), noise, condition, null, config, prediction, **options)

    return jax.jit(compute.on(mesh, draw), out_shardings=replicated(mesh))


def batch_shape(count: int, batch_size: int, devices: int) -> int:
    """The batch size for `count` images. It takes few different values, as each is compiled separately."""
    size = min(batch_size, 1 << max(0, count - 1).bit_length())
    return -(-size // devices) * devices


def check_settings(num_images: int, seed: int, batch_size: int) -> None:
    """Raise `ValueError` naming the first invalid setting."""
    check_count("num_images", num_images)
    check_count("batch_size", batch_size)
    require("seed", seed, isinstance(seed, int) and 0 <= seed < 2**32, "must be in [0, 2**32)")
