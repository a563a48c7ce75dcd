"""The recipe of an image: all that it was drawn with, in the metadata of its PNG, and drawing it again.

A recipe may come from anywhere: only the text of a PNG is read, up to a limited length, and parsed strictly.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import io
import json
import platform
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Annotated, Any, Literal

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pydantic import Field
from pydantic.dataclasses import dataclass

from flowdit.conditioning import Requests
from flowdit.diffusion.sampling import SamplerConfig
from flowdit.diffusion.watch import UNWATCHED, Watch
from flowdit.fields import FieldError, about, is_finite_number, require, shortened, under
from flowdit.inference.sampler import Drawn, Sampler
from flowdit.json_input import STRICT, Count, InputError, parse

KEYWORD = "flowdit"
"""Keyword of the recipe among the texts of a PNG."""
MOST_BYTES = 2**16
"""Length of a recipe; a longer one is refused."""
MOST_CHUNKS = 1000
SIGNATURE = b"\x89PNG\r\n\x1a\n"
PACKAGES = ("flowdit", "jax", "jaxlib", "equinox", "diffrax")
"""Packages whose version may change the last bits of an image."""

Text = Annotated[str, Field(max_length=MOST_BYTES)]
Digits = Annotated[str, Field(max_length=64)]
Side = Annotated[int, Field(ge=1, le=2**20)]


@dataclass(frozen=True, config=STRICT)
class Origin:
    """What an image was computed with, besides its settings.

    Attributes:
        step: training steps of the model.
        weights: fingerprint of its weights, and of those of a guide.
        vae: fingerprint of the VAE.
        text_encoder: fingerprint of the text encoder, else its name; empty: none.
        versions: of flowdit and the packages in `PACKAGES`.
        device: kind and number of the devices.
    """

    step: Annotated[int, Field(ge=0)]
    weights: Digits
    vae: Digits
    text_encoder: Text
    versions: Annotated[dict[Digits, Digits], Field(max_length=32)]
    device: Text


@dataclass(frozen=True, config=STRICT)
class Recipe:
    """An image: what was asked for, the solver, the noise, and what computed it.

    Attributes:
        recipe: version of this format.
        caption: text for people.
        request: arguments of `Conditioning.requests` for this image alone.
        sampler: fields of `SamplerConfig`.
        seed: of the noise.
        number: index of the image, which its noise depends on.
        batch: size of the batch that it was drawn in; another size changes the last bits.
        origin: what it was computed with.
        image_size: height and width in pixels; null in recipes of earlier versions: that of the training data.
    """

    recipe: Literal[1]
    caption: Text
    request: dict[Digits, Any]
    sampler: dict[Digits, Any]
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    number: Annotated[int, Field(ge=0, lt=2**31)]
    batch: Annotated[Count, Field(le=2**20)]
    origin: Origin
    image_size: tuple[Side, Side] | None = None

    def dump(self) -> str:
        """As JSON, in ASCII."""
        return json.dumps(dataclasses.asdict(self))


def make_recipe(
    sampler: Sampler, requests: Requests, config: SamplerConfig, seed: int, number: int, size: int
) -> Recipe:
    """The recipe of image `number` of the `requests`, drawn in a batch of `size`."""
    return Recipe(
        recipe=1,
        caption=requests.captions[number],
        request=requests.arguments(number),
        sampler=dataclasses.asdict(config),
        seed=seed,
        number=number,
        batch=size,
        origin=origin_of(sampler),
        image_size=sampler.image_size,
    )


def origin_of(sampler: Sampler) -> Origin:
    """What this sampler computes with. Loads the VAE."""
    text = sampler.trained.conditioning.describe().text
    return Origin(
        step=sampler.trained.step,
        weights=sampler.fingerprint,
        vae=sampler.vae.fingerprint,
        text_encoder="" if text is None else text.fingerprint or text.name,
        versions=versions(),
        device=f"{sampler.mesh.size} x {device_kind(sampler.mesh.devices.flat[0])}",
    )


@functools.cache
def versions() -> dict[str, str]:
    """Installed versions of `PACKAGES`, and of Python."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "source"
    return found


@functools.cache
def device_kind(device: Any) -> str:
    """Name of a device; of a CPU its model, as XLA compiles for its instructions."""
    if device.platform != "cpu":
        return device.device_kind
    try:
        names = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = None
    return names.group(1) if names else platform.processor() or platform.machine()


def save_png(image: np.ndarray, file: Path | IO[bytes] | io.BytesIO, recipe: Recipe) -> None:
    """Write a uint8 image (height, width, 3) as PNG, with its recipe."""
    info = PngInfo()
    info.add_text(KEYWORD, recipe.dump())
    Image.fromarray(image).save(file, "PNG", pnginfo=info)


