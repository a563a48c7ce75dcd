"""The choice of attention kernels by the target's devices, dtype and shape, and their use when tracing."""

from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import call

import flowdit
from flowdit.conditioning.labels import Labels
from flowdit.conditioning.text import Text
from flowdit.diffusion.objective import FlowMatching
from flowdit.diffusion.sampling import SamplerConfig
from flowdit.inference import sampler
from flowdit.inference.sampler import make_draw
from flowdit.models import attention
from flowdit.models.attention import AttentionShape, attend, choose_kernels, use_kernels
from flowdit.models.compute import Compute, choose_compute
from flowdit.models.config import DiTConfig, PixArtConfig
from flowdit.models.dit import build_dit
from flowdit.models.pixart import build_pixart
from flowdit.optim import OptimConfig, make_optimizer
from flowdit.sharding import AXES, MeshConfig, make_mesh
from flowdit.train import stage1, stage2
from flowdit.training import setup
from flowdit.training.step import init_state, make_train_step, make_validation_step

LATENT = (4, 4, 6)
TEXT_DIM = 10
LENGTH = 5
MODEL = PixArtConfig(depth=2, hidden_dim=24, num_heads=3)
SELF, CROSS = AttentionShape(8, 6), AttentionShape(8, 6, LENGTH)
BFLOAT16_SELF = Compute("bfloat16", frozenset({SELF}))


@pytest.fixture(autouse=True)
def nothing_probed():
    attention.failed_check.cache_clear()
    yield
    attention.failed_check.cache_clear()


@pytest.fixture
def calls(monkeypatch) -> list[tuple[AttentionShape, str]]:
    """Records calls of JAX's attention by shape and kernel; XLA computes them in any case."""
    computed, seen = jax.nn.dot_product_attention, []

    def record(query, key, value, *, mask, implementation):
        masked = None if mask is None else len(key)
        seen.append((AttentionShape(query.shape[-1], len(query), masked), implementation))
        return computed(query, key, value, mask=mask, implementation="xla")

    monkeypatch.setattr(jax.nn, "dot_product_attention", record)
    return seen


def fake_gpu(monkeypatch, error: float = 0.0) -> list[AttentionShape]:
    """A fake GPU in this process whose kernel has this `error`; the shapes that are checked on it."""
    probed = []

    def relative_error(kernels, shape):
        assert kernels == {shape}
        probed.append(shape)
        return error

    monkeypatch.setattr(attention, "_local_gpu", lambda: jax.devices()[0])
    monkeypatch.setattr(attention, "relative_error", relative_error)
    return probed


def fake_mesh(platform: str) -> jax.sharding.Mesh:
    """A mesh of one absent device of this platform."""
    device = Mock(spec=jax.Device, platform=platform, device_kind="a device")
    return jax.sharding.Mesh(np.array([[[device]]]), AXES)


def trace(compute: Compute) -> None:
    """The text model's velocity, traced as it is about to be compiled."""
    shape = jax.ShapeDtypeStruct
    model = jax.eval_shape(lambda: build_pixart(MODEL, LATENT[0], TEXT_DIM, key=jax.random.key(0)))
    batch = {"text_features": shape((LENGTH, TEXT_DIM), "float32"), "text_mask": shape((LENGTH,), "bool")}

    def velocity(model, x_t, batch):
        return compute.cast(model)(x_t, jnp.float32(0.5), Text().condition(batch))

    jax.eval_shape(compute.on(None, velocity), model, shape(LATENT, "float32"), batch)


# --- the choice ---


def test_shapes_are_those_of_the_model(calls):
    trace(Compute())
    assert [shape for shape, _ in calls] == MODEL.attention_shapes(LATENT, LENGTH) == [SELF, CROSS]
    assert MODEL.attention_shapes(LATENT) == [SELF]


@pytest.mark.parametrize(
    ("platform", "dtype"),
    [("cpu", "bfloat16"), ("tpu", "bfloat16"), ("rocm", "bfloat16"), ("gpu", "float32"), ("gpu", "float16")],
)
def test_nothing_is_probed_where_cudnn_cannot_be(platform, dtype, monkeypatch):
    probed = fake_gpu(monkeypatch)
    assert choose_kernels(platform, dtype, [SELF, CROSS]) == frozenset()
    assert probed == []


@pytest.mark.parametrize("platform", ["gpu", "cuda"])
def test_each_shape_is_probed_once_on_a_gpu(platform, monkeypatch, calls):
    probed = fake_gpu(monkeypatch)
    assert choose_kernels(platform, "bfloat16", [SELF, CROSS, SELF]) == {SELF, CROSS}
    compute = choose_compute(fake_mesh("gpu"), "bfloat16", [SELF, CROSS])
    assert probed == [SELF, CROSS]
    assert compute == Compute("bfloat16", frozenset({SELF, CROSS}))
    assert calls == []  # nothing of the model is traced by then


