"""EfficientNet-Lite0, the feature network whose weights are part of the package (`assets/efficientnet`).

Images are resized to 224x224 as Pillow's antialiased bicubic does, and scaled by (x - 127) / 128, as in its training.
The feature is the average over positions of the last convolution, 1280 wide; the logits are of the 1000 classes of
ImageNet.

Source: Tan & Le, "EfficientNet" (arXiv:1905.11946), and the variant of TensorFlow's `efficientnet/lite`: no squeeze and
excitation, ReLU6.
"""

from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from flowdit import hashing
from flowdit.features.base import Extracted, FeatureNetwork
from flowdit.features.convolution import Convolution, DepthwiseConvolution, relu6
from flowdit.features.resize import resize
from flowdit.models import pretrained
from flowdit.models.layers import Linear

FILE = Path(__file__).parents[1] / "assets" / "efficientnet" / "efficientnet_lite0.safetensors"
SIZE = 224
STEM_WIDTH, WIDTH = 32, 1280
NUM_CLASSES = 1000


class Stage(NamedTuple):
    """Blocks of one width; the first has the stride."""

    depth: int
    side: int
    stride: int
    expansion: int
    width: int


STAGES = (
    Stage(depth=1, side=3, stride=1, expansion=1, width=16),
    Stage(depth=2, side=3, stride=2, expansion=6, width=24),
    Stage(depth=2, side=5, stride=2, expansion=6, width=40),
    Stage(depth=3, side=3, stride=2, expansion=6, width=80),
    Stage(depth=3, side=5, stride=1, expansion=6, width=112),
    Stage(depth=4, side=5, stride=2, expansion=6, width=192),
    Stage(depth=1, side=3, stride=1, expansion=6, width=320),
)


class Block(eqx.Module):
    """An inverted bottleneck: expand, convolve each channel, project; a skip connection where the shape stays."""

    expand: Convolution | None
    depthwise: DepthwiseConvolution
    project: Convolution

    def __init__(self, in_width: int, stage: Stage, stride: int):
        inner = in_width * stage.expansion
        self.expand = _convolution(in_width, inner) if stage.expansion > 1 else None
        self.depthwise = DepthwiseConvolution(jnp.zeros((stage.side, stage.side, inner)), jnp.zeros(inner), stride)
        self.project = _convolution(inner, stage.width)

    def __call__(self, x: Float[Array, "n height width in"]) -> Float[Array, "n _ _ out"]:
        inner = x if self.expand is None else relu6(self.expand(x))
        y = self.project(relu6(self.depthwise(inner)))
        return x + y if x.shape == y.shape else y


class EfficientNet(eqx.Module):
    """From 8-bit images to `Extracted`. `load_efficientnet` reads one; the constructor only defines the shapes."""

    stem: Convolution
    blocks: list[Block]
    head: Convolution
    classifier: Linear

    map_layer = "last block"

    def __init__(self):
        self.stem = _convolution(3, STEM_WIDTH, side=3, stride=2)
        self.blocks, width = [], STEM_WIDTH
        for stage in STAGES:
            for i in range(stage.depth):
                self.blocks.append(Block(width, stage, stage.stride if i == 0 else 1))
                width = stage.width
        self.head = _convolution(width, WIDTH)
        self.classifier = Linear(jnp.zeros((WIDTH, NUM_CLASSES)), jnp.zeros(NUM_CLASSES))

    def __call__(self, images: UInt8[Array, "n height width 3"]) -> Extracted:
        return self.extract(resize(images, SIZE, SIZE))

    def extract(self, pixels: Float[Array, "n height width 3"]) -> Extracted:
        """The same without the resize, of pixels in [0, 255]."""
        with jax.default_matmul_precision("highest"):
            features = relu6(self.head(self._run_blocks(pixels))).mean((1, 2))
            return Extracted(features, self.classifier(features))

    def maps(self, images: UInt8[Array, "n height width 3"]) -> Float[Array, "n 7 7 320"]:
        """The output of the last block; the layer after it only makes it wider, for the classifier."""
        with jax.default_matmul_precision("highest"):
            return self._run_blocks(resize(images, SIZE, SIZE))

    def _run_blocks(self, pixels: Float[Array, "n height width 3"]) -> Float[Array, "n _ _ out"]:
        x = relu6(self.stem((pixels - 127) / 128))
        for block in self.blocks:
            x = block(x)
        return x


def _convolution(in_width: int, out_width: int, side: int = 1, stride: int = 1) -> Convolution:
    return Convolution(jnp.zeros((side, side, in_width, out_width)), jnp.zeros(out_width), stride)


def load_efficientnet(file: Path = FILE) -> FeatureNetwork:
    """Read the network, its weights cast to float32. Raises `ValueError` naming a file that is damaged or of another network."""
    tensors = pretrained.read_tensors([file])
    model = pretrained.fill(eqx.filter_eval_shape(EfficientNet), tensors, jnp.float32, source=file)
    digest = hashing.file_sha256(file)[:12]
    identity = f"efficientnet-lite0 pooled, bicubic {SIZE}, float32, {digest}"
    return FeatureNetwork("efficientnet", model, WIDTH, identity, NUM_CLASSES, f"efficientnet-lite0 {digest}")
