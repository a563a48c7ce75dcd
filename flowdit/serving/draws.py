"""Draws for visitors: settings checked against limits before any work, and pictures with their recipes and paths."""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image

from flowdit.conditioning import Requests
from flowdit.diffusion.sampling import SamplerConfig
from flowdit.diffusion.watch import Watch
from flowdit.fields import FieldError, is_finite_number, require, shortened, under
from flowdit.inference.recipe import (
    Recipe,
    check_solver_fields,
    differences,
    make_recipe,
    redraw,
    request_of,
    save_png,
    solver,
)
from flowdit.inference.sampler import Drawn, Sampler, check_settings
from flowdit.serving.config import ServeConfig

NAMES: dict[str, str] = {"labels": "label", "prompts": "prompt"}
"""Names of the arguments of `Conditioning.requests` on the page, where a draw has one of each."""
SOLVER_FIELDS = tuple(field.name for field in dataclasses.fields(SamplerConfig))
PATH_BATCH = 16
"""Pictures of paths that are decoded at once, whatever their number: one shape to compile."""
Progress = Callable[[float], None]


class Picture(NamedTuple):
    """An image as PNG with its recipe, its caption, and the path that led to it as one wide JPEG, empty without."""

    png: bytes
    recipe: Recipe
    path: bytes

    def as_json(self) -> dict[str, Any]:
        """For the page: data URLs and texts."""
        path = f"data:image/jpeg;base64,{base64.b64encode(self.path).decode()}" if self.path else ""
        return {
            "png": f"data:image/png;base64,{base64.b64encode(self.png).decode()}",
            "frames": path,  # not "path", which Gradio's client takes for a file to fetch
            "caption": self.recipe.caption,
            "recipe": self.recipe.dump(),
        }


class Work(NamedTuple):
    """A checked draw: what it does, and lines for the visitor. Called with a function that takes its progress.

    The result has one list of pictures for each model.
    """

    run: Callable[[Progress], list[list[Picture]]]
    notes: list[str]


class Models:
    """The loaded model, or two of them, that draws are made with."""

    def __init__(self, samplers: list[Sampler], config: ServeConfig):
        self.samplers = samplers
        self.config = config

    def check_ready(self) -> None:
        """Load what the first draw would load. Raises `ValueError` for a VAE or text encoder that is missing."""
        for sampler in self.samplers:
            _ = sampler.decode
            _ = sampler.fingerprint
            if "prompts" in sampler.trained.conditioning.request_args:
                sampler.requests(1, {"prompts": "ready"}).encode([0])

    def describe(self, names: list[str]) -> dict[str, Any]:
        """What is loaded and what may be asked, as JSON data."""
        first = self.samplers[0]
        limits = {name: getattr(self.config, name) for name in ("max_images", "max_steps", "max_prompt")}
        models = [
            {"name": name, "step": sampler.trained.step, "weights": sampler.fingerprint}
            for name, sampler in zip(names, self.samplers, strict=True)
        ]
        return {
            "models": models,
            "takes": [plain_name(name) for name in first.trained.conditioning.request_args],
            "classes": list(first.trained.manifest.class_names)
            if "labels" in first.trained.conditioning.request_args
            else [],
            "image_size": first.trained.manifest.image_size,
            "defaults": dataclasses.asdict(first.sampler_config({})),
            "limits": limits,
        }

    def draw(self, settings: Mapping[str, Any]) -> Work:
        """The draw of these settings, a dictionary with the names of the API, for all models with the same noise.

        None means the default. Raises `FieldError` for a setting that is unknown, invalid or above a limit.
        """
        args = self.samplers[0].trained.conditioning.request_args
        known = (*(plain_name(name) for name in args), "seed", "count", *SOLVER_FIELDS)
        for name in settings:
            if name not in known:
                raise FieldError(shortened(str(name), 40), f"no such setting, must be one of {', '.join(known)}")
        given = {name: value for name, value in settings.items() if value is not None and value != ""}
        count, seed = whole(given, "count", 1), whole(given, "seed", 0)
        require("count", count, 1 <= count <= self.config.max_images, f"must be in [1, {self.config.max_images}]")
        check_settings(count, seed, count)
        asked = [self._requests(sampler, count, given) for sampler in self.samplers]
        config = self.solver({name: given[name] for name in SOLVER_FIELDS if name in given})
        for sampler in self.samplers[1:]:  # `solver` has checked it for the first
            sampler.check_internal_guidance(config)

        def run(progress: Progress) -> list[list[Picture]]:
            parts = []
            for i, (sampler, requests) in enumerate(zip(self.samplers, asked, strict=True)):
                (drawn,) = sampler.batches(requests, config, seed, watch=self._watch(progress, i))
                recipes = [make_recipe(sampler, requests, config, seed, n, drawn.size) for n in drawn.numbers]
                parts.append(pictures(sampler, drawn, recipes))
            return parts

        return Work(run, [])

    def redraw(self, recipe: Recipe) -> Work:
        """Draw the image of a recipe again, with the model that it names, else the first.

        Raises `FieldError` for a recipe that this model does not take, or that is above a limit.
        """
        named = [sampler for sampler in self.samplers if sampler.fingerprint == recipe.origin.weights]
        sampler = (named or self.samplers)[0]
        self._check_texts(recipe.request)
        requests = request_of(sampler, recipe)
        with under("recipe.sampler."):
            config = self._limited(solver(recipe), sampler)
            sampler.check_internal_guidance(config)
        most = sampler.batch_shape(self.config.max_images, self.config.max_images)
        batch = sampler.batch_shape(min(recipe.batch, most), most)
        found = differences(recipe, sampler, batch)

        def run(progress: Progress) -> list[list[Picture]]:
            drawn = redraw(sampler, recipe, batch, self._watch(progress, 0, 1))
            again = make_recipe(sampler, requests, config, recipe.seed, 0, batch)
            return [pictures(sampler, drawn, [dataclasses.replace(again, number=recipe.number)])]

        if not found:
            return Work(run, ["Same model, versions and device as in the recipe."])
        return Work(run, [f"The image may differ from that of the recipe: {'; '.join(found)}."])

    def solver(self, fields: Mapping[str, Any]) -> SamplerConfig:
        """The solver with these fields, else the model's. Raises `FieldError` for an invalid one or too many steps."""
        check_solver_fields(fields)
        given = {name: value if name == "solver" else float(value) for name, value in fields.items()}
        if "steps" in given:
            given["steps"] = whole(fields, "steps", 1)
        return self._limited(self.samplers[0].sampler_config(given), self.samplers[0])

    def _limited(self, config: SamplerConfig, sampler: Sampler) -> SamplerConfig:
        most, own = self.config.max_steps, sampler.sampler_config({})
        require("steps", config.steps, config.steps <= most, f"must be at most {most}")
        # Each value is compiled, and these have no end of values.
        rule = f"must be that of the model, {own.time_shift}"
        require("time_shift", config.time_shift, config.time_shift == own.time_shift, rule)
        rule = "must be null" if own.rtol is None else f"must be null or that of the model, {own.rtol}"
        require("rtol", config.rtol, config.rtol in (None, own.rtol), rule)
        return config

    def _requests(self, sampler: Sampler, count: int, given: Mapping[str, Any]) -> Requests:
        args = sampler.trained.conditioning.request_args
        asked = {name: given[plain_name(name)] for name in args if plain_name(name) in given}
        self._check_texts(asked)
        if args and args[0] not in asked:
            raise FieldError(NAMES[args[0]], "must be given")
        try:
            return sampler.requests(count, asked)
        except ValueError as problem:
            line = str(problem)
            for theirs, ours in NAMES.items():
                line = line.replace(f"{theirs}: ", f"{ours}: ", 1) if line.startswith(theirs) else line
            raise ValueError(line) from None

    def _check_texts(self, request: Mapping[str, Any]) -> None:
        for name, value in request.items():
            field = plain_name(name)
            require(field, value, isinstance(value, str | int), "must be one text or number")
            rule = f"must be at most {self.config.max_prompt} characters long"
            require(field, value, len(str(value)) <= self.config.max_prompt, rule)

    def _watch(self, progress: Progress, part: int, parts: int | None = None) -> Watch:
        parts = parts or len(self.samplers)
        return Watch(self.config.frames, lambda fraction: progress((part + fraction) / parts))