@pytest.mark.parametrize("error", [0.06, float("nan")])
def test_a_wrong_kernel_gives_one_warning(error, monkeypatch, messages):
    fake_gpu(monkeypatch, error)
    assert choose_kernels("gpu", "bfloat16", [CROSS, CROSS]) == frozenset()
    (warning,) = messages()
    assert "not used (head size 8, 6 tokens to 5): relative error" in warning and "\n" not in warning


def test_a_failing_kernel_gives_one_warning(monkeypatch, messages):
    def refuse(kernels, shape):
        raise RuntimeError("no plan\nfor this graph")

    fake_gpu(monkeypatch)
    monkeypatch.setattr(attention, "relative_error", refuse)
    assert choose_kernels("gpu", "bfloat16", [SELF]) == frozenset()
    assert messages() == ["cuDNN attention is not used (head size 8, 6 tokens): no plan"]


def test_the_target_decides_and_not_the_devices_of_this_process(monkeypatch, calls):
    for platform in ("tpu", "cpu"):
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        assert choose_compute(fake_mesh(platform), "bfloat16", [SELF]).kernels == frozenset()
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    with jax.numpy_dtype_promotion("standard"):  # JAX's own gradient of its attention mixes bfloat16 with float32
        compute = choose_compute(fake_mesh("gpu"), "bfloat16", [SELF])
    assert calls and {implementation for _, implementation in calls} == {"cudnn"}  # JAX is called by a trace only
    calls.clear()
    trace(compute)
    assert calls == [(SELF, "cudnn"), (CROSS, "xla")]


def test_without_a_mesh_the_first_device_decides(monkeypatch):
    probed = fake_gpu(monkeypatch)
    assert choose_compute(None, "bfloat16", [SELF]) == Compute("bfloat16", is_fast=True)
    monkeypatch.setattr(jax, "devices", lambda: list(fake_mesh("gpu").devices.flat))
    monkeypatch.setattr(attention, "_local_gpu", lambda: jax.local_devices()[0])
    assert choose_compute(None, "bfloat16", [SELF]).kernels == {SELF}
    assert probed == [SELF]


def test_where_jax_has_no_cudnn_a_compile_for_an_absent_gpu_does_without(messages):
    """The test environment's JAX is for CPUs: a trace of cuDNN's attention would fail."""
    compute = choose_compute(fake_mesh("gpu"), "bfloat16", [SELF])
    assert "not used (head size 8, 6 tokens): cuDNN is not detected" in messages()[0]
    trace(compute)


@pytest.mark.parametrize(
    ("platform", "dtype", "line"),
    [
        (
            "cpu",
            "bfloat16",
            "compute in bfloat16; the layers of models.fast, with their own attention (model.kernels=auto)",
        ),
        (
            "tpu",
            "bfloat16",
            "compute in bfloat16; the layers of models.fast, with their own attention (model.kernels=auto)",
        ),
        ("gpu", "float32", "compute in float32; attention by XLA (cuDNN needs bfloat16, not float32)"),
        (
            "gpu",
            "bfloat16",
            "compute in bfloat16; self-attention (head size 8, 6 tokens) by cuDNN, "
            "cross-attention (head size 8, 6 tokens to 5) by XLA: relative error 0.06 against XLA",
        ),
    ],
)
def test_a_log_line_says_which_kernel_computes_each_shape_and_why(platform, dtype, line, monkeypatch, messages):
    fake_gpu(monkeypatch)
    monkeypatch.setattr(attention, "relative_error", lambda kernels, shape: 0.06 if shape == CROSS else 0.0)
    choose_compute(fake_mesh(platform), dtype, [SELF, CROSS])
    assert messages()[-1] == line


def test_a_sampler_says_how_it_computes(whole_run, messages):
    flowdit.load(str(whole_run / "6"))
    assert "compute in float32; the layers of models.fast, with their own attention (model.kernels=auto)" in messages()


# --- what is traced ---


def test_a_model_uses_cudnn_for_the_chosen_shapes_only(calls):
    for kernels in ({CROSS}, {SELF, AttentionShape(8, 6, LENGTH + 1), AttentionShape(16, 6, LENGTH)}):
        calls.clear()
        trace(Compute("bfloat16", frozenset(kernels)))
        assert calls == [(shape, "cudnn" if shape in kernels else "xla") for shape in (SELF, CROSS)]


def test_float32_never_takes_cudnn(calls):
    trace(Compute("float32", frozenset({SELF, CROSS})))
    assert calls == [(SELF, "xla"), (CROSS, "xla")]


def test_unmasked_attention_to_other_tokens_is_no_shape_of_the_list(calls):
    query, key = (jnp.ones((n, 2, 8), jnp.bfloat16) for n in (6, LENGTH))
    with use_kernels(frozenset({SELF, CROSS})):
        attend(query, key, key)
    assert [implementation for _, implementation in calls] == ["xla"]


def test_a_function_that_was_traced_with_other_kernels_is_traced_again(calls):
    query = jnp.ones((6, 2, 8), jnp.bfloat16)
    jitted = jax.jit(attend)
    for kernels in (frozenset(), frozenset({SELF})):
        with use_kernels(kernels):
            jitted(query, query, query)
    jitted(query, query, query)
    assert [implementation for _, implementation in calls] == ["xla", "cudnn"]


