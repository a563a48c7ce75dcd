"""How well a text model draws `emoji_styles`: grids of its images, and a table of style, subject and kernel distance.

`python -m benchmarks text_model checkpoint=checkpoints/text out=scores/text`, with the settings of `Settings`. Prompts
are chosen by a hash of their names, all images have one seed, and none is left out. Batches of images and features of
real pictures are kept, so a killed run goes on if it is repeated.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import flowdit
from benchmarks.emoji_judge import Judge, Real, Row, kept, load_real
from benchmarks.emoji_prompts import FREE, IMAGES, Prompts, by_hash, companions, described, of_every_style, trained
from benchmarks.timing import table
from flowdit.data.emoji_styles import STYLES, TILE, Picture, load_pictures
from flowdit.data.encode_images import latent_encoder
from flowdit.diffusion.sampling import SamplerConfig
from flowdit.errors import first_line
from flowdit.fields import FieldError, require, require_choice
from flowdit.hashing import fingerprint
from flowdit.image_grid import save_grid
from flowdit.inference.images import make_decoder
from flowdit.inference.sampler import Sampler

Images = UInt8[np.ndarray, "n height width 3"]
ROWS = ("training prompts", "held-out pairs")
GRIDS = {"training": "grid of training prompts", "held_out": "grid of held-out pairs"}
GRIDS["companions"] = "grid of the same subjects in a trained style"
MAX_COMPARED = 2_000
"""Real pictures that kernel distances are measured from; more take minutes, and hardly lower the error."""
HEADER = ["images", "number", "style", "subject: nearest", "among 5 nearest", "KID, error"]


@dataclasses.dataclass
class Settings:
    """What is judged. Null sampler settings default to the checkpoint's.

    Attributes:
        checkpoint: as `flowdit.load` reads it; the first argument without a name.
        out: folder of `table.md`, `table.json`, the grids, and of batches of images.
        style: the only style that the model knows, which its prompts do not name; null: all, by name.
        images: prompts of the table from each part of the split, each drawn once; at most half of its pictures.
        solver: solver of the ODE.
        steps: number of its steps.
        guidance: weight of guidance.
        seed: of the noise.
        batch_size: images that are drawn at once.
        cache: folder for features of real pictures; null: `flowdit/features` in the user's cache folder.
    """

    checkpoint: str = MISSING
    out: str = "scores/text_model"
    style: str | None = None
    images: int = 192
    solver: str | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    batch_size: int = 64
    cache: str | None = None

    def styles(self) -> tuple[str, ...]:
        """Those that the model knows."""
        return STYLES if self.style is None else (self.style,)

    def sampler(self) -> dict[str, Any]:
        """Changes to the checkpoint's sampler."""
        return {"solver": self.solver, "steps": self.steps, "guidance": self.guidance}


class Asked(NamedTuple):
    """The prompts of the grids, each drawn `IMAGES` times, and those of the table, each drawn once.

    `others` are pictures of the same parts as those of the table, by row, and none of these.
    """

    grids: dict[str, Prompts]
    table: dict[str, Prompts]
    others: dict[str, list[Picture]]

    def every(self) -> list[str]:
        """The prompt of every image, in the order in which they are drawn."""
        repeated = [prompt for part in self.grids.values() for prompt in part.prompts for _ in range(IMAGES)]
        return repeated + [prompt for part in self.table.values() for prompt in part.prompts]

    def pictures(self) -> list[Picture]:
        """The pictures that are asked for, some of them twice."""
        return [picture for part in (*self.grids.values(), *self.table.values()) for picture in part.pictures]


def settings_of(arguments: Sequence[str]) -> Settings:
    """The settings of a command line. Raises `ValueError` for the first that is unknown or breaks a rule."""
    given = [argument if "=" in argument else f"checkpoint={argument}" for argument in arguments]
    try:
        settings = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Settings), OmegaConf.from_dotlist(given)))
    except OmegaConfBaseException as problem:
        raise FieldError(problem.full_key or "text_model", first_line(problem)) from problem
    assert isinstance(settings, Settings)
    if settings.style is not None:
        require_choice("style", settings.style, STYLES)
    require("images", settings.images, settings.images >= 20, "must be at least 20")
    require("batch_size", settings.batch_size, settings.batch_size >= 1, "must be at least 1")
    return settings


def check(arguments: Sequence[str]) -> None:
    """Raise `ValueError` for arguments that `measure` does not take."""
    settings_of(arguments)


