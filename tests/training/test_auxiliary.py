"""Auxiliary losses: two small ones with parameters, in training, resume, layouts, sampling and export."""

import dataclasses
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from runs import (
    LATENT_SHAPE,
    assert_same_checkpoint,
    call,
    error_line,
    metrics,
    stored_arrays,
    train_here,
    write_tiny_data,
)

import flowdit
from flowdit.checkpoint.names import is_auxiliary, named_arrays
from flowdit.convert import main as convert
from flowdit.data.schema import ArrayField, LabelField
from flowdit.diffusion.auxiliary import AUXILIARY, AuxiliaryLoss
from flowdit.models.layers import normal_linear
from flowdit.optim import OptimConfig, make_optimizer
from flowdit.training.step import init_state

FEATURES = 5


@dataclasses.dataclass
class ClassHead(AuxiliaryLoss):
    """Cross-entropy of a linear classifier on the denoised latent (auxiliary classifier, Odena et al. 2017)."""

    num_classes: int = 4

    name = "class_head"

    def init(self, model, shapes, *, key):
        return normal_linear(math.prod(shapes.latent), self.num_classes, key=key)

    def __call__(self, parameters, view):
        logits = parameters(view.denoised.ravel())
        return optax.softmax_cross_entropy_with_integer_labels(logits, view.example["label"])


@dataclasses.dataclass
class Alignment(AuxiliaryLoss):
    """One minus the cosine of projected tokens and features in the record (as REPA, Yu et al. 2025)."""

    depth: int = 1

    name = "alignment"

    def depths(self):
        return (self.depth,)

    def fields(self):
        return {"features": ArrayField((FEATURES,))}

    def init(self, model, shapes, *, key):
        return {"projection": normal_linear(model.hidden_dim, FEATURES, key=key)}

    def __call__(self, parameters, view):
        projected = parameters["projection"](view.hidden[self.depth].mean(0))
        features = view.example["features"]
        return 1 - jnp.dot(projected, features) / (jnp.linalg.norm(projected) * jnp.linalg.norm(features) + 1e-6)


BOTH = ("auxiliary.class_head.weight=0.5", "auxiliary.alignment.weight=0.25", "auxiliary.alignment.last_step=3")


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(AUXILIARY, "class_head", ClassHead)
    monkeypatch.setitem(AUXILIARY, "alignment", Alignment)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Records with `features`."""
    rng = np.random.default_rng(1)
    features = rng.normal(size=(24, FEATURES)).astype(np.float32)
    return write_tiny_data(tmp_path_factory.mktemp("data") / "features", lambda i: {"features": features[i]})


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A finished run with both losses."""
    folder = tmp_path_factory.mktemp("runs") / "both"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(AUXILIARY, "class_head", ClassHead)
        patch.setitem(AUXILIARY, "alignment", Alignment)
        finished = train_here(data, folder, *BOTH)
    assert (finished.status, finished.err) == (0, "")
    return folder


def test_parts_are_logged_under_their_names_and_make_the_loss(run):
    loss, velocity, head, alignment = (
        metrics(run, f"train/{name}") for name in ("loss", "velocity", "class_head", "alignment")
    )
    assert all(0 < alignment[step] < 2 for step in (1, 2, 3))
    assert all(alignment[step] == 0 for step in (4, 5, 6))  # after its last step
    assert head[1] == pytest.approx(math.log(4), rel=0.3)  # an untrained head
    for step, total in loss.items():
        assert total == pytest.approx(velocity[step] + 0.5 * head[step] + 0.25 * alignment[step], rel=1e-5)
    bins = [metrics(run, f"class_head_by_t/{i / 8:.3f}-{(i + 1) / 8:.3f}") for i in range(8)]
    assert sum(len(values) for values in bins) > 8


