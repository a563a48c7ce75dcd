"""`python -m flowdit.sample checkpoint=checkpoints/<step> [labels=[...] | prompts=[...] ...]`: a checkpoint in, PNGs out."""

from __future__ import annotations

import dataclasses
import json
import os
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import jax
import jax.numpy as jnp
import numpy as np
from omegaconf import DictConfig
from PIL import Image

from flowdit.command import run_command, user_errors
from flowdit.config import SampleConfig, register_schemas, resolve
from flowdit.data.pictures import SUFFIXES
from flowdit.diffusion.pictures import make_decoder, save_grid
from flowdit.diffusion.sampling import SamplerConfig, picture_noise, sample
from flowdit.models.compute import choose_compute
from flowdit.models.text_encoder import TextEncoder, load_text_encoder
from flowdit.training.evaluate import load_matching_vae
from flowdit.training.stages import Requests, describe_encoder, label_requests, prompt_requests, resolve_labels
from flowdit.training.trained import Trained, load_trained

UNFINISHED = "samples.json.unfinished"
"""The name of `samples.json` until all pictures are written."""


def make_requests(trained: Trained, config: SampleConfig) -> Requests:
    """The pictures asked for. Raises `ValueError` for labels asked of a text model or prompts of a class model."""
    if trained.text is None:
        for field in ("prompts", "prompts_file", "negative_prompt", "text_encoder"):
            if getattr(config, field):
                raise ValueError(f"{field}: {config.checkpoint} holds a class model, which takes labels")
        labels = trained.config.train.sample_labels if config.labels is None else config.labels
        class_names = trained.manifest.class_names
        numbers = repeated(resolve_labels("labels", labels, class_names), config.num_images)
        return label_requests(numbers, class_names, trained.conditioning)
    if config.labels is not None:
        raise ValueError(f"labels: {config.checkpoint} holds a text model, which takes prompts")
    prompts = repeated(read_prompts(trained, config), config.num_images)
    encoder = load_matching_encoder(trained, config.text_encoder)
    warn_of_truncation(encoder, [*prompts, config.negative_prompt])
    return prompt_requests(encoder, prompts, config.negative_prompt, trained.conditioning)


def repeated(items: list, count: int) -> list:
    """Every item `count` times in a row."""
    return [item for item in items for _ in range(count)]


