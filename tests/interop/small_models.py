"""Small models with random weights and the metadata of a run, and their outputs in diffusers and flowdit."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from runs import LATENT_SHAPE

from flowdit.checkpoint.meta import RunMeta
from flowdit.checkpoint.names import named_arrays
from flowdit.conditioning.labels import Labels
from flowdit.inference.trained import describe_trained
from flowdit.interop import ConvertConfig, convert
from flowdit.interop.portable import Portable, to_trained, write_checkpoint, write_single
from flowdit.models.pixart import TextCondition

WIDTH = 24
TOKENS = 6
CLASSES = 4
TEXT = {"name": "wordllama", "fingerprint": "0" * 64, "dtype": "float32", "max_length": TOKENS, "width": WIDTH}
SMALL = {"depth": 2, "hidden_dim": 48, "num_heads": 4}
STOCK_CLASS = SMALL | {"name": "ccdit", "qk_norm": False, "time_freq_shift": 1.0}
STOCK_TEXT = SMALL | {"name": "pixart", "qk_norm": False}
DEFAULT_CLASS, DEFAULT_TEXT = SMALL | {"name": "ccdit"}, SMALL | {"name": "pixart"}


def random_model(
    meta: dict[str, Any],
    model: dict[str, Any],
    sampler: dict[str, Any] | None = None,
    text: dict[str, Any] = TEXT,
    conditioning: str | None = None,
) -> Portable:
    """A model of these fields on the data of `meta`, every parameter normal(0.1), scales of norms around 1.

    `conditioning` is by default the first kind of the model.
    """
    conditioning = conditioning or {"ccdit": "labels", "pixart": "text"}[model["name"]]
    config = meta["config"] | {"conditioning": conditioning}
    train = config["train"] | {"sampler": config["train"]["sampler"] | (sampler or {})}
    config = config | {"model": config["model"] | model, "train": train}
    stored = RunMeta.parse(meta | {"config": config, "text": text if conditioning == "text" else None})
    rng = np.random.default_rng(0)
    arrays = {
        name: np.float32(name.endswith("norm.scale")) + np.float32(0.1) * rng.standard_normal(leaf.shape, np.float32)
        for name, leaf in named_arrays(describe_trained(stored).model).items()
    }
    return Portable(arrays, stored)


def saved(portable: Portable, path: Path) -> str:
    """Write a checkpoint or, depending on the path, a `.safetensors` file, which is faster; return its name."""
    write = write_single if path.suffix == ".safetensors" else write_checkpoint
    write(portable, path, "float32")
    return str(path)


def noise(count: int = 2, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, *LATENT_SHAPE), np.float32)


def text_inputs(lengths: tuple[int, ...] = (TOKENS, 2)) -> tuple[np.ndarray, np.ndarray]:
    """Features (n, tokens, width) and ragged masks."""
    features = np.random.default_rng(7).standard_normal((len(lengths), TOKENS, WIDTH), np.float32)
    return features, np.arange(TOKENS)[None] < np.asarray(lengths)[:, None]


def ours_condition(portable: Portable, labels=(1, 3), lengths=(TOKENS, 2)) -> Any:
    """Conditions of our model: `labels`, or the texts of `text_inputs(lengths)`."""
    if portable.meta.text is None:
        return jnp.asarray(labels, jnp.int32)
    features, mask = text_inputs(lengths)
    size = np.full((len(lengths), 2), portable.meta.manifest.image_size, np.float32)
    is_sized = getattr(portable.meta.config.model, "micro_conditioning", False)
    dropped = np.zeros(len(lengths), bool)
    return jax.tree.map(jnp.asarray, TextCondition(features, mask, dropped, size if is_sized else None))


def ours_null(portable: Portable, condition: Any) -> Any:
    if portable.meta.text is None:
        return jax.vmap(Labels(tuple(map(str, range(CLASSES)))).null)(condition)
    return condition._replace(dropped=jnp.ones_like(condition.dropped))


def torch_condition(portable: Portable, labels=(1, 3), lengths=(TOKENS, 2)) -> dict[str, Any]:
    """The conditions of `ours_condition` as keyword arguments of a diffusers transformer."""
    import torch

    if portable.meta.text is None:
        return {"class_labels": torch.tensor(labels)}
    features, mask = map(torch.from_numpy, text_inputs(lengths))
    side = float(portable.meta.manifest.image_size)
    sizes = {"resolution": torch.full((len(lengths), 2), side), "aspect_ratio": torch.ones(len(lengths), 1)}
    is_sized = getattr(portable.meta.config.model, "micro_conditioning", False)
    added = {"added_cond_kwargs": sizes if is_sized else {"resolution": None, "aspect_ratio": None}}
    return {"encoder_hidden_states": features, "encoder_attention_mask": mask.to(torch.float32)} | added


def relative_error(got: Any, expected: Any) -> float:
    return float(np.linalg.norm(np.asarray(got) - np.asarray(expected)) / np.linalg.norm(np.asarray(expected)))


def output_error(transformer: Any, portable: Portable) -> float:
    """Relative error of our output compared with the torch module's, on two examples at two times."""
    import torch

    x, t = noise(), np.asarray([0.5, 0.875], np.float32)  # 1000 t is exact too
    condition = torch_condition(portable)
    with torch.no_grad():
        expected = transformer(torch.from_numpy(x), timestep=torch.from_numpy(1000 * t), **condition).sample
    got = jax.jit(jax.vmap(to_trained(portable).model))(jnp.asarray(x), jnp.asarray(t), ours_condition(portable))
    return relative_error(got, expected)


def converted(source: str | Path, target: Path, **fields: Any) -> Path:
    """Run `flowdit.convert`, by default without an image, and return the target."""
    convert(ConvertConfig(source=str(source), target=str(target), **({"image": "none"} | fields)))
    return target


def assert_same(one: Portable, other: Portable) -> None:
    """Compare arrays bit by bit with their dtypes, and metadata."""
    assert one.meta == other.meta
    assert one.arrays.keys() == other.arrays.keys()
    for name, array in one.arrays.items():
        assert array.dtype == other.arrays[name].dtype, name
        np.testing.assert_array_equal(array, other.arrays[name], err_msg=name)