def test_parameters_are_trained_and_stored_but_not_averaged(run):
    early, late = stored_arrays(run / "2"), stored_arrays(run / "6")
    name = "auxiliary.class_head.weight"
    assert late[f"state.{name}"].shape == (math.prod(LATENT_SHAPE), 4)
    assert not np.array_equal(early[f"state.{name}"], late[f"state.{name}"])
    assert np.abs(late[f"state.opt_state.1.0.mu.{name}"]).max() > 0
    assert {n for n in late if n.startswith("model_ema.") and "auxiliary" in n} == set()
    assert {n for n in late if "opt_state" in n and ".model." in n} == set()  # as in runs without auxiliary losses


def test_resume_is_exact(data, run, tmp_path):
    resumed = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(resumed / "6")
    finished = train_here(data, resumed, *BOTH, "train.is_restore=true")
    assert (finished.status, finished.err) == (0, "")
    assert "auxiliary loss" not in finished.out
    assert_same_checkpoint(resumed / "6", run / "6")


@pytest.mark.slow
def test_layouts_have_the_same_losses(data, run, tmp_path):
    finished = train_here(data, tmp_path / "run", *BOTH, "mesh.fsdp=4", "train.gradient_accum=2", "train.num_steps=5")
    assert (finished.status, finished.err) == (0, "")
    for name in ("loss", "class_head", "alignment"):
        expected = list(metrics(run, f"train/{name}").values())[:5]
        np.testing.assert_allclose(list(metrics(tmp_path / "run", f"train/{name}").values()), expected, rtol=1e-5)


def test_added_and_removed_losses_are_reported(data, run, tmp_path):
    resumed = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(resumed / "6")
    restore = ("train.is_restore=true", "auxiliary.class_head.weight=0.5", "auxiliary.alignment.weight=0")
    finished = train_here(data, resumed, *restore, "train.num_steps=5")
    assert (finished.status, finished.err) == (0, "")
    assert "auxiliary loss alignment: removed since the checkpoint, its parameters are dropped" in finished.out
    kept, before = stored_arrays(resumed / "5"), stored_arrays(resumed / "4")
    assert not [name for name in kept if "alignment" in name]
    weight = "state.auxiliary.class_head.weight"
    assert np.abs(kept[weight] - before[weight]).max() < 0.01  # continued, not restarted
    finished = train_here(data, resumed, *restore, "auxiliary.alignment.weight=1")
    assert (finished.status, finished.err) == (0, "")
    assert "auxiliary loss alignment: added since the checkpoint, starts from fresh parameters" in finished.out
    assert "state.auxiliary.alignment.projection.weight" in stored_arrays(resumed / "6")


def test_an_earlier_run_can_add_a_loss(tiny_data, whole_run, tmp_path):
    resumed = shutil.copytree(whole_run, tmp_path / "run")
    shutil.rmtree(resumed / "6")
    finished = train_here(tiny_data, resumed, "train.is_restore=true", "auxiliary.class_head.weight=0.5")
    assert (finished.status, finished.err) == (0, "")
    assert "auxiliary loss class_head: added since the checkpoint" in finished.out
    assert " (class_head " in finished.out and ", velocity " in finished.out
    head = metrics(resumed, "train/class_head")
    assert head[5] == pytest.approx(math.log(4), rel=0.3)
    np.testing.assert_allclose(metrics(resumed, "train/velocity")[5], metrics(whole_run, "train/loss")[5], rtol=1e-5)


def test_samples_and_exports_need_no_auxiliary_loss(run, tmp_path, monkeypatch):
    monkeypatch.delitem(AUXILIARY, "class_head")  # as if the loss were not registered
    monkeypatch.delitem(AUXILIARY, "alignment")
    (images,) = flowdit.load(str(run)).draw(labels=["cat"], steps=1)
    assert images.shape == (1, 64, 64, 3)
    target = tmp_path / "model.safetensors"
    finished = call(convert, f"source={run / '6'}", f"target={target}", "to=safetensors")
    assert (finished.status, finished.err) == (0, "")
    assert not [name for name in safetensors.numpy.load_file(target) if "auxiliary" in name]


