"""EfficientNet-Lite0 compared with a network of PyTorch's layers, its weights in the package, and the interface."""

import importlib.util
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from flowdit import hashing
from flowdit.data import openmoji
from flowdit.features import FeatureWeights, load_features
from flowdit.features.efficientnet import FILE, STAGES, EfficientNet, load_efficientnet
from flowdit.fields import FieldError
from flowdit.models import pretrained

SCRIPT = Path(__file__).parents[2] / "scripts" / "convert_efficientnet.py"
WHEEL_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
extract = eqx.filter_jit(lambda model, images: model(images))


@pytest.fixture(scope="module")
def converted():
    spec = importlib.util.spec_from_file_location("convert_efficientnet", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.converted


@pytest.fixture(scope="module")
def network():
    return load_features("efficientnet", FeatureWeights())


def random_state(seed: int = 0) -> dict[str, np.ndarray]:
    """Random tensors with the names and shapes of efficientnet_lite_pytorch's."""
    rng, tensors = np.random.default_rng(seed), {}

    def add(convolution: str, norm: str, out: int, into: int, side: int = 1) -> None:
        deviation = np.sqrt(2 / (into * side**2))
        tensors[f"{convolution}.weight"] = rng.normal(0, deviation, (out, into, side, side))
        tensors[f"{norm}.weight"] = rng.uniform(0.5, 1.5, out)
        tensors[f"{norm}.running_var"] = rng.uniform(0.5, 1.5, out)
        for name in ("bias", "running_mean"):
            tensors[f"{norm}.{name}"] = rng.normal(0, 0.2, out)

    add("_conv_stem", "_bn0", 32, 3, 3)
    width, strides = 32, block_strides()
    for i, (stage, _) in enumerate(strides):
        prefix, inner = f"_blocks.{i}", width * stage.expansion
        if stage.expansion > 1:
            add(f"{prefix}._expand_conv", f"{prefix}._bn0", inner, width)
        add(f"{prefix}._depthwise_conv", f"{prefix}._bn1", inner, 1, stage.side)
        add(f"{prefix}._project_conv", f"{prefix}._bn2", stage.width, inner)
        width = stage.width
    add("_conv_head", "_bn1", 1280, width)
    tensors["_fc.weight"], tensors["_fc.bias"] = rng.normal(0, 0.03, (1000, 1280)), rng.normal(0, 1, 1000)
    return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}


def block_strides():
    return [(stage, stage.stride if i == 0 else 1) for stage in STAGES for i in range(stage.depth)]


def reference(tensors: dict[str, np.ndarray], images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features and logits of images by PyTorch, the batch norms not folded."""
    torch = pytest.importorskip("torch", reason="needs torch")
    functional = torch.nn.functional
    state = {name: torch.tensor(tensor) for name, tensor in tensors.items()}

    def apply(x, convolution: str, norm: str, stride: int = 1, is_depthwise: bool = False, is_linear: bool = False):
        weight = state[f"{convolution}.weight"]
        total = max((-(-x.shape[2] // stride) - 1) * stride + weight.shape[2] - x.shape[2], 0)
        before, after = total // 2, total - total // 2
        x = functional.pad(x, (before, after, before, after))
        x = functional.conv2d(x, weight, stride=stride, groups=len(weight) if is_depthwise else 1)
        moments = [state[f"{norm}.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
        x = functional.batch_norm(x, *moments, eps=1e-3)
        return x if is_linear else functional.relu6(x)

    with torch.no_grad():
        x = torch.tensor(images.transpose(0, 3, 1, 2))
        x = apply((x - 127) / 128, "_conv_stem", "_bn0", 2)
        for i, (stage, stride) in enumerate(block_strides()):
            name = f"_blocks.{i}"
            y = apply(x, f"{name}._expand_conv", f"{name}._bn0") if stage.expansion > 1 else x
            y = apply(y, f"{name}._depthwise_conv", f"{name}._bn1", stride, is_depthwise=True)
            y = apply(y, f"{name}._project_conv", f"{name}._bn2", is_linear=True)
            x = x + y if x.shape == y.shape else y
        features = apply(x, "_conv_head", "_bn1").mean((2, 3))
        return features.numpy(), (features @ state["_fc.weight"].T + state["_fc.bias"]).numpy()


def test_features_and_logits_match_pytorch_on_random_weights(converted):
    """On smaller images than the network's; their resize has tests of its own."""
    tensors, images = random_state(), np.random.default_rng(1).uniform(0, 255, (2, 72, 72, 3)).astype(np.float32)
    shapes = eqx.filter_eval_shape(EfficientNet)
    model = pretrained.fill(shapes, converted(tensors), jnp.float32, source=Path("random"))
    ours = eqx.filter_jit(EfficientNet.extract)(model, jnp.asarray(images))
    features, logits = reference(tensors, images)
    np.testing.assert_allclose(ours.features, features, atol=1e-4)
    np.testing.assert_allclose(ours.logits, logits, atol=1e-4)
    assert features.std() > 0.1 and np.abs(logits).mean() > 0.5  # otherwise the bounds would mean little


def test_images_of_any_size_are_resized_inside(network):
    shapes = jax.eval_shape(network.model, jax.ShapeDtypeStruct((3, 40, 64, 3), jnp.uint8))
    assert (shapes.features.shape, shapes.features.dtype) == ((3, network.width), jnp.float32)
    assert (shapes.logits.shape, shapes.logits.dtype) == ((3, network.num_classes), jnp.float32)


def test_the_weights_of_the_package_tell_pictures_apart(network):
    """A hammer and an umbrella of OpenMoji, 64x64, have their classes of ImageNet among the first two of 1000."""
    tiles = jnp.asarray(openmoji.load().tiles[[1207, 952]])
    logits = np.asarray(extract(network.model, tiles).logits)
    ranks = [(row > row[target]).sum() for row, target in zip(logits, (587, 879), strict=True)]
    assert max(ranks) <= 1


def test_the_identity_names_what_changes_a_feature(network):
    digest = hashing.file_sha256(FILE)
    assert network.identity == f"efficientnet-lite0 pooled, bicubic 224, float32, {digest[:12]}"
    page = (FILE.parent / "README.md").read_text()
    assert digest in page and WHEEL_SHA256 in page and FILE.stat().st_size < 10e6


def test_damaged_weights_are_one_line(tmp_path):
    file = tmp_path / "cut.safetensors"
    file.write_bytes(FILE.read_bytes()[:100_000])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_efficientnet(file)
    tensors = safetensors.numpy.load_file(FILE)
    safetensors.numpy.save_file({"head.bias": tensors["head.bias"]}, file)
    with pytest.raises(ValueError, match="arrays must be those of the model, but 99 missing"):
        load_efficientnet(file)


def test_errors_name_the_setting_and_how_to_get_the_weights():
    with pytest.raises(FieldError, match="features: must be one of efficientnet.*, got 'vgg'"):
        load_features("vgg", FeatureWeights())
