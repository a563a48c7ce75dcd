"""Export of flowdit checkpoints as diffusers folders, safetensors files and checkpoints of weights only, and bit-exact import."""

import logging
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from interop.small_models import (
    DEFAULT_CLASS,
    DEFAULT_TEXT,
    STOCK_CLASS,
    STOCK_TEXT,
    assert_same,
    converted,
    output_error,
    random_model,
    saved,
)
from runs import call, error_line, stored_arrays

from flowdit.checkpoint.meta import read_meta
from flowdit.convert import main
from flowdit.fields import shown
from flowdit.interop import read_source
from flowdit.interop.portable import Portable

MICRO_TEXT = STOCK_TEXT | {"micro_conditioning": True, "interpolation_scale": 0.5}
OTHERS = {"mlp_ratio": 3.0, "time_scale": 1.0, "time_freq_shift": 0.5, "mlp_norm_eps": 1e-2, "interpolation_scale": 0.5}
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def target_name(stem: str, to: str) -> str:
    return f"{stem}.safetensors" if to == "safetensors" else stem


@pytest.fixture
def diffusers_log(caplog):
    """Warnings of diffusers, which are not passed to the root logger."""
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def listing(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


# --- a diffusers folder, loaded by diffusers ---


@pytest.mark.parametrize("model", [STOCK_CLASS, STOCK_TEXT, MICRO_TEXT], ids=["class", "text", "micro"])
def test_stock_classes_load_without_a_warning_and_agree(meta, tmp_path, diffusers_log, model):
    pytest.importorskip("torch", reason="needs torch")
    import diffusers

    portable = random_model(meta, model)
    finished = call(
        main,
        f"source={saved(portable, tmp_path / 'source')}",
        f"target={tmp_path / 'out'}",
        "to=diffusers",
        "image=none",
    )
    assert finished.status == 0, finished.err
    assert re.search(r"written: .*out \(diffusers, 0\.\d M parameters, float32\)$", finished.out.strip())
    stock = diffusers.DiTTransformer2DModel if model["name"] == "ccdit" else diffusers.PixArtTransformer2DModel
    transformer, info = stock.from_pretrained(
        tmp_path / "out" / "transformer", output_loading_info=True, low_cpu_mem_usage=False
    )
    assert not any(info.values()), info
    assert not [record.getMessage() for record in diffusers_log.records if record.levelno >= logging.WARNING]
    error = output_error(transformer.eval(), portable)
    print(f"relative error {error:.2e}")
    assert error < 1e-5


@pytest.mark.parametrize(
    "model",
    [DEFAULT_CLASS, DEFAULT_CLASS | OTHERS, DEFAULT_TEXT, DEFAULT_TEXT | OTHERS | {"micro_conditioning": True}],
    ids=["class", "class-others", "text", "text-others"],
)
def test_own_classes_carry_every_field(meta, tmp_path, diffusers_log, model):
    pytest.importorskip("torch", reason="needs torch")
    import diffusers

    portable = random_model(meta, model)
    out = converted(saved(portable, tmp_path / "source.safetensors"), tmp_path / "out", to="diffusers", own_class=True)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(
        str(out), custom_pipeline=str(out), trust_remote_code=True, low_cpu_mem_usage=False
    )
    unexpected = [r.getMessage() for r in diffusers_log.records if re.search("not expected|not used|ignored", r.msg)]
    assert not unexpected
    assert isinstance(pipeline.scheduler, diffusers.FlowMatchEulerDiscreteScheduler)
    assert isinstance(pipeline.vae, diffusers.AutoencoderKL)
    error = output_error(pipeline.transformer.eval(), portable)
    print(f"relative error {error:.2e}")
    assert error < 1e-5


# --- which weights, in which precision ---


@pytest.mark.parametrize("to", ["checkpoint", "safetensors", "diffusers"])
def test_ema_and_raw_weights_are_those_of_the_checkpoint(whole_run, tmp_path, to):
    stored, differing = stored_arrays(whole_run / "6"), 0
    for weights, prefix in (("ema", "model_ema."), ("model", "state.model.")):
        out = converted(
            whole_run / "6", tmp_path / target_name(weights, to), to=to, weights=weights, own_class=to == "diffusers"
        )
        wanted = {name.removeprefix(prefix): array for name, array in stored.items() if name.startswith(prefix)}
        assert_same(read_source(str(out)), Portable(wanted, read_meta(whole_run / "6")))
        differing += sum(not np.array_equal(array, stored[f"model_ema.{name}"]) for name, array in wanted.items())
    assert differing > 10  # the raw weights differ from the EMA


def test_a_checkpoint_of_weights_has_no_raw_weights(whole_run, tmp_path):
    weights_only = converted(whole_run / "6", tmp_path / "weights")
    assert not (weights_only / "state").exists()
    with pytest.raises(ValueError, match="holds only the EMA weights, not the raw ones"):
        converted(weights_only, tmp_path / "again", weights="model")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("dtype", "model"), [("float16", STOCK_CLASS), ("bfloat16", STOCK_TEXT)], ids=["class", "text"]
)
def test_half_precision(meta, tmp_path, dtype, model):
    portable = random_model(meta, model)
    source = saved(portable, tmp_path / "source.safetensors")
    rounded = {name: array.astype(jax.numpy.dtype(dtype)) for name, array in portable.arrays.items()}
    single = converted(source, tmp_path / "one.safetensors", to="safetensors", dtype=dtype)
    assert_same(read_source(str(single)), portable._replace(arrays=rounded))
    checkpoint = converted(source, tmp_path / "half", dtype=dtype)
    stored = {name: str(array.dtype) for name, array in stored_ema(checkpoint).items()}
    assert set(stored.values()) == {dtype}
    whole = {name: array.astype(np.float32) for name, array in rounded.items()}
    assert_same(read_source(str(checkpoint)), portable._replace(arrays=whole))
    folder = converted(source, tmp_path / "diffusers", to="diffusers", dtype=dtype)
    tensors = safetensors.numpy.load_file(folder / WEIGHTS)
    assert {str(tensor.dtype) for tensor in tensors.values()} == {dtype}
    back = read_source(str(folder)).arrays
    exact = portable.arrays | {"null_caption": back.get("null_caption")}  # in JSON, as float32
    for name, array in back.items():
        np.testing.assert_array_equal(array, exact[name] if name == "null_caption" else rounded[name], err_msg=name)