def test_a_checkpoint_is_read_if_the_loss_has_other_settings(run, monkeypatch):
    monkeypatch.setitem(AUXILIARY, "class_head", Alignment)  # which has no `num_classes`
    assert flowdit.load(str(run / "6")).trained.step == 6


@pytest.mark.slow
def test_losses_in_the_compute_dtype_stop_after_their_last_step(data, tmp_path, monkeypatch):
    class InBfloat16(ClassHead):
        def __call__(self, parameters, view):
            assert parameters.weight.dtype == jnp.bfloat16
            return parameters(view.denoised.ravel().astype(jnp.bfloat16)).sum() ** 2

    monkeypatch.setitem(AUXILIARY, "class_head", InBfloat16)
    settings = ("auxiliary.class_head.weight=1", "auxiliary.class_head.last_step=2", "train.compute_dtype=bfloat16")
    with jax.numpy_dtype_promotion("standard"):  # the backward pass of JAX's attention mixes dtypes
        finished = train_here(data, tmp_path / "run", *settings, "train.num_steps=5")
    assert (finished.status, finished.err) == (0, "")
    assert [value > 0 for value in metrics(tmp_path / "run", "train/class_head").values()] == [True] * 2 + [False] * 3


def test_array_names_are_unique_and_the_models_unchanged():
    """A loss may use any names for its parameters."""
    parameters = {"rep": {"model": {"weight": jnp.ones(2)}, "weight": jnp.ones(3), "auxiliary": jnp.ones(4)}}
    optimizer = make_optimizer(OptimConfig(), 10)
    state = init_state({"blocks": {"model": jnp.ones(5)}}, optimizer, parameters)
    names = named_arrays(state)
    assert len(names) == len(jax.tree.leaves(state))
    assert names["opt_state.1.0.mu.blocks.model"].shape == (5,)
    assert names["opt_state.1.0.mu.auxiliary.rep.model.weight"].shape == (2,)
    assert names["opt_state.1.0.mu.auxiliary.rep.weight"].shape == (3,)
    assert [name for name in names if is_auxiliary(name)] == [name for name in names if "rep" in name]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("grad_norm", "its name must be an identifier, none of loss, velocity, grad_norm"),
        ("other", "its name must be its key, other, got 'class_head'"),
        ("class_head", "reads the field label as LabelField(num_classes=3), others as LabelField(num_classes=4)"),
    ],
)
def test_losses_with_conflicting_names(tiny_data, tmp_path, monkeypatch, name, message):
    @dataclasses.dataclass
    class Disturbing(ClassHead):
        def fields(self):
            return {"label": LabelField(3)}

    Disturbing.name = "grad_norm" if name == "grad_norm" else "class_head"
    monkeypatch.setitem(AUXILIARY, name, Disturbing)
    line = error_line(train_here(tiny_data, tmp_path / "run", f"auxiliary.{name}.weight=1"))
    assert line.startswith(f"error: auxiliary.{name}: ") and message in line


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("auxiliary.class_head.weight=nan", "auxiliary.class_head.weight: must be 0 (off) or more, got nan"),
        ("auxiliary.class_head.weight=-1", "auxiliary.class_head.weight: must be 0 (off) or more, got -1.0"),
        ("auxiliary.class_head.weight=x", "auxiliary.class_head.weight=x: Value 'x' of type 'str'"),
        ("+auxiliary.class_head.width=1", "auxiliary.class_head.width: no such field"),
        ("+auxiliary.other.weight=1", "auxiliary.other: no such field"),
        ("auxiliary.alignment.weight=1", "record 0: features: is missing"),
        (
            "auxiliary.alignment={weight: 1, depth: 3}",
            "auxiliary.alignment.depths: must be blocks in [1, model.depth=2], got (3,)",
        ),
    ],
)
def test_bad_setting(tiny_data, tmp_path, override, expected):
    assert expected in error_line(train_here(tiny_data, tmp_path / "run", override))
