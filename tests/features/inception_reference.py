"""Inception v3 in the variant of the FID, in PyTorch's functions: random weights, features and logits.

Compared once with torch-fidelity 0.4.0 on the same weights: see docs/decisions.md.
"""

import numpy as np
import torch
from torch.nn import functional

State = dict[str, torch.Tensor]


def random_state(seed: int = 0) -> dict[str, np.ndarray]:
    """Random tensors with the names and shapes of the file, whose activations keep their size."""
    rng, state = np.random.default_rng(seed), {}

    def record(name: str, x: torch.Tensor, out: int, sides: tuple[int, int], **_) -> torch.Tensor:
        fan_in = x.shape[1] * sides[0] * sides[1]
        state[f"{name}.conv.weight"] = rng.standard_normal((out, x.shape[1], *sides), np.float32) * (2 / fan_in) ** 0.5
        state[f"{name}.bn.weight"] = rng.uniform(0.5, 1.5, out)
        state[f"{name}.bn.running_var"] = rng.uniform(0.5, 1.5, out)
        state[f"{name}.bn.bias"], state[f"{name}.bn.running_mean"] = rng.normal(0, 0.1, (2, out))
        state[f"{name}.bn.num_batches_tracked"] = np.array(0)
        return x.new_zeros((1, out, 1, 1))

    network(torch.zeros(1, 3, 1, 1), record, lambda x, kind, stride: x)
    state["fc.weight"], state["fc.bias"] = rng.normal(0, 0.02, (1008, 2048)), rng.normal(0, 1, 1008)
    return {name: tensor if tensor.shape == () else tensor.astype(np.float32) for name, tensor in state.items()}


@torch.no_grad()
def reference(state: dict[str, np.ndarray], pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features and logits without bias of images in [0, 255], (n, height, width, 3), not resized."""
    tensors: State = {name: torch.tensor(tensor) for name, tensor in state.items()}

    def convolve(name: str, x: torch.Tensor, out: int, sides: tuple[int, int], stride: int = 1, pad: bool = True):
        padding = tuple(side // 2 for side in sides) if pad and stride == 1 else 0
        x = functional.conv2d(x, tensors[f"{name}.conv.weight"], stride=stride, padding=padding)
        moments = (tensors[f"{name}.bn.{key}"] for key in ("running_mean", "running_var", "weight", "bias"))
        return functional.relu(functional.batch_norm(x, *moments, eps=1e-3))

    def pool(x: torch.Tensor, kind: str, stride: int) -> torch.Tensor:
        if kind == "average":
            return functional.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        return functional.max_pool2d(x, 3, stride=stride, padding=1 if stride == 1 else 0)

    x = torch.tensor(pixels.transpose(0, 3, 1, 2))
    features = network((x - 128) / 128, convolve, pool).mean((2, 3))
    return features.numpy(), (features @ tensors["fc.weight"].T).numpy()


def network(x: torch.Tensor, convolve, pool) -> torch.Tensor:
    x = convolve("Conv2d_1a_3x3", x, 32, (3, 3), stride=2)
    x = convolve("Conv2d_2a_3x3", x, 32, (3, 3), pad=False)
    x = pool(convolve("Conv2d_2b_3x3", x, 64, (3, 3)), "max", 2)
    x = convolve("Conv2d_4a_3x3", convolve("Conv2d_3b_1x1", x, 80, (1, 1)), 192, (3, 3), pad=False)
    x = pool(x, "max", 2)

    def chain(block: str, x: torch.Tensor, *steps) -> torch.Tensor:
        for name, out, sides, *stride in steps:
            x = convolve(f"{block}.{name}", x, out, sides, stride=stride[0] if stride else 1)
        return x

    one, three = (1, 1), (3, 3)
    row, column = (1, 7), (7, 1)
    for block, width in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
        double = ("branch3x3dbl_1", 64, one), ("branch3x3dbl_2", 96, three), ("branch3x3dbl_3", 96, three)
        parts = [
            chain(block, x, ("branch1x1", 64, one)),
            chain(block, x, ("branch5x5_1", 48, one), ("branch5x5_2", 64, (5, 5))),
            chain(block, x, *double),
            chain(block, pool(x, "average", 1), ("branch_pool", width, one)),
        ]
        x = torch.cat(parts, 1)
    double = ("branch3x3dbl_1", 64, one), ("branch3x3dbl_2", 96, three), ("branch3x3dbl_3", 96, three, 2)
    parts = [chain("Mixed_6a", x, ("branch3x3", 384, three, 2)), chain("Mixed_6a", x, *double), pool(x, "max", 2)]
    x = torch.cat(parts, 1)
    for block, inner in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
        sides = (one, column, row, column, row)
        double = [(f"branch7x7dbl_{i + 1}", 192 if i == 4 else inner, side) for i, side in enumerate(sides)]
        single = ("branch7x7_1", inner, one), ("branch7x7_2", inner, row), ("branch7x7_3", 192, column)
        parts = [chain(block, x, ("branch1x1", 192, one)), chain(block, x, *single), chain(block, x, *double)]
        x = torch.cat([*parts, chain(block, pool(x, "average", 1), ("branch_pool", 192, one))], 1)
    short = ("branch3x3_1", 192, one), ("branch3x3_2", 320, three, 2)
    sides = (one, row, column, three)
    long = [(f"branch7x7x3_{i + 1}", 192, side, 2 if i == 3 else 1) for i, side in enumerate(sides)]
    x = torch.cat([chain("Mixed_7a", x, *short), chain("Mixed_7a", x, *long), pool(x, "max", 2)], 1)
    for block, kind in (("Mixed_7b", "average"), ("Mixed_7c", "max")):
        single = chain(block, x, ("branch3x3_1", 384, one))
        double = chain(block, x, ("branch3x3dbl_1", 448, one), ("branch3x3dbl_2", 384, three))
        halves = [
            chain(block, y, (f"{name}{letter}", 384, sides))
            for y, name in ((single, "branch3x3_2"), (double, "branch3x3dbl_3"))
            for letter, sides in (("a", (1, 3)), ("b", (3, 1)))
        ]
        parts = [chain(block, x, ("branch1x1", 320, one)), *halves]
        x = torch.cat([*parts, chain(block, pool(x, kind, 1), ("branch_pool", 192, one))], 1)
    return x
