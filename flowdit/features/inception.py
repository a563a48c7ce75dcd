"""Inception v3 in the variant of the FID, from `pt_inception-2015-12-05-6726825d.pth`, the file of pytorch-fid.

Images are resized to 299x299 as in TensorFlow 1, not antialiased, and scaled by (x - 128) / 128. The feature is the
average over positions of the last block, 2048 wide (`pool3`); the logits are those of the Inception score, of 1008
classes and without the bias, as in torch-fidelity (`logits_unbiased`).

Source: Szegedy et al. 2015 (arXiv:1512.00567) and torch-fidelity's `feature_extractor_inceptionv3.py`. TensorFlow's
network of 2015 differs from the paper: padding does not count in averages, and the last block takes the maximum there.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from flowdit import hashing
from flowdit.arrays import check_arrays, shape_text
from flowdit.features.base import Extracted, FeatureNetwork
from flowdit.features.config import FeatureWeights
from flowdit.features.convolution import Convolution, Padding, average_pool, fold, max_pool
from flowdit.features.resize import resize_as_tensorflow1
from flowdit.fields import about, require
from flowdit.models import pretrained
from flowdit.models.torch_files import read_torch_file

SIZE, WIDTH = 299, 2048
NUM_CLASSES = 1008
EPS = 1e-3


class Layer(NamedTuple):
    """A convolution, its batch norm and a ReLU. With a stride it is not padded."""

    name: str
    width: int
    rows: int = 1
    columns: int = 1
    stride: int = 1
    padding: Padding = "SAME"


class Pool(NamedTuple):
    """A pooling over 3x3 pixels. With a stride it is not padded."""

    kind: Literal["max", "average"]
    stride: int = 1


class Split(NamedTuple):
    """Layers with the same input, their outputs side by side."""

    layers: tuple[Layer, ...]


Branch = tuple[Layer | Pool | Split, ...]
Block = tuple[str, tuple[Branch, ...]]
"""The beginning of the layers' names, and the branches, whose outputs are concatenated."""


def _square(name: str, width: int, side: int, stride: int = 1) -> Layer:
    return Layer(name, width, side, side, stride, "SAME" if stride == 1 else "VALID")


def _block_a(pool_width: int) -> tuple[Branch, ...]:
    double = (_square("branch3x3dbl_1", 64, 1), _square("branch3x3dbl_2", 96, 3), _square("branch3x3dbl_3", 96, 3))
    return (
        (Layer("branch1x1", 64),),
        (Layer("branch5x5_1", 48), _square("branch5x5_2", 64, 5)),
        double,
        (Pool("average"), Layer("branch_pool", pool_width)),
    )


def _block_b() -> tuple[Branch, ...]:
    double = (Layer("branch3x3dbl_1", 64), _square("branch3x3dbl_2", 96, 3), _square("branch3x3dbl_3", 96, 3, 2))
    return (_square("branch3x3", 384, 3, 2),), double, (Pool("max", 2),)


def _block_c(width: int) -> tuple[Branch, ...]:
    double = (
        Layer("branch7x7dbl_1", width),
        Layer("branch7x7dbl_2", width, 7, 1),
        Layer("branch7x7dbl_3", width, 1, 7),
        Layer("branch7x7dbl_4", width, 7, 1),
        Layer("branch7x7dbl_5", 192, 1, 7),
    )
    return (
        (Layer("branch1x1", 192),),
        (Layer("branch7x7_1", width), Layer("branch7x7_2", width, 1, 7), Layer("branch7x7_3", 192, 7, 1)),
        double,
        (Pool("average"), Layer("branch_pool", 192)),
    )


def _block_d() -> tuple[Branch, ...]:
    long = (
        Layer("branch7x7x3_1", 192),
        Layer("branch7x7x3_2", 192, 1, 7),
        Layer("branch7x7x3_3", 192, 7, 1),
        _square("branch7x7x3_4", 192, 3, 2),
    )
    return (Layer("branch3x3_1", 192), _square("branch3x3_2", 320, 3, 2)), long, (Pool("max", 2),)


def _block_e(kind: Literal["max", "average"]) -> tuple[Branch, ...]:
    halves = [Split((Layer(f"{n}a", 384, 1, 3), Layer(f"{n}b", 384, 3, 1))) for n in ("branch3x3_2", "branch3x3dbl_3")]
    return (
        (Layer("branch1x1", 320),),
        (Layer("branch3x3_1", 384), halves[0]),
        (Layer("branch3x3dbl_1", 448), _square("branch3x3dbl_2", 384, 3), halves[1]),
        (Pool(kind), Layer("branch_pool", 192)),
    )


STEM: Branch = (
    _square("Conv2d_1a_3x3", 32, 3, 2),
    Layer("Conv2d_2a_3x3", 32, 3, 3, padding="VALID"),
    _square("Conv2d_2b_3x3", 64, 3),
    Pool("max", 2),
    Layer("Conv2d_3b_1x1", 80),
    Layer("Conv2d_4a_3x3", 192, 3, 3, padding="VALID"),
    Pool("max", 2),
)
BLOCKS: tuple[Block, ...] = (
    ("", (STEM,)),
    ("Mixed_5b.", _block_a(32)),
    ("Mixed_5c.", _block_a(64)),
    ("Mixed_5d.", _block_a(64)),
    ("Mixed_6a.", _block_b()),
    *((f"Mixed_6{letter}.", _block_c(width)) for letter, width in zip("bcde", (128, 160, 160, 192), strict=True)),
    ("Mixed_7a.", _block_d()),
    ("Mixed_7b.", _block_e("average")),
    ("Mixed_7c.", _block_e("max")),
)


