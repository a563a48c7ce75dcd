"""`python -m flowdit.sample checkpoint=checkpoints/<step> [labels=[...] ...]`: a checkpoint folder in, PNGs out."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import jax
import jax.numpy as jnp
import numpy as np
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from flowdit.config import Config, SampleConfig, register_schemas, resolve, run_command, user_errors
from flowdit.data.manifest import Manifest
from flowdit.diffusion.pictures import make_decoder, save_grid
from flowdit.diffusion.sampling import picture_noise, sample
from flowdit.training.checkpoint import read_meta, restore_ema
from flowdit.training.evaluate import load_matching_vae
from flowdit.training.setup import model_builder, resolve_labels
from flowdit.training.step import cast_floating


class Trained(NamedTuple):
    """A model read from a checkpoint folder, with all that sampling needs to know."""

    model: Any
    config: Config
    manifest: Manifest
    mean: list[float]
    scale: list[float]
    step: int


def load_checkpoint(folder: Path) -> Trained:
    """The EMA model in `folder` in float32. Raises `CheckpointError` if it is missing, damaged or foreign."""
    meta = read_meta(folder)
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), meta["config"]))
    assert isinstance(config, Config)
    manifest = Manifest.parse(meta["manifest"])
    template = jax.eval_shape(model_builder(config.model, manifest, "float32", config.seed))
    model = restore_ema(folder, template)
    return Trained(model, config, manifest, meta["latent_mean"], meta["latent_scale"], meta["step"])


def draw(trained: Trained, config: SampleConfig, labels: list[int]) -> tuple[np.ndarray, int]:
    """Normalised latents (len(labels), channels, height, width), and the model evaluations for each picture's batch."""
    count, batch_size = len(labels), min(config.batch_size, len(labels))
    noise = picture_noise(jax.random.key(config.seed), count, trained.manifest.latent_shape)
    null = np.int32(trained.manifest.num_classes)
    dtype = "bfloat16" if jax.default_backend() != "cpu" else "float32"

    @jax.jit
    def run(model, noise, labels):
        return sample(cast_floating(model, dtype), noise, labels, null, config)

    padding = -count % batch_size
    noise = jnp.concatenate([noise, jnp.zeros((padding, *noise.shape[1:]))]).reshape(-1, batch_size, *noise.shape[1:])
    padded_labels = jnp.asarray(labels + [0] * padding).reshape(-1, batch_size)
    results = [run(trained.model, n, c) for n, c in zip(noise, padded_labels, strict=True)]
    latents = np.concatenate([np.asarray(result.latents) for result in results])[:count]
    return latents, max(int(result.evaluations) for result in results)


def write_samples(trained: Trained, config: SampleConfig, labels: list[int]) -> Path:
    """Draw, decode and write `grid.png`, single PNGs and `samples.json` into `config.out`; the grid's path."""
    vae = load_matching_vae(config.vae or trained.manifest.vae.name, trained.manifest)
    out, names = Path(config.out), [trained.manifest.class_names[label] for label in labels]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise ValueError(f"out: {out} cannot be written: {problem.strerror}") from None
    latents, evaluations = draw(trained, config, labels)
    images = make_decoder(vae, trained.mean, trained.scale)(latents)
    for i, (image, name) in enumerate(zip(images, names, strict=True)):
        Image.fromarray(image).save(out / f"{i:04d}_{_file_name(name)}.png")
    if config.save_latents:
        np.save(out / "latents.npy", latents)
    settings = dataclasses.asdict(config) | {"labels": labels, "class_names": names}
    record = {"settings": settings, "evaluations": evaluations, "step": trained.step, "weights": "ema"}
    (out / "samples.json").write_text(json.dumps(record, indent=1) + "\n")
    save_grid(out / "grid.png", images, names, config.columns)
    return out / "grid.png"


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in name)[:60]


@hydra.main(version_base="1.3", config_path="configs", config_name="sample")
@user_errors()
def _sample(composed: DictConfig) -> None:
    config: SampleConfig = resolve(composed, SampleConfig)
    config.check_all()
    trained = load_checkpoint(Path(config.checkpoint))
    default = trained.config.train.sample_labels if config.labels is None else config.labels
    labels = resolve_labels("labels", default, trained.manifest.class_names)
    labels = [label for label in labels for _ in range(config.per_label)]
    print(
        f"step {trained.step}: {len(labels)} pictures, {config.solver}, {config.steps} steps, guidance {config.guidance}"
    )
    print(f"samples: {write_samples(trained, config, labels)}", flush=True)


def main() -> None:
    register_schemas()
    run_command(_sample)


if __name__ == "__main__":
    main()
