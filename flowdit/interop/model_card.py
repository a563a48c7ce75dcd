"""The model card of an exported folder: training data, licence, settings, and code for sampling."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from flowdit.conditioning.base import Exported
from flowdit.inference.trained import Trained, describe_trained
from flowdit.interop.portable import Portable

IMAGE = "sample.png"
HUB_LICENCES = {"apache-2.0", "mit", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0"}
RECIPE = ("num_steps", "batch_size", "ema_decay", "compute_dtype", "drop_rate", "time_distribution", "time_shift")


def write_card(portable: Portable, target: Path, name: str, weights: str, image: bool) -> None:
    """Write `README.md` of the exported folder, shown by the hub."""
    described = describe_trained(portable.meta)
    exported = described.conditioning.exported()
    assert exported is not None  # `check_representable`
    sections = [
        _front_matter(described, exported),
        f"# {name}",
        _summary(portable, described, exported, weights),
        f"![samples]({IMAGE})" if image else "",
        _usage(described, exported, (target / "vae").is_dir()),
        _table("Data", _data(described) | dict(exported.facts)),
        _table("Recipe", _recipe(portable, described)),
        _table("Sampler", dataclasses.asdict(described.config.train.sampler)),
        _table("Model", dataclasses.asdict(described.config.model)),
    ]
    (target / "README.md").write_text("\n\n".join(filter(None, sections)) + "\n", encoding="utf-8")


def _front_matter(described: Trained, exported: Exported) -> str:
    """The hub's fields. A licence without an identifier on the hub is `other` with its name."""
    licence = described.manifest.license
    identifier = licence.lower().replace(" ", "-")
    lines = [
        "library_name: diffusers",
        f"pipeline_tag: {exported.task}",
        "tags: [flowdit, flow-matching, diffusion-transformer]",
    ]
    if identifier in HUB_LICENCES:
        lines += [f"license: {identifier}"]
    elif licence:
        lines += ["license: other", f"license_name: {json.dumps(licence)}"]
    return "\n".join(["---", *lines, "---"])


def _summary(portable: Portable, described: Trained, exported: Exported, weights: str) -> str:
    million = sum(array.size for array in portable.arrays.values()) / 1e6
    source = portable.meta.source
    origin = f"converted from {source}" if source else f"{weights} weights after {described.step:,} steps of flowdit"
    return (
        f"{exported.title} diffusion transformer of {million:.1f} M parameters on latents of "
        f"{'x'.join(map(str, described.manifest.latent_shape))}; {origin}. The network predicts the "
        f"{described.prediction}; flow time is 0 at the data and 1 at the noise."
    )


def _usage(described: Trained, exported: Exported, has_vae: bool) -> str:
    vae = [] if has_vae else [f'vae=AutoencoderKL.from_pretrained("{described.manifest.vae.name}")']
    parts = "`, `".join([*vae, *exported.parts])
    needed = f"\n\nNot in the folder, pass to `from_pretrained`: `{parts}`." if parts else ""
    return f"""## Use

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("<folder>", trust_remote_code=True)
image = {exported.call}.images[0]
```

`trust_remote_code` lets diffusers run the folder's `pipeline.py`. Or `flowdit.load("<folder>").draw(...)`.{needed}"""


def _data(described: Trained) -> dict[str, Any]:
    manifest = described.manifest
    records = (
        {split: manifest.num_records(split) for split in ("train", "validation")} if manifest.shards else "unknown"
    )
    facts = {"records": records, "licence": manifest.license or "not stated", "attribution": manifest.attribution}
    facts |= {"image size": manifest.image_size, "VAE": manifest.vae.name or "not named"}
    return facts | {"latent mean": list(described.mean), "latent scale": list(described.scale)}


def _recipe(portable: Portable, described: Trained) -> dict[str, Any]:
    if not described.manifest.shards:
        return {}
    config = described.config
    train = {name: getattr(config.train, name) for name in RECIPE}
    optim = {f"optim.{name}": value for name, value in dataclasses.asdict(config.optim).items()}
    return train | optim | {"seed": config.seed, "versions": portable.meta.versions}


def _table(title: str, facts: dict[str, Any]) -> str:
    if not facts:
        return ""
    rows = [f"| {name} | {_cell(value)} |" for name, value in facts.items() if value not in ("", None)]
    return "\n".join([f"## {title}", "", "| | |", "|---|---|", *rows])


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