def layers() -> Iterator[tuple[str, int, Layer]]:
    """Name in the file, input width and layer of all convolutions."""
    width = 3
    for prefix, branches in BLOCKS:
        widths = []
        for branch in branches:
            widths.append(width)
            for step in branch:
                parallel = step.layers if isinstance(step, Split) else (step,)
                convolutions = [layer for layer in parallel if isinstance(layer, Layer)]
                yield from ((prefix + layer.name, widths[-1], layer) for layer in convolutions)
                widths[-1] = sum(layer.width for layer in convolutions) or widths[-1]
        width = sum(widths)


class Inception(eqx.Module):
    """From 8-bit images to `Extracted`. `load_inception` reads one; the constructor only defines the shapes."""

    convolutions: dict[str, Convolution]
    classifier: Float[Array, "width classes"]

    map_layer = "last block"

    def __init__(self):
        self.convolutions = {}
        for name, in_width, (_, width, rows, columns, stride, padding) in layers():
            weight = jnp.zeros((rows, columns, in_width, width))
            self.convolutions[name] = Convolution(weight, jnp.zeros(width), stride, padding)
        self.classifier = jnp.zeros((WIDTH, NUM_CLASSES))

    def __call__(self, images: UInt8[Array, "n height width 3"]) -> Extracted:
        return self.extract(resize_as_tensorflow1(images, SIZE))

    def extract(self, pixels: Float[Array, "n height width 3"]) -> Extracted:
        """The same without the resize, of pixels in [0, 255]."""
        with jax.default_matmul_precision("highest"):
            features = self._run_blocks(pixels).mean((1, 2))
            return Extracted(features, features @ self.classifier)

    def maps(self, images: UInt8[Array, "n height width 3"]) -> Float[Array, "n 8 8 2048"]:
        """The output of the last block."""
        with jax.default_matmul_precision("highest"):
            return self._run_blocks(resize_as_tensorflow1(images, SIZE))

    def _run_blocks(self, pixels: Float[Array, "n height width 3"]) -> Float[Array, "n _ _ out"]:
        x = (pixels - 128) / 128
        for prefix, branches in BLOCKS:
            x = jnp.concatenate([self._run(prefix, branch, x) for branch in branches], axis=-1)
        return x

    def _run(self, prefix: str, branch: Branch, x: Float[Array, "n _ _ in"]) -> Float[Array, "n _ _ out"]:
        for step in branch:
            if isinstance(step, Pool):
                is_whole = step.stride == 1
                x = (
                    average_pool(x)
                    if step.kind == "average"
                    else max_pool(x, step.stride, "SAME" if is_whole else "VALID")
                )
            else:
                parallel = step.layers if isinstance(step, Split) else (step,)
                outputs = [jax.nn.relu(self.convolutions[prefix + layer.name](x)) for layer in parallel]
                x = jnp.concatenate(outputs, axis=-1)
        return x


def load_inception(weights: FeatureWeights) -> FeatureNetwork:
    """Read the network of `weights.inception`: the `.pth` file, for which torch is needed, or a safetensors file.

    Raises:
        FieldError: naming `weights.inception` if it is not given, no file, damaged or of another network.
    """
    file = Path(weights.given("inception"))
    require("weights.inception", str(file), file.is_file(), "must be a file")
    with about("weights.inception"):
        is_safetensors = file.suffix == ".safetensors"
        tensors = pretrained.read_tensors([file]) if is_safetensors else read_torch_file(file, "model").tensors
        shapes = eqx.filter_eval_shape(Inception)
        model = pretrained.fill(shapes, _folded(file, tensors), jnp.float32, source=file)
    digest = hashing.file_sha256(file)[:12]
    identity = f"inception-2015-12-05 pool3, TF1 bilinear {SIZE}, float32, {digest}"
    return FeatureNetwork("inception", model, WIDTH, identity, NUM_CLASSES, f"inception-2015-12-05 {digest}")


def _folded(file: Path, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of `Inception`, from those of the file. Raises `ValueError` if they are of another network."""
    wanted = {"fc.weight": (NUM_CLASSES, WIDTH), "fc.bias": (NUM_CLASSES,)}
    for name, in_width, layer in layers():
        wanted[f"{name}.conv.weight"] = (layer.width, in_width, layer.rows, layer.columns)
        for moment in ("weight", "bias", "running_mean", "running_var"):
            wanted[f"{name}.bn.{moment}"] = (layer.width,)
    found = {name: shape_text(t.shape) for name, t in tensors.items() if not name.endswith("num_batches_tracked")}
    check_arrays({name: shape_text(shape) for name, shape in wanted.items()}, found, file)
    result = {"classifier": tensors["fc.weight"].T}
    for name, _, _ in layers():
        moments = {key: tensors[f"{name}.bn.{key}"] for key in ("weight", "bias", "running_mean", "running_var")}
        path = f"convolutions.{name}"
        result[f"{path}.weight"], result[f"{path}.bias"] = fold(tensors[f"{name}.conv.weight"], moments, EPS)
    return result
