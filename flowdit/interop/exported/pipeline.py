"""diffusers pipeline of an exported flowdit model.

This file depends only on torch, diffusers and transformers: it is copied into the folder of an exported model. Load it
with `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`.

Convention: sigma = 0 is data and 1 is noise, the transformer's timestep is 1000 sigma, its output noise - data. With
other schedulers, such as `DDIMScheduler`, timesteps are the scheduler's and the output is the noise.
"""

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
Inputs = dict[str, torch.Tensor]


class FlowDiTPipeline(DiffusionPipeline):
    """Class-conditional, text-conditional or unconditional sampling in the latent space of a VAE.

    The transformer determines the kind: a PixArt class takes prompts, a DiT class takes class labels, or no condition
    if it has no classes (`num_embeds_ada_norm` 0, only the null class in its table). Its inputs are normalised latents,
    (raw - `latents_mean`) * `latents_scale` per channel, where raw is the output of the VAE's encoder; the scaling and
    shift factors of the VAE's configuration are not used. `null_caption` replaces the text features of an absent
    caption: one row for all tokens, or one row per token. Guidance applies to sigmas from `guidance_low` to
    `guidance_high`. `image_size` is (height, width) in pixels, for transformers that are conditioned on it.
    `class_names` may be a list, or map numbers to names: the hub refuses lists of strings in `model_index.json`.
    `flowdit` is the metadata of the exported checkpoint, for importing the pipeline again.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components = ["vae", "tokenizer", "text_encoder"]

    def __init__(
        self,
        transformer: ModelMixin,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        text_encoder: PreTrainedModel | None = None,
        latents_mean: list[float] | None = None,
        latents_scale: list[float] | None = None,
        null_caption: list[list[float]] | None = None,
        max_length: int | None = None,
        class_names: list[str] | dict[str, str] | None = None,
        text_encoder_name: str | None = None,
        vae_name: str | None = None,
        guidance: float = 4.0,
        guidance_low: float = 0.0,
        guidance_high: float = 1.0,
        steps: int = 50,
        image_size: list[int] | None = None,
        flowdit: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.register_modules(
            transformer=transformer, scheduler=scheduler, vae=vae, tokenizer=tokenizer, text_encoder=text_encoder
        )
        if isinstance(class_names, list):
            class_names = {str(number): name for number, name in enumerate(class_names)}
        self.register_to_config(latents_mean=latents_mean, latents_scale=latents_scale, null_caption=null_caption)
        self.register_to_config(max_length=max_length, class_names=class_names, image_size=image_size, steps=steps)
        self.register_to_config(guidance=guidance, guidance_low=guidance_low, guidance_high=guidance_high)
        self.register_to_config(text_encoder_name=text_encoder_name, vae_name=vae_name, flowdit=flowdit)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        class_labels: int | str | list[int | str] | None = None,
        negative_prompt: str = "",
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        num_images: int | None = None,
    ) -> ImagePipelineOutput | tuple:
        """One image for each prompt, row of `prompt_embeds` (n, tokens, width), or class number or name.

        An unconditional model takes `num_images` instead, 1 by default, without guidance.

        With an empty `negative_prompt` guidance uses the model's null caption. `latents` is the initial noise, (n,
        channels, height, width). Output type "latent" returns the normalised latents. Raises `ValueError` for arguments
        that do not match the model, or a missing component.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type: must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")
        if output_type != "latent":
            self._check_vae()
        self._check_kind(
            prompt=prompt,
            negative_prompt=negative_prompt or None,
            prompt_embeds=prompt_embeds,
            prompt_attention_mask=prompt_attention_mask,
            class_labels=class_labels,
            num_images=num_images,
        )
        guidance = self.config.guidance if guidance_scale is None else guidance_scale
        steps = self.config.steps if num_inference_steps is None else num_inference_steps
        if self._takes_text:
            condition = self.text_condition(prompt, prompt_embeds, prompt_attention_mask)
            null = None if guidance == 1 else self._text_null(condition, negative_prompt)
        elif self._num_classes:
            condition = {"class_labels": self._class_numbers(class_labels)}
            null = {"class_labels": torch.full_like(condition["class_labels"], self._num_classes)}
        else:
            count = 1 if num_images is None else num_images
            condition, null = (
                {"class_labels": torch.zeros(count, dtype=torch.long, device=self._execution_device)},
                None,
            )
        latents = self._noise(len(next(iter(condition.values()))), generator, latents)
        latents = self._integrate(latents, condition, null, guidance, steps, generator)
        images = latents if output_type == "latent" else self._decode(latents, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    # --- arguments ---

    @property
    def _takes_text(self) -> bool:
        return "caption_channels" in self.transformer.config

    @property
    def _num_classes(self) -> int:
        return self.transformer.config.num_embeds_ada_norm

    def _check_vae(self) -> None:
        if self.vae is None:
            name = self.config.vae_name or "<folder or hub id>"
            raise ValueError(
                f"vae: images need one, pass vae=AutoencoderKL.from_pretrained({name!r}), or output_type='latent'"
            )

    def _check_kind(self, **asked: Any) -> None:
        """Raise `ValueError` for the first argument that this kind of model does not take, or a missing one."""
        given = {name for name, value in asked.items() if value is not None}
        if self._takes_text:
            kind, takes = "a text model", ("prompt", "negative_prompt", "prompt_embeds", "prompt_attention_mask")
        elif self._num_classes:
            kind, takes = "a class model", ("class_labels",)
        else:
            kind, takes = "an unconditional model", ("num_images",)
        for name in asked:
            if name in given and name not in takes:
                raise ValueError(f"{name}: must not be given, this is {kind}: pass {takes[0]}")
        if self._takes_text:
            if ("prompt" in given) == ("prompt_embeds" in given) or asked["prompt"] == []:
                raise ValueError("prompt: must be given, or else prompt_embeds, but not both")
            if "prompt_attention_mask" in given and "prompt_embeds" not in given:
                raise ValueError("prompt_attention_mask: must not be given without prompt_embeds")
        elif self._num_classes and ("class_labels" not in given or asked["class_labels"] == []):
            raise ValueError("class_labels: must be given, this is a class model")
        elif "num_images" in given and (type(count := asked["num_images"]) is not int or count < 1):
            raise ValueError(f"num_images: must be a whole number above 0, got {count!r}")

    def _class_numbers(self, labels: int | str | list[int | str]) -> torch.Tensor:
        """Class numbers (n,) of numbers or names. Raises `ValueError` for a class that the model does not have."""
        numbers = {name: int(number) for number, name in (self.config.class_names or {}).items()}
        found = [numbers.get(label, label) for label in (labels if isinstance(labels, list | tuple) else [labels])]
        for label in found:
            if not isinstance(label, int) or not 0 <= label < self._num_classes:
                kind = f"a number below {self._num_classes}" + (" or a name in class_names" if numbers else "")
                raise ValueError(f"class_labels: must each be {kind}, got {label!r}")
        return torch.tensor(found, device=self._execution_device)

    # --- text ---

    def text_condition(
        self, prompt: str | list[str] | None, embeds: torch.Tensor | None, mask: torch.Tensor | None
    ) -> Inputs:
        if embeds is None:
            return self._with_null(*self.encode_prompts([prompt] if isinstance(prompt, str) else list(prompt or [])))
        mask = torch.ones(embeds.shape[:2]) if mask is None else mask
        if mask.shape != embeds.shape[:2]:
            raise ValueError(
                f"prompt_attention_mask: must have shape {tuple(embeds.shape[:2])}, got {tuple(mask.shape)}"
            )
        return self._with_null(embeds.to(self._execution_device), mask.to(self._execution_device, torch.bool))

    def _text_null(self, condition: Inputs, negative_prompt: str) -> Inputs:
        """The null condition of guidance: the null caption with the mask of the prompt, or the negative prompt."""
        features, mask = condition["encoder_hidden_states"], condition["encoder_attention_mask"]
        if not negative_prompt.strip():
            return {"encoder_hidden_states": self._null_features(features), "encoder_attention_mask": mask}
        negative, negative_mask = self.encode_prompts([negative_prompt])
        if negative.shape[1:] != features.shape[1:]:
            raise ValueError(
                f"prompt_embeds: must be (n, {', '.join(map(str, negative.shape[1:]))}) with a negative_prompt, "
                f"got {tuple(features.shape)}"
            )
        copies = (len(features), 1, 1)
        return {
            "encoder_hidden_states": negative.to(features.dtype).repeat(copies),
            "encoder_attention_mask": negative_mask.repeat(copies[:2]),
        }

    def encode_prompts(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (n, max_length, width) and mask; the mask of a blank text is empty, without special tokens."""
        self._check_encoder()
        tokens = self.tokenizer(
            texts,
            padding="max_length",
            padding_side="right",
            truncation=True,
            max_length=self.config.max_length,
            return_tensors="pt",
        ).to(self._execution_device)
        # The encoder does get the special tokens of a blank text: without any token its attention might not be finite.
        features = self.text_encoder(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        has_tokens = torch.tensor([[bool(text.strip())] for text in texts], device=features.device)
        return features, tokens.attention_mask.bool() & has_tokens

    def _check_encoder(self) -> None:
        name = self.config.text_encoder_name or "<folder or hub id>"
        if name == "wordllama":
            raise ValueError(
                f"prompt: {name} is not a text encoder of transformers, pass its features as prompt_embeds"
            )
        if self.text_encoder is None:
            load = f"T5GemmaEncoderModel.from_pretrained({name!r}, is_encoder_decoder=False)"
            raise ValueError(f"text_encoder: prompts need one, pass text_encoder={load}, or give prompt_embeds")
        if self.tokenizer is None:
            load = f"AutoTokenizer.from_pretrained({name!r})"
            raise ValueError(f"tokenizer: prompts need one, pass tokenizer={load}, or give prompt_embeds")
        if self.config.max_length is None:
            raise ValueError("max_length: must be given in model_index.json for prompts, got null")

    def _with_null(self, features: torch.Tensor, mask: torch.Tensor) -> Inputs:
        """Replace captions without a valid token by the null caption, at all tokens."""
        absent = ~mask.any(1, keepdim=True)
        if absent.any():
            features = torch.where(absent[..., None], self._null_features(features), features)
        return {"encoder_hidden_states": features, "encoder_attention_mask": mask | absent}

    def _null_features(self, like: torch.Tensor) -> torch.Tensor:
        if self.config.null_caption is None:
            raise ValueError("null_caption: must be given in model_index.json for guidance and blank prompts, got null")
        null = torch.tensor(self.config.null_caption, dtype=like.dtype, device=like.device)
        if len(null) not in (1, like.shape[1]) or null.shape[1] != like.shape[2]:
            raise ValueError(
                f"prompt_embeds: must fit a null_caption of shape {tuple(null.shape)}, got {tuple(like.shape)}"
            )
        return null.expand_as(like)

    # --- sampling ---

    def _noise(self, count: int, generator: Any, latents: torch.Tensor | None) -> torch.Tensor:
        config = self.transformer.config
        shape = (count, config.in_channels, config.sample_size, config.sample_size)
        if latents is None:
            latents = randn_tensor(shape, generator, self._execution_device, torch.float32)
        if latents.shape != shape:
            raise ValueError(f"latents: must have shape {shape}, got {tuple(latents.shape)}")
        return latents.to(self._execution_device, torch.float32) * getattr(self.scheduler, "init_noise_sigma", 1.0)

    def _set_timesteps(self, steps: int) -> None:
        """Set flowdit's grid, linspace(1, 0, steps + 1), for flow matching; the scheduler appends the 0 and shifts."""
        if steps < 1:
            raise ValueError(f"num_inference_steps: must be at least 1, got {steps}")
        set_timesteps = self.scheduler.set_timesteps
        is_flow = type(self.scheduler).__name__.startswith("FlowMatch")
        if is_flow and "sigmas" in inspect.signature(set_timesteps).parameters:
            set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), device=self._execution_device)
        else:
            set_timesteps(steps, device=self._execution_device)

    def _integrate(
        self, latents: torch.Tensor, condition: Inputs, null: Inputs | None, guidance: float, steps: int, generator: Any
    ) -> torch.Tensor:
        self._set_timesteps(steps)
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        extra = {"generator": generator} if takes_generator else {}
        for timestep in self.progress_bar(self.scheduler.timesteps):
            scale = getattr(self.scheduler, "scale_model_input", lambda sample, timestep: sample)
            output = self._guided_output(scale(latents, timestep), timestep, condition, null, guidance)
            latents = self.scheduler.step(output, timestep, latents, **extra).prev_sample
        return latents

    def _guided_output(
        self, latents: torch.Tensor, timestep: torch.Tensor, condition: Inputs, null: Inputs | None, guidance: float
    ) -> torch.Tensor:
        """v_null + w (v_cond - v_null) over all channels, both halves in one batch; v_cond outside the interval."""
        sigma = float(timestep) / self.scheduler.config.num_train_timesteps
        low, high = self.config.guidance_low, self.config.guidance_high
        # Timesteps are rounded multiples of sigma, so the tolerance keeps the bounds inside.
        if null is None or guidance == 1 or not low - 1e-6 <= sigma <= high + 1e-6:
            return self._output(latents, timestep, condition)
        both = {name: torch.cat([value, null[name]]) for name, value in condition.items()}
        v_cond, v_null = self._output(torch.cat([latents, latents]), timestep, both).chunk(2)
        return v_null + guidance * (v_cond - v_null)

    def _output(self, latents: torch.Tensor, timestep: torch.Tensor, condition: Inputs) -> torch.Tensor:
        dtype = self.transformer.dtype
        inputs: dict[str, Any] = {
            name: value.to(dtype) if value.is_floating_point() else value for name, value in condition.items()
        }
        if getattr(self.transformer, "use_additional_conditions", False):
            inputs["added_cond_kwargs"] = self._size_condition(latents)
        output = self.transformer(latents.to(dtype), timestep=timestep.expand(len(latents)), **inputs).sample
        # Additional channels are a learned variance.
        return output[:, : latents.shape[1]].float()

    def _size_condition(self, latents: torch.Tensor) -> Inputs:
        if self.config.image_size is None:
            raise ValueError("image_size: must be given in model_index.json for this transformer, got null")
        height, width = self.config.image_size
        size = torch.tensor([[height, width]], dtype=torch.float32, device=latents.device).repeat(len(latents), 1)
        return {"resolution": size, "aspect_ratio": size[:, :1] / size[:, 1:]}

    def _decode(self, latents: torch.Tensor, output_type: str) -> Any:
        def per_channel(values: list[float] | None, default: float) -> torch.Tensor:
            return torch.tensor(values or [default], dtype=torch.float32, device=latents.device).reshape(1, -1, 1, 1)

        raw = latents / per_channel(self.config.latents_scale, 1.0) + per_channel(self.config.latents_mean, 0.0)
        images = self.vae.decode(raw.to(self.vae.dtype)).sample
        return VaeImageProcessor().postprocess(images.float(), output_type=output_type)

    # --- saving ---

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save like diffusers, with the code that is needed to load the folder."""
        super().save_pretrained(save_directory, *args, **kwargs)
        index = Path(save_directory) / "model_index.json"
        content = json.loads(index.read_text())
        content["_class_name"] = ["pipeline", type(self).__name__]
        _copy(Path(inspect.getfile(type(self))), index.with_name("pipeline.py"))
        transformer = type(self.transformer)
        if not transformer.__module__.startswith("diffusers."):
            source = Path(inspect.getfile(transformer))
            content["transformer"] = [source.stem, transformer.__name__]
            _copy(source, index.parent / "transformer" / source.name)
        index.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _copy(source: Path, target: Path) -> None:
    if source.resolve() != target.resolve():
        shutil.copyfile(source, target)