def stored_ema(checkpoint: Path) -> dict[str, np.ndarray]:
    import orbax.checkpoint as ocp

    return ocp.StandardCheckpointer().restore((checkpoint / "model_ema").resolve())


@pytest.mark.parametrize("to", ["checkpoint", "safetensors", "diffusers"])
def test_overflow_is_refused(meta, tmp_path, to):
    portable = random_model(meta, STOCK_CLASS)
    portable.arrays["blocks.mlp.up.weight"][1, 2, 3] = 1e5
    source = saved(portable, tmp_path / "source.safetensors")
    before = listing(tmp_path)
    out = tmp_path / target_name("out", to)
    finished = call(main, f"source={source}", f"target={out}", f"to={to}", "dtype=float16", "image=none")
    assert error_line(finished) == (
        "error: dtype: blocks.mlp.up.weight has values beyond the range of float16; use bfloat16 or float32"
    )
    assert listing(tmp_path) == before
    converted(source, out, to=to, dtype="bfloat16")


# --- export and import ---

CHAIN = ("diffusers", "safetensors", "checkpoint", "diffusers")


@pytest.mark.parametrize(
    ("model", "own_class"),
    [
        (STOCK_CLASS, False),
        (DEFAULT_CLASS | OTHERS, True),
        (MICRO_TEXT, False),
        (DEFAULT_TEXT | {"null_tokens": 6}, True),
    ],
    ids=["class", "own-class", "text", "own-text"],
)
def test_round_trips_are_bit_identical(meta, tmp_path, model, own_class):
    portable = random_model(meta, model)
    source, steps = saved(portable, tmp_path / "0"), []
    for i, to in enumerate(CHAIN, 1):
        suffix = ".safetensors" if to == "safetensors" else ""
        source = converted(source, tmp_path / f"{i}{suffix}", to=to, own_class=own_class and to == "diffusers")
        assert_same(read_source(str(source)), portable)
        steps.append(source)
    first, second = (safetensors.numpy.load_file(folder / WEIGHTS) for folder in (steps[0], steps[3]))
    assert_same(Portable(first, None), Portable(second, None))
    for file in ("flowdit.json", "model_index.json", "transformer/config.json", "scheduler/scheduler_config.json"):
        assert (steps[0] / file).read_bytes() == (steps[3] / file).read_bytes(), file


