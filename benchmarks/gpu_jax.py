"""What `benchmarks.gpu_check` measures of flowdit: attention kernels, training steps and sampling on JAX's first device."""

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.sizes import LATENT, SAMPLING_STEPS, Size
from benchmarks.workers import Contender
from benchmarks.workload import NUM_CLASSES, training
from flowdit.diffusion.sampling import SamplerConfig
from flowdit.hardware import peak_flops
from flowdit.inference.sampler import make_draw
from flowdit.models.attention import (
    NO_KERNELS,
    AttentionShape,
    Kernels,
    attend,
    choose_kernels,
    describe_kernels,
    use_kernels,
)
from flowdit.models.compute import choose_compute
from flowdit.models.config import DiTConfig
from flowdit.models.dit import build_dit
from flowdit.sharding import make_local_mesh
from flowdit.training.step import image_flops

DTYPE = "bfloat16"
SAMPLER = SamplerConfig(solver="euler", steps=SAMPLING_STEPS, guidance=4.0)


def network(size: Size, qk_norm: bool) -> DiTConfig:
    """The network of this size; without Q/K norm it is diffusers'."""
    depth, hidden_dim, num_heads = size
    return DiTConfig(depth=depth, hidden_dim=hidden_dim, num_heads=num_heads, patch_size=2, qk_norm=qk_norm)


def card() -> Contender:
    """The device by JAX's name, and whether its peak is known."""
    device = jax.devices()[0]

    def facts() -> dict[str, Any]:
        return {"device": device.device_kind, "platform": device.platform, "peak": peak_flops(device, DTYPE)}

    return Contender(lambda: 0.0, facts)


class Attention(NamedTuple):
    """Attention forward and backward of some examples and heads."""

    batch_size: int
    num_heads: int

    def measure(self, head_dim: int, tokens: int, key_tokens: int | None) -> dict[str, Any]:
        """Errors and seconds of one shape, by the kernel that flowdit would use and by XLA."""
        shape, platform = AttentionShape(head_dim, tokens, key_tokens), jax.devices()[0].platform
        inputs = attention_inputs(shape, self.batch_size, self.num_heads)
        exact = [x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for x in inputs]
        kernels = choose_kernels(platform, DTYPE, [shape])
        chosen, plain = (attended(used, inputs) for used in (kernels, NO_KERNELS))
        reference = attended(NO_KERNELS, exact, repeat=1).results
        return {
            "kernel": describe_kernels(platform, DTYPE, [shape]),
            "seconds": chosen.seconds,
            "xla_seconds": plain.seconds,
            "against_xla": errors(chosen.results, plain.results),
            "against_float32": errors(chosen.results, reference),
            "xla_against_float32": errors(plain.results, reference),
        }


class Attended(NamedTuple):
    """Gradients and output in float32, and the seconds of one call."""

    results: list[jax.Array]
    seconds: float


def attended(kernels: Kernels, inputs: list[jax.Array], repeat: int = 10) -> Attended:
    """Attention forward and backward with these kernels, vmapped over the examples like the models."""

    def loss(*inputs):
        with use_kernels(kernels):
            out = jax.vmap(attend)(*inputs)
        return jnp.square(out.astype(jnp.float32)).sum(), out

    function = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
    grads, out = jax.block_until_ready(function(*inputs))  # compiles
    start = time.perf_counter()
    for _ in range(repeat):
        last = function(*inputs)
    jax.block_until_ready(last)  # a device runs them in order
    return Attended([x.astype(jnp.float32) for x in (*grads, out)], (time.perf_counter() - start) / repeat)


def attention_inputs(shape: AttentionShape, batch_size: int, num_heads: int) -> list[jax.Array]:
    """Query, key, value and, with `key_tokens`, a mask of a random number of leading tokens."""
    keys = jax.random.split(jax.random.key(0), 4)
    key_tokens = shape.key_tokens or shape.tokens
    lengths = (shape.tokens, key_tokens, key_tokens)
    inputs = [
        jax.random.normal(key, (batch_size, length, num_heads, shape.head_dim), jnp.bfloat16)
        for key, length in zip(keys[:3], lengths, strict=True)
    ]
    if shape.key_tokens:
        valid = jax.random.randint(keys[3], (batch_size, 1), 1, key_tokens + 1)
        inputs.append(jnp.arange(key_tokens)[None] < valid)
    return inputs


def errors(results: list[jax.Array], expected: list[jax.Array]) -> dict[str, float]:
    """Norm of the difference over the norm of what is expected, of the gradients and the output."""
    names = ("query gradient", "key gradient", "value gradient", "output")
    pairs = zip(names, results, expected, strict=True)
    return {name: float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for name, a, b in pairs}


def step(size: Size, batch_size: int, qk_norm: bool, repeat: int) -> Contender:
    """flowdit's training step on random latents in bfloat16: a run is `repeat` steps, its seconds those of one."""
    config = network(size, qk_norm)
    shapes = config.attention_shapes(LATENT)
    device = jax.devices()[0]
    workload = training(config, LATENT, batch_size, choose_compute(None, DTYPE, shapes))
    state = workload.init()
    flops = image_flops(workload.objective, workload.compute, state.parameters, workload.batch)

    def run() -> float:
        nonlocal state
        start = time.perf_counter()
        for _ in range(repeat):
            state, metrics = workload.train_step(state, workload.batch)
        loss = float(metrics["loss"])  # waits
        if not np.isfinite(loss):
            raise ValueError(f"the loss is {loss}")
        return (time.perf_counter() - start) / repeat

    def facts() -> dict[str, Any]:
        return memory(device) | {
            "kernels": describe_kernels(device.platform, DTYPE, shapes),
            "flops": flops,
            "peak": peak_flops(device, DTYPE),
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.model)),
        }

    run()  # compiles
    return Contender(run, facts)


def sampling(size: Size, batch_size: int, qk_norm: bool) -> Contender:
    """flowdit's sampler of latents: a run draws `batch_size` images, its seconds those of one."""
    config, mesh = network(size, qk_norm), make_local_mesh()
    device = jax.devices()[0]
    shapes = config.attention_shapes(LATENT)
    compute = choose_compute(mesh, DTYPE, shapes)
    model = jax.jit(lambda: build_dit(config, LATENT[0], NUM_CLASSES, key=jax.random.key(0)))()
    draw = make_draw(LATENT, SAMPLER, "velocity", compute, mesh)
    numbers = np.arange(batch_size, dtype=np.int32)
    labels, null = numbers % NUM_CLASSES, np.full(batch_size, NUM_CLASSES, np.int32)

    def run() -> float:
        start = time.perf_counter()
        latents = np.asarray(draw(model, np.uint32(0), numbers, labels, null).latents)
        if not np.isfinite(latents).all():
            raise ValueError("the latents are not finite")
        return (time.perf_counter() - start) / batch_size

    def facts() -> dict[str, Any]:
        # A training step is counted as three forward passes; a guided step of Euler's method has two.
        workload = training(config, LATENT, 1)
        forward = (
            image_flops(workload.objective, compute, jax.eval_shape(workload.init).parameters, workload.batch) // 3
        )
        kernels = describe_kernels(device.platform, DTYPE, shapes)
        flops = 2 * SAMPLING_STEPS * forward
        return memory(device) | {"kernels": kernels, "flops": flops, "peak": peak_flops(device, DTYPE)}

    run()  # compiles
    return Contender(run, facts)


def memory(device: jax.Device) -> dict[str, int | None]:
    """The largest number of bytes that this process had in use on the device; None where JAX does not say."""
    return {"peak_memory": (device.memory_stats() or {}).get("peak_bytes_in_use")}
