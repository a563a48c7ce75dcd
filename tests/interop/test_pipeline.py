"""The two code files of an exported folder, loaded by diffusers and compared with flowdit."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.text_folders import write_t5gemma

from flowdit.conditioning.labels import Labels
from flowdit.conditioning.text import Text
from flowdit.diffusion.sampling import SamplerConfig, sample
from flowdit.interop import layouts
from flowdit.models.config import DiTConfig, PixArtConfig
from flowdit.models.dit import build_dit
from flowdit.models.pixart import TextCondition, build_pixart
from flowdit.models.text_encoder import TextConfig, load_text_encoder
from flowdit.sharding import dotted_name

pytest.importorskip("torch", reason="needs torch")

import diffusers
import torch
import transformers
from interop.exported_files import CLASSES_OF, FlowDiTPipeline

LATENT = (4, 8, 8)
TEXT_DIM = 48
TOKENS = 16
CLASSES = 10
MEAN, SCALE = [0.5, -0.25, 0.0, 1.0], [0.5, 1.0, 2.0, 0.75]
SMALL = {"depth": 2, "hidden_dim": 48, "num_heads": 4}


def randomise(model):
    """Set all parameters to random values; scales of norms around 1, embedders equal in all blocks."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if ".norm_" in name else 0.0
            parameter.copy_(centre + 0.1 * torch.randn(parameter.shape, generator=generator))
        if isinstance(model, diffusers.DiTTransformer2DModel):
            first = model.transformer_blocks[0].norm1.emb.state_dict()
            for block in model.transformer_blocks:
                block.norm1.emb.load_state_dict(first)
    return model.eval()


def torch_model(config):
    """The exported class for a configuration of ours."""
    common = dict(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.hidden_dim // config.num_heads,
        num_layers=config.depth,
        in_channels=LATENT[0],
        sample_size=LATENT[1],
        patch_size=config.patch_size,
        interpolation_scale=config.interpolation_scale,
        qk_norm=config.qk_norm,
        mlp_ratio=config.mlp_ratio,
        mlp_norm_eps=config.mlp_norm_eps,
        time_freq_shift=config.time_freq_shift,
        time_scale=config.time_scale,
    )
    if config.name == "ccdit":
        return randomise(CLASSES_OF.FlowDiTClassTransformer(num_embeds_ada_norm=CLASSES, **common))
    return randomise(
        CLASSES_OF.FlowDiTTextTransformer(
            cross_attention_dim=config.hidden_dim,
            caption_channels=TEXT_DIM,
            use_additional_conditions=config.micro_conditioning,
            **common,
        )
    )


def null_caption(rows=1):
    return np.random.default_rng(9).standard_normal((rows, TEXT_DIM), np.float32)


def ours(model, config):
    """flowdit's model with the weights of the torch one."""
    is_text = config.name == "pixart"
    layout = layouts.for_model(layouts.DIFFUSERS_PIXART if is_text else layouts.DIFFUSERS_DIT, config)
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    arrays = layouts.to_ours(layout, tensors, config.depth)
    if is_text:
        null = null_caption(config.null_tokens)
        arrays["null_caption"] = null[0] if config.null_tokens == 1 else null
    build = functools.partial(
        build_pixart if is_text else build_dit, config, LATENT[0], TEXT_DIM if is_text else CLASSES
    )
    shapes = jax.eval_shape(lambda: build(key=jax.random.key(0)))
    return jax.tree_util.tree_map_with_path(lambda path, leaf: jnp.asarray(arrays[dotted_name(path)]), shapes)


def text_inputs(seed=1):
    """Two texts of the features' width, of all tokens and of five."""
    features = np.random.default_rng(seed).standard_normal((2, TOKENS, TEXT_DIM), np.float32)
    return features, np.arange(TOKENS)[None] < np.asarray([[TOKENS], [5]])


def relative_error(got, expected):
    return float(np.linalg.norm(np.asarray(got) - np.asarray(expected)) / np.linalg.norm(expected))


# --- the transformers ---

