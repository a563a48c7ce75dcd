"""Writing samples to a folder: single PNGs, a grid, and `samples.json`, never mixed with other images."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from flowdit.conditioning import Requests
from flowdit.config import SampleConfig
from flowdit.data.images import SUFFIXES
from flowdit.data.progress import progress_bar
from flowdit.diffusion.sampling import SamplerConfig
from flowdit.image_grid import save_grid
from flowdit.inference.recipe import Recipe, make_recipe, save_png
from flowdit.inference.sampler import Drawn, Sampler

UNFINISHED = "samples.json.unfinished"
"""Name of `samples.json` until all images are written."""
LATENTS = "latents.npy"
GRID_IMAGES = 256
"""Maximum number of images in the grid; the folder may hold more."""


def write_samples(sampler: Sampler, requests: Requests, solvers: Sequence[SamplerConfig], config: SampleConfig) -> Path:
    """Draw the `requests` with each of the `solvers`, write `grid.png`, single PNGs and `samples.json` to `config.out`.

    Returns the grid's path. Several processes draw each batch together. The images of one solver have the noise of the others and, with several, are one row of the
    grid. Images are written batch by batch, so memory does not grow with their number. Raises `ValueError` on write
    errors.
    """
    out = Path(config.out)
    with _naming_the_folder(out):
        out.mkdir(parents=True, exist_ok=True)
    captions = _captions(requests, solvers)
    _ = sampler.decode  # loads the VAE, whose errors must come before the progress bar
    batches = _batches(sampler, requests, solvers, config)
    if jax.process_index() > 0:  # the first process writes, the others only take part in the computation
        collections.deque(batches, maxlen=0)
        return out / "grid.png"
    with progress_bar("sampling", "images", len(captions), len(captions)) as progress:
        first = next(batches)  # an error here leaves the files of an earlier run unchanged
        replaced = check_folder(config)
        settings = dataclasses.asdict(config) | dataclasses.asdict(solvers[0]) | {"captions": captions}
        settings["guidance"] = [solver.guidance for solver in solvers] if len(solvers) > 1 else solvers[0].guidance
        record = {"settings": settings, "step": sampler.trained.step, "weights": "ema"}
        if sampler.guide is not None:
            record["guide"] = {"checkpoint": config.guide, "step": sampler.guide.step}
        with _naming_the_folder(out):
            for path in replaced:
                path.unlink()
            # The list of files is written first, so that files of an interrupted run can be identified, too.
            (out / UNFINISHED).write_text(json.dumps(record, indent=1) + "\n")
        names = _image_names(captions)
        shown = []
        evaluations = 0
        for drawn, recipes in itertools.chain([first], batches):
            with _naming_the_folder(out):
                _write_batch(out, names, drawn, recipes, config.save_latents)
            shown += [image.copy() for image in drawn.images[: GRID_IMAGES - len(shown)]]
            evaluations = max(evaluations, int(drawn.evaluations.max()))
            progress.update(len(drawn.images))
    columns = len(requests) if len(solvers) > 1 else config.columns
    with _naming_the_folder(out):
        save_grid(out / "grid.png", np.stack(shown), captions[: len(shown)], columns)
        (out / UNFINISHED).write_text(json.dumps(record | {"evaluations": evaluations}, indent=1) + "\n")
        os.replace(out / UNFINISHED, out / "samples.json")
    return out / "grid.png"


def _captions(requests: Requests, solvers: Sequence[SamplerConfig]) -> list[str]:
    """The text below each image; with several solvers also their guidance."""
    if len(solvers) == 1:
        return requests.captions
    texts = [f"{caption}, " if caption else "" for caption in requests.captions]
    return [f"{text}guidance {solver.guidance:g}" for solver in solvers for text in texts]


def _batches(
    sampler: Sampler, requests: Requests, solvers: Sequence[SamplerConfig], config: SampleConfig
) -> Iterator[tuple[Drawn, list[Recipe]]]:
    """The batches of one solver after the other with recipes; the images are numbered over all of them."""
    for row, solver in enumerate(solvers):
        for drawn in sampler.batches(requests, solver, config.seed, config.batch_size):
            recipes = [make_recipe(sampler, requests, solver, config.seed, n, drawn.size) for n in drawn.numbers]
            yield drawn._replace(numbers=[row * len(requests) + number for number in drawn.numbers]), recipes


@contextlib.contextmanager
def _naming_the_folder(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as problem:
        raise ValueError(f"out: {out} cannot be written: {problem.strerror or problem}") from None


def _write_batch(out: Path, names: list[str], drawn: Drawn, recipes: list[Recipe], save_latents: bool) -> None:
    for number, image, recipe in zip(drawn.numbers, drawn.images, recipes, strict=True):
        save_png(image, out / names[number], recipe)
    if save_latents:
        _append_latents(out / LATENTS, len(names), drawn)


def _append_latents(file: Path, count: int, drawn: Drawn) -> None:
    """Append a batch to a `.npy` file of `count` latents; a memory map would crash the process on a full disk."""
    latents = drawn.latents
    with file.open("wb" if drawn.numbers[0] == 0 else "ab") as stream:
        if drawn.numbers[0] == 0:
            layout = {"descr": latents.dtype.str, "fortran_order": False, "shape": (count, *latents.shape[1:])}
            np.lib.format.write_array_header_1_0(stream, layout)
        stream.write(np.ascontiguousarray(latents).tobytes())


def check_folder(config: SampleConfig) -> list[Path]:
    """List the files of an earlier run in `config.out`, to be replaced. Sub-folders and other files stay.

    Raises `ValueError` for images of an earlier run unless `config.overwrite` is set, and for any other images: a score
    computed over old and new images would be silently wrong.
    """
    out = Path(config.out)
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    earlier = _earlier_files(out) & names
    images = {name for name in names if Path(name).suffix.lower() in SUFFIXES}
    if foreign := sorted((images | names & {LATENTS}) - earlier):
        raise ValueError(
            f"out: {out} holds {len(foreign)} files that no samples.json in it lists, such as {foreign[0]!r}: "
            "give another folder"
        )
    if earlier and not config.overwrite:
        raise ValueError(
            f"out: {out} holds the {len(earlier)} files of an earlier run: give another folder, or overwrite=true"
        )
    return [out / name for name in sorted(earlier)]


def _earlier_files(folder: Path) -> set[str]:
    """Names of the files that an earlier run has written, or would have, according to its `samples.json`."""
    files: set[str] = set()
    for path in (folder / "samples.json", folder / UNFINISHED):
        if path.is_file():
            try:
                settings = json.loads(path.read_text(encoding="utf-8"))["settings"]
                files |= {path.name, "grid.png", *_image_names(settings["captions"])}
                files |= {LATENTS} if settings["save_latents"] else set()
            except (ValueError, KeyError, TypeError, RecursionError):
                raise ValueError(f"out: {path} is not of an earlier run: give another folder") from None
    return files


def _image_names(captions: list[str]) -> list[str]:
    return [f"{i:04d}_{_file_name(caption)}.png" if caption else f"{i:04d}.png" for i, caption in enumerate(captions)]


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in name)[:60]