def ask(pictures: Sequence[Picture], styles: Sequence[str], count: int) -> Asked:
    """What is drawn. The prompts of a model that knows one style do not name it, and no pairs are held out for it."""
    is_named = len(styles) > 1
    parts = {ROWS[0]: by_hash(trained(pictures, styles))}
    grids = {"training": described(of_every_style(parts[ROWS[0]], styles), is_named)}
    if is_named:
        parts[ROWS[1]] = by_hash(picture for picture in pictures if picture.held_out == "pair")
        shown = of_every_style(parts[ROWS[1]], styles)
        grids |= {"held_out": described(shown, True), "companions": described(companions(shown, pictures), True)}
    counts = {name: min(count, len(part) // 2) for name, part in parts.items()}
    rows = {name: described(part[: counts[name]], is_named) for name, part in parts.items()}
    others = {name: part[counts[name] :][:MAX_COMPARED] for name, part in parts.items()}
    return Asked(grids | {"free": Prompts(list(FREE), [])}, rows, others)


def draw(sampler: Sampler, solver: SamplerConfig, prompts: Sequence[str], settings: Settings) -> Images:
    """One image of each prompt. Batches are kept in `out`, by all that the images depend on."""
    requests = sampler.requests(1, {"prompts": list(prompts)})
    identity = [sampler.fingerprint, sampler.vae.fingerprint, dataclasses.asdict(solver), settings.seed, list(prompts)]
    folder = Path(settings.out) / "images" / fingerprint(json.dumps(identity))

    def batch(numbers: list[int]) -> Images:
        print(f"drawing {numbers[0]} of {len(prompts)}", flush=True)
        padded = numbers + numbers[-1:] * (settings.batch_size - len(numbers))  # one shape, one compilation
        (drawn,) = sampler.batches(requests, solver, settings.seed, settings.batch_size, padded)
        return drawn.images[: len(numbers)]

    starts = range(0, len(prompts), settings.batch_size)
    batches = [list(range(start, min(start + settings.batch_size, len(prompts)))) for start in starts]
    parts = [kept(folder / f"{some[0]:06d}-{len(some)}.npy", functools.partial(batch, some)) for some in batches]
    return np.concatenate(parts)


def reconstructed(sampler: Sampler, images: Images, batch_size: int) -> Images:
    """Real pictures through the VAE of the model."""
    encode, latents = latent_encoder(sampler.vae, batch_size), sampler.trained.manifest.latent_shape
    raw = [encode(images[i : i + batch_size]).ready()[0] for i in range(0, len(images), batch_size)]
    decode = make_decoder(sampler.vae, (0.0,) * latents[0], (1.0,) * latents[0], sampler.mesh)
    return decode(np.concatenate(raw))


def save_grids(out: Path, asked: Asked, images: Mapping[str, Images], real: Real) -> list[str]:
    """Write the grids and return their names. Rows of the training and held-out pictures begin with the real one."""
    sheets = {"training": ["training"], "held_out": ["held_out", "companions"], "free": ["free"]}
    written: list[str] = []
    for name, parts in sheets.items():
        if parts[0] not in asked.grids:
            continue
        cells: list[Images] = []
        captions: list[str] = []
        for row in range(len(asked.grids[name].prompts)):
            for part in parts:
                prompts, pictures = asked.grids[part]
                if pictures:
                    cells.append(real.images([pictures[row]]))
                    captions.append("real")
                cells.append(images[part][row * IMAGES : (row + 1) * IMAGES])
                captions += [prompts[row]] + [""] * (IMAGES - 1)
        columns = 2 * IMAGES if name == "free" else 2 * (IMAGES + 1)
        save_grid(out / f"{name}.png", np.concatenate(cells), captions, columns)
        written.append(f"{name}.png")
    return written


def split_images(asked: Asked, images: Images) -> dict[str, Images]:
    """The images of each grid and each row of the table."""
    counts = {name: IMAGES * len(part.prompts) for name, part in asked.grids.items()}
    counts |= {name: len(part.prompts) for name, part in asked.table.items()}
    ends = np.cumsum(list(counts.values())).tolist()
    return {name: images[end - count : end] for (name, count), end in zip(counts.items(), ends, strict=True)}


def judged(judge: Judge, asked: Asked, images: Mapping[str, Images], sampler: Sampler, settings: Settings) -> list[Row]:
    """The rows of the table: drawn and real images of the same prompts, all judged in the same way."""
    rows: list[Row] = []
    for name, part in asked.table.items():
        real = judge.real.images(part.pictures)
        rows.append(judge.row(name, images[name], part.pictures, asked.others[name]))
        rows.append(judge.row(f"{name}: real pictures", real, part.pictures, asked.others[name]))
        through = reconstructed(sampler, real, settings.batch_size)
        rows.append(judge.row(f"{name}: the same through the VAE", through, part.pictures, asked.others[name]))
        rows.append(judge.chance(f"{name}: chance", part.pictures))
    for name, title in GRIDS.items():
        if name in asked.grids:
            rows.append(judge.row(title, images[name], asked.grids[name].pictures, repeats=IMAGES))
    return rows


def measure(*arguments: str) -> str:
    """The table; writes it and the grids to `out`."""
    settings = settings_of(arguments)
    out, pictures = Path(settings.out), load_pictures()
    sampler = flowdit.load(settings.checkpoint)
    rule = f"must draw images of {TILE}x{TILE}, as the pictures are"
    require("checkpoint", settings.checkpoint, sampler.image_size == (TILE, TILE), rule)
    solver = sampler.sampler_config(settings.sampler())
    asked = ask(pictures, settings.styles(), settings.images)
    images = split_images(asked, draw(sampler, solver, asked.every(), settings))
    real = load_real(pictures, settings.cache)
    grids = save_grids(out, asked, images, real)
    rows = judged(Judge(real, asked.pictures(), settings.seed), asked, images, sampler, settings)
    shown = table(HEADER, [row.cells() for row in rows])
    title = f"Step {sampler.trained.step} of {settings.checkpoint}, {solver.solver}, {solver.steps} steps, guidance "
    title += f"{solver.guidance:g}, seed {settings.seed}"
    content = {"settings": dataclasses.asdict(settings), "sampler": dataclasses.asdict(solver), "grids": grids}
    content |= {"step": sampler.trained.step, "weights": sampler.fingerprint, "rows": [row._asdict() for row in rows]}
    (out / "table.md").write_text(f"{title}\n\n{shown}\n", encoding="utf-8")
    (out / "table.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return f"{title}\n\n{shown}"