OTHERS = {"mlp_norm_eps": 1e-2, "time_freq_shift": 1.0, "time_scale": 1.0, "mlp_ratio": 3.0}


@pytest.mark.parametrize(
    "config",
    [
        DiTConfig(**SMALL),
        DiTConfig(**SMALL, **OTHERS, patch_size=4, interpolation_scale=0.5),
        PixArtConfig(**SMALL),
        PixArtConfig(**SMALL, **OTHERS, interpolation_scale=0.5, micro_conditioning=True),
    ],
    ids=["class", "class-others", "text", "text-others"],
)
def test_transformers_equal_flowdit(config):
    model = torch_model(config)
    x = np.random.default_rng(0).standard_normal((2, *LATENT), np.float32)
    t = np.asarray([0.5, 0.875], np.float32)  # exact in float32, and so is 1000 t
    features, mask = text_inputs()
    size = np.asarray([[1024, 512], [256, 256]], np.float32)
    tensors = [torch.from_numpy(value) for value in (x, 1000 * t, features, mask, size)]
    with torch.no_grad():
        if config.name == "ccdit":
            condition = jnp.asarray([3, CLASSES])
            expected = model(tensors[0], tensors[1], torch.tensor([3, CLASSES])).sample
        else:
            condition = TextCondition(*(jnp.asarray(v) for v in (features, mask, np.zeros(2, bool), size)))
            added = {"resolution": tensors[4], "aspect_ratio": tensors[4][:, :1] / tensors[4][:, 1:]}
            expected = model(
                tensors[0],
                tensors[2],
                tensors[1],
                added_cond_kwargs=added if config.micro_conditioning else None,
                encoder_attention_mask=tensors[3],
            ).sample
    got = jax.jit(jax.vmap(ours(model, config)))(jnp.asarray(x), jnp.asarray(t), condition)
    error = relative_error(got, expected)
    print(f"relative error {error:.2e}")
    assert error < 1e-5


@pytest.mark.parametrize("kind", ["Class", "Text"])
def test_default_fields_give_the_stock_classes(kind):
    sizes = dict(num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=8)
    inputs: dict = {"class_labels": torch.tensor([1])}
    stock_class = diffusers.DiTTransformer2DModel
    if kind == "Text":
        sizes |= dict(cross_attention_dim=16, caption_channels=6)
        inputs = {"encoder_hidden_states": torch.randn(1, 3, 6)}
        stock_class = diffusers.PixArtTransformer2DModel
    stock = randomise(stock_class(**sizes, out_channels=4))
    own = getattr(CLASSES_OF, f"FlowDiT{kind}Transformer")(**sizes).eval()
    own.load_state_dict(stock.state_dict())
    inputs |= {"hidden_states": torch.randn(1, *LATENT), "timestep": torch.tensor([300.0])}
    with torch.no_grad():
        torch.testing.assert_close(own(**inputs).sample, stock(**inputs).sample, rtol=0, atol=0)


# --- the pipeline ---


def scheduler():
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)


def reload(pipeline, folder, **components):
    """The pipeline as loaded by a user from a saved folder."""
    pipeline.save_pretrained(folder)
    loaded = diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, **components)
    loaded.set_progress_bar_config(disable=True)
    return loaded


CLASS, TEXT = DiTConfig(**SMALL), PixArtConfig(**SMALL)


@pytest.fixture(scope="module")
def class_pipeline(tmp_path_factory):
    names = [f"class {i}" for i in range(CLASSES)]
    made = FlowDiTPipeline(torch_model(CLASS), scheduler(), class_names=names, steps=20, guidance=4.0, vae_name="a/vae")
    return reload(made, tmp_path_factory.mktemp("class"))


@pytest.fixture(scope="module")
def text_pipeline(tmp_path_factory):
    made = FlowDiTPipeline(
        torch_model(TEXT),
        scheduler(),
        null_caption=null_caption().tolist(),
        max_length=TOKENS,
        steps=20,
        guidance=4.0,
        latents_mean=MEAN,
        latents_scale=SCALE,
        text_encoder_name="an/encoder",
        vae_name="a/vae",
    )
    return reload(made, tmp_path_factory.mktemp("text"))


