"""Importing and exporting full-size diffusers DiTs with `python -m flowdit.convert`: time, memory and errors.

Random weights in the shapes of the DiT paper, with 1000 classes and a learned variance, like facebook/DiT-XL-2-256.
Each conversion is a separate process, and so is everything that loads torch or JAX, as the measured peak memory of a
process includes that of its parent at the fork. XL/2 needs 11 GB of memory and 9 GB of disk.
"""

import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.timing import seconds, table

SHAPES = {"S/2": (12, 384, 6), "B/2": (12, 768, 12), "XL/2": (28, 1152, 16)}
CHANNELS = 4
SIDE = 32
PATCH = 2
CLASSES = 1000
WEIGHTS = "diffusion_pytorch_model.safetensors"
HEADER = ["model", "parameters", "in", "peak memory", "out", "peak memory", "relative error", "largest", "out == in"]


def build(folder: str, depth: str, dim: str, heads: str) -> dict[str, Any]:
    """Write a diffusers folder with torch's random initialisation."""
    import torch
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        int(heads),
        int(dim) // int(heads),
        in_channels=CHANNELS,
        out_channels=2 * CHANNELS,
        num_layers=int(depth),
        sample_size=SIDE,
        patch_size=PATCH,
        num_embeds_ada_norm=CLASSES,
    )
    first: Any = model.transformer_blocks[0]
    blocks: Any = model.transformer_blocks
    for block in blocks:  # trained models have copies of one embedder in all blocks
        block.norm1.emb.load_state_dict(first.norm1.emb.state_dict())
    model.save_pretrained(folder)
    return {}


def command(*overrides: str) -> dict[str, Any]:
    """Run a conversion: its seconds and peak resident bytes. Raises `CalledProcessError` if it fails."""
    convert = [sys.executable, "-m", "flowdit.convert", *overrides]
    taken = seconds(lambda: subprocess.run(convert, check=True, stdout=sys.stderr))
    return {"seconds": taken, "bytes": 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss}


def errors(source: str, checkpoint: str) -> dict[str, Any]:
    """Number of parameters, and the relative and largest difference of our output from the first half of diffusers'."""
    import numpy as np

    x = np.random.default_rng(0).standard_normal((1, CHANNELS, SIDE, SIDE), np.float32)
    expected = _output_of_diffusers(source, x)
    parameters, got = _output_here(checkpoint, x[0])
    difference = got - expected
    relative = np.linalg.norm(difference) / np.linalg.norm(expected)
    return {"parameters": parameters, "relative": float(relative), "largest": float(np.abs(difference).max())}


def _output_of_diffusers(source: str, x: Any) -> Any:
    import torch
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    model: Any = DiTTransformer2DModel.from_pretrained(source)
    with torch.no_grad():
        output = model.eval()(torch.from_numpy(x), torch.tensor([500.0]), torch.tensor([207])).sample
    return output[0, :CHANNELS].numpy()


def _output_here(checkpoint: str, x: Any) -> tuple[int, Any]:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from flowdit import load

    model = load(str(Path(checkpoint))).trained.model
    evaluate = jax.jit(lambda model, x: model(x, jnp.float32(0.5), jnp.int32(207)))
    output = evaluate(model, jnp.asarray(x))
    return sum(leaf.size for leaf in jax.tree.leaves(model)), np.asarray(output)


def same(source: str, exported: str) -> dict[str, Any]:
    """Whether every tensor is bit-identical after the round trip; of the last layer only the half that is kept."""
    import safetensors

    with (
        safetensors.safe_open(f"{source}/{WEIGHTS}", framework="np") as one,
        safetensors.safe_open(f"{exported}/transformer/{WEIGHTS}", framework="np") as other,
    ):
        names = set(one.keys())
        return {"same": names == set(other.keys()) and all(_same(name, one, other) for name in names)}


def _same(name: str, one: Any, other: Any) -> bool:
    before, after = one.get_tensor(name), other.get_tensor(name)
    if name.startswith("proj_out_2"):
        before = before.reshape(PATCH**2, 2 * CHANNELS, -1)[:, :CHANNELS].reshape(after.shape)
    return before.dtype == after.dtype and before.tobytes() == after.tobytes()


def in_process(part: str, *arguments: str) -> dict[str, Any]:
    """Run a function of this file in a separate process and return its result."""
    process = [sys.executable, "-m", "benchmarks.convert", part, *arguments]
    return json.loads(subprocess.run(process, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])


def row(name: str) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        source, checkpoint, exported = (f"{folder}/{part}" for part in ("source", "checkpoint", "exported"))
        in_process("build", source, *map(str, SHAPES[name]))
        into = in_process("command", f"source={source}", f"target={checkpoint}")
        out = in_process("command", f"source={checkpoint}", f"target={exported}", "to=diffusers", "image=none")
        error, round_trip = in_process("errors", source, checkpoint), in_process("same", source, exported)
    shown = [cell for run in (into, out) for cell in (f"{run['seconds']:.1f} s", f"{run['bytes'] / 1e9:.1f} GB")]
    accuracy = [f"{error['relative']:.1e}", f"{error['largest']:.1e}", "bit by bit" if round_trip["same"] else "no"]
    return [name, f"{error['parameters'] / 1e6:.1f} M", *shown, *accuracy]


def measure() -> str:
    return table(HEADER, [row(name) for name in SHAPES])


if __name__ == "__main__":
    PARTS = {function.__name__: function for function in (build, command, errors, same)}
    print(json.dumps(PARTS[sys.argv[1]](*sys.argv[2:])))
