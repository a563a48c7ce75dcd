"""The work of `benchmarks.gpu_jax` by diffusers' DiT in torch, on the first GPU, or the CPU if there is none."""

import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.sizes import LATENT, NUM_CLASSES, SAMPLING_STEPS, Size
from benchmarks.torch_dit import diffusers_dit
from benchmarks.workers import Contender

EMA_DECAY = 0.9999
GUIDANCE = 4.0


def network(size: Size, memory_share: float) -> tuple[Any, torch.device]:
    """The float32 network on the device, of whose memory this process takes at most a share."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(memory_share)
    model: Any = diffusers_dit(
        size.depth, size.hidden_dim, size.num_heads, patch_size=2, latent_shape=LATENT, num_classes=NUM_CLASSES
    )
    return model.to(device), device


def compiled(function: Callable[..., Any], use_compile: bool) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False) if use_compile else function


def step(size: Size, batch_size: int, memory_share: float, repeat: int, use_compile: bool) -> Contender:
    """Training with autocast to bfloat16 over float32 parameters, fused AdamW, clipping and EMA: `repeat` steps a run."""
    model, device = network(size, memory_share)
    model.train()  # drops a tenth of the classes
    parameters = list(model.parameters())
    ema = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True)
    x_0 = torch.randn(batch_size, *LATENT, device=device)
    labels = torch.arange(batch_size, device=device) % NUM_CLASSES

    def loss_of(noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            velocity = model(torch.lerp(x_0, noise, t[:, None, None, None]), 1000 * t, labels).sample
        return torch.nn.functional.mse_loss(velocity.float(), noise - x_0)

    forward = compiled(loss_of, use_compile)

    def train_step() -> torch.Tensor:
        noise, t = torch.randn_like(x_0), torch.sigmoid(torch.randn(batch_size, device=device))
        loss = forward(noise, t)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(ema, parameters, 1 - EMA_DECAY)  # pyright: ignore[reportPrivateImportUsage]
        return loss.detach()

    def run() -> float:
        start = time.perf_counter()
        for _ in range(repeat):
            loss = train_step()
        value = loss.item()  # waits
        if value != value:
            raise ValueError("the loss is NaN")
        return (time.perf_counter() - start) / repeat

    run()  # compiles
    return Contender(run, lambda: facts(model))


def sampling(size: Size, batch_size: int, memory_share: float, use_compile: bool) -> Contender:
    """Euler's method with guidance, weights in bfloat16: a run draws `batch_size` images, its seconds those of one."""
    model, device = network(size, memory_share)
    torch.nn.Module.to(model, torch.bfloat16)  # diffusers' own prints a warning
    model.eval()
    numbers = torch.arange(batch_size, device=device) % NUM_CLASSES
    labels = torch.cat([numbers, torch.full_like(numbers, NUM_CLASSES)])  # with the class, and without
    noise = torch.randn(batch_size, *LATENT, device=device)

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        both = model(torch.cat([x, x]).to(torch.bfloat16), t, labels).sample.float()
        conditional, null = both.chunk(2)
        return null + GUIDANCE * (conditional - null)

    evaluate = compiled(velocity, use_compile)

    def run() -> float:
        start = time.perf_counter()
        x = noise
        with torch.no_grad():
            for i in range(SAMPLING_STEPS):
                t = torch.full((2 * batch_size,), 1000 * (1 - i / SAMPLING_STEPS), device=device)
                x = x - evaluate(x, t) / SAMPLING_STEPS
        if not bool(x.isfinite().all()):  # waits
            raise ValueError("the latents are not finite")
        return (time.perf_counter() - start) / batch_size

    run()  # compiles
    return Contender(run, lambda: facts(model))


def facts(model: torch.nn.Module) -> dict[str, Any]:
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return {"peak_memory": peak, "parameters": sum(parameter.numel() for parameter in model.parameters())}