def read_recipe(content: bytes) -> Recipe:
    """The recipe in a PNG, or in JSON. Raises `FieldError` named "recipe" if there is none, or it breaks a rule."""
    with about("recipe"):
        text = _png_text(content) if content.startswith(SIGNATURE) else content
        if len(text) > MOST_BYTES:
            raise ValueError(f"must be at most {MOST_BYTES} bytes long, got {len(text)}")
        try:
            values = json.loads(text)
        except (ValueError, RecursionError):
            raise InputError("must be a PNG with a recipe, or a recipe as JSON") from None
        recipe = parse(Recipe, values)
    with under("recipe.sampler."):
        solver(recipe)
    return recipe


def _png_text(content: bytes) -> bytes:
    """The text with our keyword. No pixel is decoded, and no compressed text is read."""
    for kind, data in _chunks(content):
        keyword, _, text = data.partition(b"\0")
        if kind == b"tEXt" and keyword == KEYWORD.encode():
            return text
    raise ValueError("this PNG has no recipe: it is not from flowdit, or a program has removed its metadata")


def _chunks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    position = len(SIGNATURE)
    for _ in range(MOST_CHUNKS):
        length = int.from_bytes(content[position : position + 4], "big")
        kind = content[position + 4 : position + 8]
        if len(kind) < 4:
            return
        yield kind, content[position + 8 : position + 8 + min(length, 2 * MOST_BYTES)]
        position += length + 12


def solver(recipe: Recipe) -> SamplerConfig:
    """Its solver. Raises `FieldError` for an unknown or invalid field."""
    check_solver_fields(recipe.sampler)
    config = SamplerConfig(**recipe.sampler)
    config.check()
    return config


def check_solver_fields(fields: Mapping[str, Any]) -> None:
    """Raise `FieldError` for a name that is no field of `SamplerConfig`, or a value that is not of its type and finite."""
    known = [field.name for field in dataclasses.fields(SamplerConfig)]
    for name, value in fields.items():
        if name not in known:
            raise FieldError(shortened(name), f"no such setting, must be one of {', '.join(known)}")
        if name == "solver":
            require(name, value, isinstance(value, str), "must be a text")
        elif value is not None or name != "rtol":
            require(name, value, is_finite_number(value), "must be a finite number")


def redraw(sampler: Sampler, recipe: Recipe, batch: int | None = None, watch: Watch = UNWATCHED) -> Drawn:
    """Draw the image of a recipe again.

    The pixels are bit-identical if `differences` finds none. `batch` is the size to draw with, by default the recipe's:
    all of its rows are this image, and the row that it had is kept. Raises `ValueError` for a request that this model
    does not take, before anything is computed.
    """
    requests = request_of(sampler, recipe)
    size = batch or recipe.batch
    config = solver(recipe)
    sampler.check_internal_guidance(config)
    (drawn,) = sampler.batches(requests, config, recipe.seed, size, [recipe.number] * size, watch)
    row = slice(recipe.number % size, recipe.number % size + 1)
    path = None if drawn.path is None else drawn.path[row]
    rows = {"images": drawn.images[row], "latents": drawn.latents[row], "evaluations": drawn.evaluations[row]}
    return drawn._replace(**rows, numbers=[recipe.number], path=path)


def request_of(sampler: Sampler, recipe: Recipe) -> Requests:
    """The request of a recipe, for any number. Raises `ValueError` if this model does not take it."""
    with under("recipe.request."):
        asked = sampler.requests(1, recipe.request)
        if len(asked) != 1:
            raise FieldError("request", f"must ask for one image, asks for {len(asked)}")
    return dataclasses.replace(
        asked, encode=lambda rows: asked.encode([0] * len(rows)), arguments=lambda row: asked.arguments(0)
    )


def differences(recipe: Recipe, sampler: Sampler, batch: int) -> list[str]:
    """What differs from the recipe when `sampler` draws it in this batch size; without any the pixels are the same."""
    then, now = recipe.origin, origin_of(sampler)
    ours = sampler.image_size
    found = []
    if then.weights != now.weights:
        found.append(f"weights {then.weights} of step {then.step}, here {now.weights} of step {now.step}")
    pairs = {name: (getattr(then, name), getattr(now, name)) for name in ("vae", "text_encoder", "device")}
    pairs |= {name: (then.versions.get(name), version) for name, version in now.versions.items()}
    pairs["a batch of"] = (recipe.batch, batch)
    size = recipe.image_size or ours
    pairs["an image of"] = (f"{size[0]}x{size[1]}", f"{ours[0]}x{ours[1]}")
    return [*found, *(f"{name} {a or 'none'}, here {b or 'none'}" for name, (a, b) in pairs.items() if a != b)]