def noise():
    return np.random.default_rng(3).standard_normal((2, *LATENT), np.float32)


def sampled_by_flowdit(model, condition, null, **settings):
    config = SamplerConfig(solver="euler", steps=20, guidance=4.0, time_shift=3.0, **settings)
    return jax.jit(lambda *inputs: sample(*inputs, config).latents)(model, jnp.asarray(noise()), condition, null)


def text_conditions(features, mask, size=None):
    """Conditions and null conditions of flowdit's text models."""
    conditioning = Text(size=size)
    texts = {"text_features": jnp.asarray(features), "text_mask": jnp.asarray(mask)}
    condition = jax.vmap(conditioning.condition)(texts)
    return condition, jax.vmap(conditioning.null)(condition)


# Bounds between the times of the steps, as rounding decides at the times themselves.
INTERVALS = [{}, {"guidance_low": 0.3, "guidance_high": 0.8}]


@pytest.mark.parametrize("interval", INTERVALS, ids=["everywhere", "interval"])
def test_class_latents_equal_flowdit(class_pipeline, interval):
    class_pipeline.register_to_config(guidance_low=0.0, guidance_high=1.0)
    class_pipeline.register_to_config(**interval)
    got = class_pipeline(class_labels=["class 3", 7], latents=torch.from_numpy(noise()), output_type="latent").images
    labels = jnp.asarray([3, 7])
    null = jax.vmap(Labels(tuple(map(str, range(CLASSES)))).null)(labels)
    error = relative_error(got, sampled_by_flowdit(ours(class_pipeline.transformer, CLASS), labels, null, **interval))
    print(f"relative error {error:.2e}")
    assert error < 1e-4


@pytest.mark.parametrize("rows", [1, TOKENS])
def test_text_latents_equal_flowdit(text_pipeline, rows):
    text_pipeline.register_to_config(null_caption=null_caption(rows).tolist())
    features, mask = text_inputs()
    got = text_pipeline(
        prompt_embeds=torch.from_numpy(features),
        prompt_attention_mask=torch.from_numpy(mask),
        latents=torch.from_numpy(noise()),
        output_type="latent",
    ).images
    text_pipeline.register_to_config(null_caption=null_caption().tolist())
    condition, null = text_conditions(features, mask)
    config = PixArtConfig(**SMALL, null_tokens=rows)
    model = ours(text_pipeline.transformer, config)
    error = relative_error(got, sampled_by_flowdit(model, condition, null))
    print(f"relative error {error:.2e}")
    assert error < 1e-4


def test_noise_prediction_equals_diffusers_pipeline():
    """A stock DiT with DDIM, learned variance and the VAE's scaling factor: the images of `DiTPipeline`."""
    transformer = randomise(
        diffusers.DiTTransformer2DModel(2, 8, out_channels=8, num_layers=1, sample_size=8, num_embeds_ada_norm=1000)
    )
    parts = dict(transformer=transformer, vae=tiny_vae(), scheduler=diffusers.DDIMScheduler())
    # Sampling multiplies latents by the inverse of the factor.
    own = FlowDiTPipeline(**parts, latents_scale=[parts["vae"].config.scaling_factor] * 4)
    stock = diffusers.DiTPipeline(**parts)
    images = []
    for pipeline in (own, stock):
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(5)
        settings = dict(num_inference_steps=5, guidance_scale=3.0, generator=generator, output_type="np")
        images.append(pipeline(class_labels=[1, 2], **settings).images)
    np.testing.assert_allclose(*images, atol=1e-5)
    assert np.ptp(images[0]) > 0.1