def test_steps_of_training_and_validation_take_the_objectives_kernels(calls):
    config = DiTConfig(depth=1, hidden_dim=24, num_heads=3)
    optimizer = make_optimizer(OptimConfig(), 10)
    objective = FlowMatching(Labels(("a", "b", "c")), 0.1, (0.0,) * 4, (1.0,) * 4)
    state = jax.eval_shape(lambda: init_state(build_dit(config, LATENT[0], 3, key=jax.random.key(0)), optimizer))
    batch = {"latent": jnp.zeros((2, *LATENT)), "label": jnp.zeros(2, jnp.int32)}
    with jax.numpy_dtype_promotion("standard"):
        jax.eval_shape(make_train_step(optimizer, objective, 0, compute=BFLOAT16_SELF), state, batch)
    trained = list(calls)
    step = make_validation_step(objective, 0, BFLOAT16_SELF)
    jax.eval_shape(step, state.model, batch | {"weight": jnp.ones(2)}, jnp.asarray(0))
    validated = calls[len(trained) :]
    assert set(trained) == set(validated) == {(SELF, "cudnn")}


def test_draws_take_the_kernels_they_are_given(calls):
    config, mesh = DiTConfig(depth=1, hidden_dim=24, num_heads=3), make_mesh(MeshConfig())
    model = jax.eval_shape(lambda: build_dit(config, LATENT[0], 3, key=jax.random.key(0)))
    draw = make_draw(LATENT, SamplerConfig(steps=1), "velocity", BFLOAT16_SELF, mesh)
    numbers = np.arange(4, dtype=np.int32)
    jax.eval_shape(draw, model, np.uint32(0), numbers, numbers, numbers)
    assert set(calls) == {(SELF, "cudnn")}


def test_a_model_read_back_takes_cudnn_once_it_is_bfloat16(whole_run, monkeypatch, calls):
    asked = []

    def choose(*arguments):
        asked.append(arguments[1:])
        return Compute("bfloat16", frozenset(arguments[2]))

    monkeypatch.setattr(sampler, "choose_compute", choose)
    drawing = flowdit.load(str(whole_run / "6"))
    (images,) = drawing.draw(labels=[0, 1], steps=1)
    assert len(images) == 2
    trained = drawing.trained
    shapes = trained.config.model.attention_shapes(trained.manifest.latent_shape)
    assert asked == [("float32", shapes)]
    assert set(calls) == {(shapes[0], "cudnn")}


@pytest.mark.parametrize("stage", [stage1, stage2])
def test_a_run_chooses_for_its_mesh_dtype_and_shapes(stage, tiny_data, tmp_path, monkeypatch):
    asked = []

    def choose(*arguments):
        asked.append(arguments)
        raise ValueError("enough")

    monkeypatch.setattr(setup, "choose_compute", choose)
    preset = "tiny" if stage is stage1 else "tiny_text"
    overrides = (
        f"data.path={tiny_data}",
        f"train.checkpoint_dir={tmp_path}/run",
        "train.compute_dtype=bfloat16",
        "model.kernels=plain",
    )
    assert "enough" in call(stage, f"experiment={preset}", *overrides).err
    ((mesh, dtype, shapes, kernels),) = asked
    assert (mesh.shape["data"], dtype, kernels) == (4, "bfloat16", "plain")
    assert [shape.key_tokens for shape in shapes] == ([None] if stage is stage1 else [None, 32])


def test_cast_leaves_integers_alone():
    cast = Compute("bfloat16").cast({"a": jnp.ones(2), "n": jnp.ones(2, jnp.int32)})
    assert cast["a"].dtype == jnp.bfloat16 and cast["n"].dtype == jnp.int32


# --- the numbers ---


def test_attention_without_any_key_is_finite_with_finite_gradients():
    query, key, value = jax.random.normal(jax.random.key(0), (3, 4, 2, 8))
    out, grads = jax.jit(jax.value_and_grad(lambda q: attend(q, key, value, jnp.zeros(4, bool)).sum()))(query)
    assert jnp.isfinite(out)
    assert jnp.isfinite(grads).all()


@pytest.mark.parametrize("shape", [SELF, CROSS])
def test_kernel_probe_finds_a_kernel_equal_to_itself(shape, calls):
    """The check that compares cuDNN with XLA on a GPU, here XLA with itself: shapes, mask and gradients are valid."""
    with jax.numpy_dtype_promotion("standard"):
        assert attention.relative_error(frozenset({shape}), shape) == 0
    assert [implementation for _, implementation in calls] == ["cudnn", "xla"]


@pytest.mark.parametrize("place", range(4))
def test_kernel_probe_finds_a_nan_wherever_it_is(place, monkeypatch):
    def output_and_gradients(kernels, inputs):
        arrays = [jnp.ones(2)] * 4
        return arrays[:place] + [jnp.full(2, jnp.nan)] + arrays[place + 1 :] if kernels else arrays

    monkeypatch.setattr(attention, "output_and_gradients", output_and_gradients)
    assert np.isnan(attention.relative_error(frozenset({SELF}), SELF))