# --- refusals ---


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            DEFAULT_CLASS | OTHERS,
            "DiTTransformer2DModel cannot represent this model: model.qk_norm must be False, got True; model.mlp_ratio "
            "must be 4.0, got 3.0; model.time_scale must be 1000.0, got 1.0; model.time_freq_shift must be 1.0, got "
            "0.5; model.interpolation_scale must be 1.0, got 0.5; own_class=true writes a class that can",
        ),
        (
            DEFAULT_TEXT | OTHERS,
            "PixArtTransformer2DModel cannot represent this model: model.qk_norm must be False, got True; "
            "model.mlp_ratio must be 4.0, got 3.0; model.time_scale must be 1000.0, got 1.0; model.time_freq_shift "
            "must be 0.0, got 0.5; model.mlp_norm_eps must be 1e-06, got 0.01; own_class=true writes a class that can",
        ),
    ],
    ids=["class", "text"],
)
def test_what_a_class_cannot_represent_is_named_all_at_once(meta, tmp_path, model, message):
    source = saved(random_model(meta, model), tmp_path / "source.safetensors")
    before = listing(tmp_path)
    finished = call(main, f"source={source}", f"target={tmp_path / 'new' / 'out'}", "to=diffusers")
    assert error_line(finished) == f"error: to: {message}"
    assert listing(tmp_path) == before


@pytest.mark.parametrize("own_class", [False, True])
@pytest.mark.parametrize("model", [DEFAULT_CLASS, DEFAULT_TEXT], ids=["class", "text"])
@pytest.mark.parametrize(
    ("option", "rule"),
    [
        ({"norm": "rms"}, "model.norm must be layer, got rms"),
        ({"mlp": "swiglu"}, "model.mlp must be gelu, got swiglu"),
        ({"positions": "rope"}, "model.positions must be sincos, got rope"),
        ({"value_residual": True}, "model.value_residual must be False, got True"),
        ({"position_base": 8}, "model.position_base must be 4, got 8"),
    ],
)
def test_options_that_diffusers_classes_do_not_have_are_refused(meta, tmp_path, option, rule, model, own_class):
    source = saved(random_model(meta, model | option), tmp_path / "source.safetensors")
    with pytest.raises(ValueError) as error:
        converted(source, tmp_path / "out", to="diffusers", own_class=own_class)
    assert rule in str(error.value) and "own_class=true" not in str(error.value)
    assert converted(source, tmp_path / "checkpoint").is_dir()  # flowdit's own formats hold them


def test_latents_that_are_not_square_are_refused(meta, tmp_path):
    manifest = meta["manifest"] | {"latent_shape": [16, 8, 16]}
    source = saved(random_model(meta | {"manifest": manifest}, DEFAULT_CLASS), tmp_path / "source.safetensors")
    with pytest.raises(ValueError, match=r"to: FlowDiTClassTransformer .*: the latents' width must be 8, got 16$"):
        converted(source, tmp_path / "out", to="diffusers", own_class=True)


