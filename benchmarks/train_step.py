"""A training step of DiT-S/2 compared with diffusers' DiT in torch: same threads, float32, on the CPU."""

import dataclasses
import os
from collections.abc import Callable

import jax
import torch

from benchmarks.timing import interleave, table
from benchmarks.torch_dit import diffusers_dit
from benchmarks.workload import NUM_CLASSES, repeated, training
from flowdit.models.compute import FLOAT32, Compute
from flowdit.models.config import DiTConfig
from flowdit.training.step import image_flops

BATCH_SIZE, LATENT = 8, (4, 32, 32)
DIT_S_2 = DiTConfig(depth=12, hidden_dim=384, num_heads=6, patch_size=2, qk_norm=False)


def torch_step(config: DiTConfig) -> Callable[[], None]:
    """A training step of diffusers' class with the same objective, clipping, AdamW and EMA."""
    torch.manual_seed(0)
    shape = {"latent_shape": LATENT, "num_classes": NUM_CLASSES}
    model = diffusers_dit(config.depth, config.hidden_dim, config.num_heads, config.patch_size, **shape).train()
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(0.9999)
    ema = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=average)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    x_0, labels = torch.randn(BATCH_SIZE, *LATENT), torch.arange(BATCH_SIZE)

    def step() -> None:
        noise, t = torch.randn_like(x_0), torch.sigmoid(torch.randn(BATCH_SIZE))
        velocity = model(torch.lerp(x_0, noise, t[:, None, None, None]), 1000 * t, labels).sample
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(velocity, noise - x_0).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        ema.update_parameters(model)

    return step


def measure() -> str:
    torch.set_num_threads(len(os.sched_getaffinity(0)))  # as many as XLA uses
    with_qk_norm = dataclasses.replace(DIT_S_2, qk_norm=True)
    fast = Compute(is_fast=True)
    workload = training(DIT_S_2, LATENT, BATCH_SIZE)
    contenders = {
        "flowdit": repeated(workload),
        "diffusers in torch": torch_step(DIT_S_2),
        "flowdit, qk_norm (default)": repeated(training(with_qk_norm, LATENT, BATCH_SIZE)),
        "flowdit, kernels=fast": repeated(training(DIT_S_2, LATENT, BATCH_SIZE, fast)),
        "flowdit, qk_norm, kernels=fast": repeated(training(with_qk_norm, LATENT, BATCH_SIZE, fast)),
    }
    timings = interleave(contenders, rounds=4)
    flops = image_flops(workload.objective, FLOAT32, jax.eval_shape(workload.init).parameters, workload.batch)
    reference = timings["diffusers in torch"]
    rows = [[name, t.shown(), t.rate(BATCH_SIZE * flops / 1e9), t.ratio(reference)] for name, t in timings.items()]
    return table([f"DiT-S/2, batch {BATCH_SIZE}", "time per step", "GFLOP/s", "time / torch's"], rows)