def pictures(sampler: Sampler, drawn: Drawn, recipes: list[Recipe]) -> list[Picture]:
    """The images of a batch, with their recipes and paths."""
    jax.effects_barrier()  # late calls of the progress, which would belong to the next draw
    paths = [b""] * len(recipes)
    if drawn.path is not None:
        frames = sampler.decode(drawn.path.reshape(-1, *drawn.path.shape[2:]), PATH_BATCH)
        paths = [strip(part) for part in np.split(frames, len(recipes))]
    found = []
    for image, recipe, path in zip(drawn.images, recipes, paths, strict=True):
        png = io.BytesIO()
        save_png(image, png, recipe)
        found.append(Picture(png.getvalue(), recipe, path))
    return found


def strip(frames: np.ndarray) -> bytes:
    """The images of a path (n, height, width, 3) beside each other, as one JPEG: noise would make a PNG large."""
    file = io.BytesIO()
    Image.fromarray(np.concatenate(list(frames), axis=1)).save(file, "JPEG", quality=88)
    return file.getvalue()


def plain_name(argument: str) -> str:
    """The name of an argument of `Conditioning.requests` on the page."""
    return NAMES.get(argument, argument)


def whole(given: Mapping[str, Any], name: str, default: int) -> int:
    """A whole number, which a browser may send as a float. Raises `FieldError` for anything else."""
    value = given.get(name, default)
    require(name, value, is_finite_number(value) and value == int(value), "must be a whole number")
    return int(value)


def check_pair(first: Sampler, second: Sampler) -> None:
    """Raise `FieldError` unless both models take the same noise and requests."""
    kinds = [sampler.trained.conditioning.request_args for sampler in (first, second)]
    shapes = [list(sampler.trained.manifest.latent_shape) for sampler in (first, second)]
    if kinds[0] != kinds[1]:
        takes = [" and ".join(kind) or "no condition" for kind in kinds]
        raise FieldError("compare", f"must take {takes[0]}, as the model of checkpoint, takes {takes[1]}")
    if shapes[0] != shapes[1]:
        raise FieldError("compare", f"must have latents of {shapes[0]}, as the model of checkpoint, has {shapes[1]}")