def test_size_reaches_a_micro_conditioned_transformer():
    config = PixArtConfig(**SMALL, micro_conditioning=True)
    parts = {"transformer": torch_model(config), "scheduler": scheduler(), "null_caption": null_caption().tolist()}
    features, mask = text_inputs()
    draw = lambda pipeline: pipeline(
        prompt_embeds=torch.from_numpy(features),
        prompt_attention_mask=torch.from_numpy(mask),
        latents=torch.from_numpy(noise()),
        output_type="latent",
        num_inference_steps=20,
        return_dict=False,
    )[0]
    with pytest.raises(ValueError, match="^image_size: must be given"):
        draw(FlowDiTPipeline(**parts))
    got = draw(FlowDiTPipeline(**parts, image_size=[64, 32]))
    condition, null = text_conditions(features, mask, size=(64, 32))
    assert relative_error(got, sampled_by_flowdit(ours(parts["transformer"], config), condition, null)) < 1e-4


def tiny_vae():
    torch.manual_seed(2)
    block = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    return diffusers.AutoencoderKL(**block, block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4).eval()


# --- prompts ---


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    return write_t5gemma(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def whole_pipeline(text_pipeline, encoder_folder):
    """All components, with those besides the transformer passed as in the error messages."""
    return diffusers.DiffusionPipeline.from_pretrained(
        text_pipeline.config._name_or_path,
        trust_remote_code=True,
        vae=tiny_vae(),
        tokenizer=transformers.AutoTokenizer.from_pretrained(encoder_folder),
        text_encoder=transformers.T5GemmaEncoderModel.from_pretrained(encoder_folder, is_encoder_decoder=False),
    )


def test_prompts_are_encoded_as_by_flowdit(whole_pipeline, encoder_folder):
    texts = ["a red apple", "a flag with 世界 and more than sixteen tokens on it", " \n", "red"]
    features, mask = whole_pipeline.encode_prompts(texts)
    expected = load_text_encoder(TextConfig(str(encoder_folder), TOKENS, "float32")).encode(texts)
    assert expected.truncated.tolist() == [False, True, False, False]
    np.testing.assert_array_equal(mask, expected.mask)
    valid = expected.mask
    error = relative_error(features.detach().numpy()[valid], expected.features[valid])
    print(f"relative error {error:.2e}")
    assert error < 1e-5


def test_prompts_give_images_and_survive_saving(whole_pipeline, tmp_path):
    whole_pipeline.set_progress_bar_config(disable=True)
    again = reload(whole_pipeline, tmp_path / "again")
    index = json.loads((tmp_path / "again" / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "FlowDiTPipeline"]
    assert index["transformer"] == ["flowdit_transformer", "FlowDiTTextTransformer"]

    def draw(pipeline, output_type):
        generator = torch.Generator().manual_seed(5)
        return pipeline(
            ["red", ""], negative_prompt="blue", num_inference_steps=3, generator=generator, output_type=output_type
        ).images

    images = draw(whole_pipeline, "pil")
    assert [image.size for image in images] == [(16, 16)] * 2
    latents = draw(again, "latent")
    raw = latents / torch.tensor(SCALE).reshape(-1, 1, 1) + torch.tensor(MEAN).reshape(-1, 1, 1)
    with torch.no_grad():
        expected = ((again.vae.decode(raw).sample + 1) * 127.5).clamp(0, 255).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(np.stack([np.asarray(p, np.float32) for p in images]), expected, atol=1.01)


def test_negative_and_blank_prompts(whole_pipeline):
    whole_pipeline.set_progress_bar_config(disable=True)
    draw = functools.partial(
        whole_pipeline,
        num_inference_steps=2,
        latents=torch.from_numpy(noise()[:1]),
        output_type="latent",
    )
    plain, negative = draw("red").images, draw("red", negative_prompt="a flag").images
    assert relative_error(negative, plain) > 1e-3
    # A blank prompt is the null caption, so guidance has no effect.
    torch.testing.assert_close(draw(" ").images, draw("", guidance_scale=1.0).images, rtol=1e-5, atol=1e-5)
    blank = whole_pipeline.text_condition(" ", None, None)
    np.testing.assert_array_equal(blank["encoder_hidden_states"][0].detach(), null_caption().repeat(TOKENS, 0))
    assert blank["encoder_attention_mask"].all()  # with a bias of -10000 at all keys the logits lose their last digits
    embeds, mask = whole_pipeline.encode_prompts(["red"])
    given = draw(prompt_embeds=embeds, prompt_attention_mask=mask).images
    torch.testing.assert_close(given, plain, rtol=0, atol=0)


# --- loading and errors ---


@pytest.mark.parametrize("custom", [".", "pipeline.py"])
def test_folder_or_file_can_be_a_custom_pipeline(class_pipeline, custom):
    folder = Path(class_pipeline.config._name_or_path)
    loaded = diffusers.DiffusionPipeline.from_pretrained(
        folder, custom_pipeline=str(folder / custom), trust_remote_code=True
    )
    assert type(loaded).__name__ == "FlowDiTPipeline"
    assert loaded.transformer.config.qk_norm
    assert loaded.config.class_names["3"] == "class 3"


EMBEDS = torch.zeros(1, TOKENS, TEXT_DIM)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("class", {"class_labels": 1}, r"vae: images need one, pass vae=AutoencoderKL.from_pretrained\('a/vae'\)"),
        ("class", {"class_labels": 1, "output_type": "png"}, "output_type: must be one of pil, np, pt, latent, got"),
        ("class", {}, "class_labels: must be given, this is a class model"),
        ("class", {"class_labels": []}, "class_labels: must be given, this is a class model"),
        ("class", {"prompt": "red"}, "prompt: must not be given, this is a class model: pass class_labels"),
        ("class", {"class_labels": 1, "negative_prompt": "a"}, "negative_prompt: must not be given, this is a class"),
        ("class", {"class_labels": [1, 10]}, "class_labels: must each be a number below 10 or a name .* got 10"),
        ("class", {"class_labels": "dog"}, "class_labels: must each be a number below 10 or a name .* got 'dog'"),
        ("class", {"class_labels": 1, "num_inference_steps": 0}, "num_inference_steps: must be at least 1, got 0"),
        ("class", {"class_labels": 1, "latents": torch.zeros(2, 4, 8, 8)}, r"latents: must have shape \(1, 4, 8, 8\)"),
        ("text", {}, "prompt: must be given, or else prompt_embeds, but not both"),
        ("text", {"prompt": "a", "prompt_embeds": EMBEDS}, "prompt: must be given, or else prompt_embeds"),
        ("text", {"class_labels": 1}, "class_labels: must not be given, this is a text model: pass prompt"),
        ("text", {"prompt": "a", "prompt_attention_mask": EMBEDS}, "prompt_attention_mask: must not be given without"),
        (
            "text",
            {"prompt": "red"},
            r"text_encoder: prompts need one, pass text_encoder=T5GemmaEncoderModel.from_pretrained\('an/encoder', ",
        ),
        ("text", {"prompt_embeds": EMBEDS[..., 1:]}, r"prompt_embeds: must fit a null_caption of shape \(1, 48\), got"),
        (
            "text",
            {"prompt_embeds": EMBEDS, "prompt_attention_mask": torch.ones(1, 3)},
            r"prompt_attention_mask: must have shape \(1, 16\), got \(1, 3\)",
        ),
    ],
)
def test_invalid_arguments_are_refused(class_pipeline, text_pipeline, kind, arguments, message):
    pipeline = class_pipeline if kind == "class" else text_pipeline
    with pytest.raises(ValueError, match=f"^{message}"):
        pipeline(**({} if message.startswith("vae") else {"output_type": "latent"}) | arguments)


def test_encoders_that_cannot_be_loaded_are_explained(text_pipeline):
    parts = {"transformer": text_pipeline.transformer, "scheduler": scheduler()}
    with pytest.raises(
        ValueError, match="^prompt: wordllama is not a text encoder of transformers, pass its features as prompt_embeds"
    ):
        FlowDiTPipeline(**parts, text_encoder_name="wordllama")("red", output_type="latent")
    with pytest.raises(ValueError, match="^null_caption: must be given in model_index.json for guidance"):
        FlowDiTPipeline(**parts)(prompt_embeds=EMBEDS, output_type="latent")
