"""Exported folders compute the same as flowdit: samples with diffusers' scheduler, and training steps in torch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from interop.small_models import (
    STOCK_CLASS,
    STOCK_TEXT,
    TOKENS,
    noise,
    ours_condition,
    ours_null,
    random_model,
    relative_error,
    saved,
    torch_condition,
)

from flowdit.diffusion.flow import predict
from flowdit.diffusion.sampling import SamplerConfig, sample
from flowdit.interop import ConvertConfig, convert
from flowdit.interop.portable import to_trained

pytest.importorskip("torch", reason="needs torch")

import diffusers
import torch

STEPS = 20
GUIDANCE = 3.0
SHIFT = 3.0
LABELS, LENGTHS = (0, 1, 2, 3), (TOKENS, 2, 1, 4)
OPTIMIZER = {"learning_rate": 1e-3, "weight_decay": 0.05}


@pytest.fixture(scope="module", params=[STOCK_CLASS, STOCK_TEXT], ids=["class", "text"])
def exported(request, meta, tmp_path_factory):
    """A model and its exported diffusers folder."""
    folder = tmp_path_factory.mktemp("numbers")
    portable = random_model(meta, request.param, sampler={"time_shift": SHIFT})
    source, target = saved(portable, folder / "source"), folder / "out"
    convert(ConvertConfig(source=source, target=str(target), to="diffusers", image="none"))
    return portable, target


def load_transformer(portable, folder):
    is_text = portable.meta.text is not None
    stock = diffusers.PixArtTransformer2DModel if is_text else diffusers.DiTTransformer2DModel
    # Evaluation mode: training mode only adds DiT's random dropout of labels.
    return stock.from_pretrained(folder / "transformer", low_cpu_mem_usage=False).eval()


# --- samples ---


def torch_null(portable, condition):
    """The null condition of the folder: the last row of the class table, or the null caption."""
    if portable.meta.text is None:
        return {"class_labels": torch.full_like(condition["class_labels"], 4)}
    features = condition["encoder_hidden_states"]
    null = torch.from_numpy(portable.arrays["null_caption"]).expand_as(features)
    return condition | {"encoder_hidden_states": null}


def sampled_by_diffusers(portable, folder) -> torch.Tensor:
    transformer = load_transformer(portable, folder)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / STEPS, STEPS))
    condition = torch_condition(portable)
    null, latents = torch_null(portable, condition), torch.from_numpy(noise())
    for timestep in scheduler.timesteps:
        times = timestep.expand(len(latents))
        with torch.no_grad():
            conditional = transformer(latents, timestep=times, **condition).sample
            unconditional = transformer(latents, timestep=times, **null).sample
        velocity = unconditional + GUIDANCE * (conditional - unconditional)
        latents = scheduler.step(velocity, timestep, latents).prev_sample
    return latents


def test_same_noise_gives_the_same_latents(exported):
    portable, folder = exported
    expected = sampled_by_diffusers(portable, folder)
    config = SamplerConfig(solver="euler", steps=STEPS, guidance=GUIDANCE, time_shift=SHIFT)
    condition = ours_condition(portable)
    null, model = ours_null(portable, condition), to_trained(portable).model
    got = jax.jit(lambda *inputs: sample(*inputs, config))(model, jnp.asarray(noise()), condition, null)
    assert (got.evaluations == STEPS).all()
    error = relative_error(got.latents, expected)
    print(f"relative error after {STEPS} steps {error:.2e}, largest {np.abs(got.latents - expected.numpy()).max():.2e}")
    assert error < 1e-4
    assert relative_error(expected, noise()) > 0.1  # the network has an effect


# --- training ---


def share_embedders(transformer):
    """One time and class embedder for all blocks, as in flowdit and in DiT's own code.

    diffusers gives each block of a DiT its own copy, which would be trained separately.
    """
    for block in transformer.transformer_blocks[1:] if isinstance(transformer, diffusers.DiTTransformer2DModel) else []:
        block.norm1.emb = transformer.transformer_blocks[0].norm1.emb


def batch():
    """Latents, noise and times that are exact in float32, also when multiplied by 1000."""
    return noise(4, seed=1), noise(4, seed=2), np.asarray([1, 3, 5, 7], np.float32) / 8


def losses_in_torch(portable, folder, steps: int) -> list[float]:
    transformer = load_transformer(portable, folder)
    share_embedders(transformer)
    optimizer = torch.optim.AdamW(
        transformer.parameters(), lr=OPTIMIZER["learning_rate"], weight_decay=OPTIMIZER["weight_decay"]
    )
    x_0, eps, t = map(torch.from_numpy, batch())
    condition = torch_condition(portable, LABELS, LENGTHS)
    at = t[:, None, None, None]
    losses = []
    for _ in range(steps):
        output = transformer((1 - at) * x_0 + at * eps, timestep=1000 * t, **condition).sample
        loss = (output - (eps - x_0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def losses_here(portable, steps: int) -> list[float]:
    model, optimizer = to_trained(portable).model, optax.adamw(**OPTIMIZER)
    x_0, eps, t = map(jnp.asarray, batch())
    condition = ours_condition(portable, LABELS, LENGTHS)

    @jax.jit
    def step(model, state):
        loss = lambda model: jax.vmap(functools.partial(predict, model))(x_0, eps, t, condition).error.mean()
        value, gradients = jax.value_and_grad(loss)(model)
        with jax.numpy_dtype_promotion("standard"):  # Optax mixes a float and its integer count
            updates, state = optimizer.update(gradients, state, model)
        return optax.apply_updates(model, updates), state, value

    state, losses = optimizer.init(model), []
    for _ in range(steps):
        model, state, value = step(model, state)
        losses.append(float(value))
    return losses


def test_further_training_gives_the_same_losses(exported):
    portable, folder = exported
    expected, got = losses_in_torch(portable, folder, 5), losses_here(portable, 5)
    errors = [abs(a / b - 1) for a, b in zip(got, expected, strict=True)]
    print(f"losses {', '.join(f'{loss:.6f}' for loss in got)}; largest relative error {max(errors):.2e}")
    assert max(errors) < 1e-4
    assert got[-1] < 0.99 * got[0]