def read_prompts(trained: Trained, config: SampleConfig) -> list[str]:
    """The prompts given, those in the file, or those of the previews in training."""
    if config.prompts is not None and config.prompts_file is not None:
        raise ValueError(f"prompts_file: must not be given together with prompts, got {config.prompts_file}")
    prompts = trained.config.train.sample_prompts if config.prompts is None else config.prompts
    if config.prompts_file is not None:
        try:
            lines = Path(config.prompts_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as problem:
            raise ValueError(f"prompts_file: {config.prompts_file} cannot be read: {problem}") from None
        prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        field = "prompts" if config.prompts_file is None else "prompts_file"
        raise ValueError(f"{field}: must hold at least one prompt")
    return list(prompts)


def load_matching_encoder(trained: Trained, name: str | None) -> TextEncoder:
    """The text encoder of the training run, from where it was or from `name`. Raises `ValueError` if it is another."""
    stored = trained.config.text
    assert trained.text is not None
    if not (name or stored.encoder):
        raise ValueError(
            f"text_encoder: must be given, the checkpoint names none (features of width {trained.text['width']})"
        )
    encoder = load_text_encoder(dataclasses.replace(stored, encoder=name or stored.encoder))
    if encoder.width != trained.text["width"]:
        raise ValueError(
            f"text_encoder: must make features of width {trained.text['width']}, {encoder.name!r} makes {encoder.width}"
        )
    if not trained.text["fingerprint"]:  # a model that was trained elsewhere: nothing more is known
        return encoder
    if encoder.fingerprint != trained.text["fingerprint"]:
        raise ValueError(
            f"text_encoder: must be the one of the training run ({trained.text['name']}, fingerprint "
            f"{trained.text['fingerprint']}), {encoder.name!r} has {describe_encoder(encoder)['fingerprint']}"
        )
    return encoder


def warn_of_truncation(encoder: TextEncoder, prompts: list[str]) -> None:
    """Say which prompts the encoder cuts short."""
    truncated = encoder.tokenize(prompts).truncated
    for prompt in dict.fromkeys(prompt for prompt, cut in zip(prompts, truncated, strict=True) if cut):
        print(f"warning: longer than {encoder.max_length} tokens, the rest is ignored: {prompt[:60]!r}...", flush=True)


def draw(
    trained: Trained, sampler: SamplerConfig, requests: Requests, seed: int, batch_size: int
) -> tuple[np.ndarray, int]:
    """Normalised latents (requests, channels, height, width), and the model evaluations for each picture's batch."""
    count = len(requests.captions)
    batch_size = min(batch_size, count)
    noise = picture_noise(jax.random.key(seed), count, trained.manifest.latent_shape)
    dtype = "bfloat16" if jax.default_backend() != "cpu" else "float32"
    text_tokens = None if trained.text is None else trained.text["max_length"]
    shapes = trained.config.model.attention_shapes(trained.manifest.latent_shape, text_tokens)
    compute = choose_compute(None, dtype, shapes)

    def solve(model, noise, condition, null):
        return sample(compute.cast(model), noise, condition, null, sampler, trained.prediction)

    run = jax.jit(compute.on(None, solve))

    def batches(x):
        padded = jnp.concatenate([x, jnp.repeat(x[-1:], -count % batch_size, axis=0)])
        return padded.reshape(-1, batch_size, *x.shape[1:])

    parts = jax.tree.map(batches, (noise, requests.condition, requests.null))
    results = [run(trained.model, *jax.tree.map(itemgetter(i), parts)) for i in range(-(-count // batch_size))]
    latents = np.concatenate([np.asarray(result.latents) for result in results])[:count]
    return latents, max(int(result.evaluations) for result in results)


class Drawn(NamedTuple):
    """Pictures as bytes (count, height, width, 3), the normalised latents they come from, and the evaluations it took."""

    images: np.ndarray
    latents: np.ndarray
    evaluations: int


def draw_pictures(trained: Trained, config: SampleConfig, sampler: SamplerConfig, requests: Requests) -> Drawn:
    """What is asked for, drawn and decoded by the VAE of the data."""
    vae = load_matching_vae(config.vae or trained.manifest.vae.name, trained.manifest)
    latents, evaluations = draw(trained, sampler, requests, config.seed, config.batch_size)
    return Drawn(make_decoder(vae, trained.mean, trained.scale)(latents), latents, evaluations)


def sample_grid(trained: Trained, path: Path, vae: str | None = None, prompts: list[str] | None = None) -> None:
    """A grid of `prompts`, or of what was previewed in training, with the sampler of the previews."""
    config = SampleConfig(checkpoint="the checkpoint", vae=vae, prompts=prompts)
    requests = make_requests(trained, config)
    drawn = draw_pictures(trained, config, trained.config.train.sampler, requests)
    save_grid(path, drawn.images, requests.captions, config.columns)


def write_samples(trained: Trained, config: SampleConfig, sampler: SamplerConfig, requests: Requests) -> Path:
    """Draw, decode and write `grid.png`, single PNGs and `samples.json` into `config.out`; the grid's path.

    Raises `ValueError` if they cannot be written.
    """
    out = Path(config.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise ValueError(f"out: {out} cannot be written: {problem.strerror}") from None
    drawn = draw_pictures(trained, config, sampler, requests)
    settings = dataclasses.asdict(config) | dataclasses.asdict(sampler) | {"captions": requests.captions}
    record = {"settings": settings, "evaluations": drawn.evaluations, "step": trained.step, "weights": "ema"}
    replaced = check_folder(config)
    try:
        return _write_files(out, replaced, drawn, record, config.columns)
    except OSError as problem:
        raise ValueError(f"out: {out} cannot be written: {problem.strerror or problem}") from None


def _write_files(out: Path, replaced: list[Path], drawn: Drawn, record: dict[str, Any], columns: int) -> Path:
    settings = record["settings"]
    for path in replaced:
        path.unlink()
    # The list of what is written comes first, so that what an interrupted run leaves can be told, too.
    (out / UNFINISHED).write_text(json.dumps(record, indent=1) + "\n")
    for name, image in zip(_picture_names(settings["captions"]), drawn.images, strict=True):
        Image.fromarray(image).save(out / name)
    if settings["save_latents"]:
        np.save(out / "latents.npy", drawn.latents)
    save_grid(out / "grid.png", drawn.images, settings["captions"], columns)
    os.replace(out / UNFINISHED, out / "samples.json")
    return out / "grid.png"


def check_folder(config: SampleConfig) -> list[Path]:
    """The files of an earlier run in `config.out`, which may go. Sub-folders and files of other kinds stay.

    Raises `ValueError` for pictures that would lie among the new ones: those of an earlier run unless `config.overwrite`
    is set, and any others. A score of such a folder would be wrong without a word.
    """
    out = Path(config.out)
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    earlier = _earlier_files(out) & names
    pictures = {name for name in names if Path(name).suffix.lower() in SUFFIXES}
    if foreign := sorted((pictures | names & {"latents.npy"}) - earlier):
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
    """Names of what an earlier run has written, or was going to, as its `samples.json` says."""
    files: set[str] = set()
    for path in (folder / "samples.json", folder / UNFINISHED):
        if path.is_file():
            try:
                settings = json.loads(path.read_text(encoding="utf-8"))["settings"]
                files |= {path.name, "grid.png", *_picture_names(settings["captions"])}
                files |= {"latents.npy"} if settings["save_latents"] else set()
            except (ValueError, KeyError, TypeError, RecursionError):
                raise ValueError(f"out: {path} is not of an earlier run: give another folder") from None
    return files


def _picture_names(captions: list[str]) -> list[str]:
    return [f"{i:04d}_{_file_name(caption)}.png" for i, caption in enumerate(captions)]


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in name)[:60]


@hydra.main(version_base="1.3", config_path="configs", config_name="sample")
@user_errors()
def _sample(composed: DictConfig) -> None:
    config: SampleConfig = resolve(composed, SampleConfig)
    config.check()
    check_folder(config)
    trained = load_trained(Path(config.checkpoint))
    sampler = config.sampler(trained.config.train.sampler)
    requests = make_requests(trained, config)
    count = len(requests.captions)
    print(
        f"step {trained.step}: {count} pictures, {sampler.solver}, {sampler.steps} steps, guidance {sampler.guidance}"
    )
    print(f"samples: {write_samples(trained, config, sampler, requests)}", flush=True)


def main() -> None:
    register_schemas()
    run_command(_sample)


if __name__ == "__main__":
    main()
