"""Inception v3 compared with the same network in PyTorch's functions, and errors for other files."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from flowdit import hashing
from flowdit.features import FeatureWeights, load_features
from flowdit.features.inception import Inception
from flowdit.fields import FieldError


@pytest.fixture(scope="module")
def state():
    pytest.importorskip("torch", reason="needs torch")
    import inception_reference

    return inception_reference.random_state()


@pytest.fixture(scope="module")
def file(state, tmp_path_factory):
    import torch

    file = tmp_path_factory.mktemp("inception") / "pt_inception-2015-12-05-6726825d.pth"
    torch.save({name: torch.tensor(tensor) for name, tensor in state.items()}, file)
    return file


@pytest.fixture(scope="module")
def network(file):
    return load_features("inception", FeatureWeights(inception=str(file)))


def test_features_and_logits_match_pytorch_on_random_weights(network, state):
    """On smaller images than the network's; its resize has tests of its own."""
    import inception_reference

    pixels = np.random.default_rng(1).uniform(0, 255, (2, 107, 107, 3)).astype(np.float32)
    features, logits = inception_reference.reference(state, pixels)
    ours = eqx.filter_jit(Inception.extract)(network.model, jnp.asarray(pixels))
    np.testing.assert_allclose(ours.features, features, atol=1e-4)
    np.testing.assert_allclose(ours.logits, logits, atol=1e-4)
    assert features.std() > 0.1 and np.abs(logits).mean() > 0.1  # otherwise the bounds would mean little


def test_images_of_any_size_are_resized_inside(network):
    shapes = jax.eval_shape(network.model, jax.ShapeDtypeStruct((3, 40, 64, 3), jnp.uint8))
    assert (
        (shapes.features.shape, shapes.features.dtype) == ((3, 2048), jnp.float32) == ((3, network.width), jnp.float32)
    )
    assert (
        (shapes.logits.shape, shapes.logits.dtype)
        == ((3, 1008), jnp.float32)
        == ((3, network.num_classes), jnp.float32)
    )


def test_a_safetensors_file_holds_the_same_network(network, state, file, tmp_path):
    copy = tmp_path / "inception.safetensors"
    safetensors.numpy.save_file(state, copy)
    same = load_features("inception", FeatureWeights(inception=str(copy)))
    name = "Mixed_7c.branch3x3dbl_3b"
    assert (same.model.convolutions[name].weight == network.model.convolutions[name].weight).all()
    assert (
        network.identity == f"inception-2015-12-05 pool3, TF1 bilinear 299, float32, {hashing.file_sha256(file)[:12]}"
    )
    assert same.identity.endswith(hashing.file_sha256(copy)[:12])


def test_other_files_are_one_line(state, tmp_path):
    check_refused(tmp_path / "none.pth", "must be a file")
    file = tmp_path / "other.safetensors"
    few = {"fc.weight": state["fc.weight"], "Mixed_8a.conv.weight": state["fc.bias"]}
    safetensors.numpy.save_file(few, file)
    check_refused(file, "arrays must be those of the model, but 471 missing: .* 1 unexpected: Mixed_8a")
    file.rename(tmp_path / "other.pth")
    check_refused(tmp_path / "other.pth", "must hold tensors only")


def check_refused(file, problem: str) -> None:
    with pytest.raises(FieldError, match=f"^weights.inception: .*{problem}") as raised:
        load_features("inception", FeatureWeights(inception=str(file)))
    assert "\n" not in str(raised.value)