@pytest.mark.parametrize("to", ["checkpoint", "safetensors", "diffusers"])
def test_existing_target_is_not_changed(meta, tmp_path, to):
    source = saved(random_model(meta, STOCK_CLASS), tmp_path / "source.safetensors")
    target = tmp_path / target_name("mine", to)
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    before = listing(tmp_path)
    finished = call(main, f"source={source}", f"target={target}", f"to={to}")
    assert error_line(finished) == f"error: target: must not exist, got {shown(str(target))}"
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("to=onnx", "to: must be one of checkpoint, diffusers, safetensors, got 'onnx'"),
        ("weights=best", "weights: must be one of ema, model, got 'best'"),
        ("dtype=int8", "dtype: must be one of float32, float16, bfloat16, got 'int8'"),
        ("to=safetensors", "target: must end in .safetensors with to=safetensors, got 'out'"),
    ],
)
def test_fields_are_checked_before_the_source(field, message):
    assert error_line(call(main, "source=nowhere", "target=out", field)) == f"error: {message}"
    assert listing(Path()) == []


def test_image_must_be_a_file(meta, tmp_path):
    finished = call(main, "source=nowhere", "target=out", "to=diffusers", "image=nothing.png")
    assert error_line(finished) == "error: image: must be draw, none or an image file, got 'nothing.png'"


@pytest.fixture(scope="module")
def other_vae(tmp_path_factory) -> Path:
    """An AutoencoderKL of four channels and stride 8."""
    torch = pytest.importorskip("torch", reason="needs torch")
    import diffusers

    torch.manual_seed(2)
    kinds = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    vae = diffusers.AutoencoderKL(**kinds, block_out_channels=(4,) * 4, norm_num_groups=2, scaling_factor=0.18215)
    vae.save_pretrained(folder := tmp_path_factory.mktemp("vae"))
    return folder


@pytest.mark.parametrize("to", ["checkpoint", "diffusers"])
def test_vae_of_another_layout_than_the_datas_is_refused(whole_run, tmp_path, other_vae, to):
    finished = call(
        main,
        f"source={whole_run / '6'}",
        f"target={tmp_path / 'out'}",
        f"to={to}",
        f"vae={other_vae}",
        "own_class=true",
    )
    assert re.fullmatch(
        "error: vae: must make latents of 16 channels, stride 8, .* makes 4 channels, stride 8, shift 0.0 and scale 0.18215",
        error_line(finished),
    )
    assert listing(tmp_path) == []


@pytest.mark.parametrize(
    "config", [{"scaling_factor": 0.13025}, {"latent_channels": 8}, {"block_out_channels": (4, 4)}]
)
def test_vae_of_another_layout_than_an_imported_models_is_refused(tmp_path, other_vae, config):
    """Such a model may have no VAE; then the known layout of its latents must match."""
    torch = pytest.importorskip("torch", reason="needs torch")
    import diffusers

    torch.manual_seed(0)
    stock = diffusers.DiTTransformer2DModel(2, 8, in_channels=4, out_channels=8, num_layers=1, sample_size=8)
    with torch.no_grad():
        for block in stock.transformer_blocks:
            block.norm1.emb.load_state_dict(stock.transformer_blocks[0].norm1.emb.state_dict())
    stock.save_pretrained(tmp_path / "dit")
    checkpoint = converted(tmp_path / "dit", tmp_path / "checkpoint", dtype="float32")
    blocks = len(config.get("block_out_channels", (4,) * 4))
    kinds = dict(down_block_types=("DownEncoderBlock2D",) * blocks, up_block_types=("UpDecoderBlock2D",) * blocks)
    settings = dict(block_out_channels=(4,) * 4, norm_num_groups=2, scaling_factor=0.18215) | config
    diffusers.AutoencoderKL(**kinds, **settings).save_pretrained(tmp_path / "vae")
    before = listing(tmp_path)
    with pytest.raises(ValueError, match=r"^vae: must make latents of "):
        converted(checkpoint, tmp_path / "out", to="diffusers", vae=str(tmp_path / "vae"))
    assert listing(tmp_path) == before
    out = converted(checkpoint, tmp_path / "out", to="diffusers", vae=str(other_vae))
    assert diffusers.AutoencoderKL.from_pretrained(out / "vae").config.latent_channels == 4
