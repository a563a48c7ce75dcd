"""The trunk of the transformers: one block, put together from the configuration, and the function that runs all of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, cast

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from flowdit.fsdp import gather, is_gathering, keep_all_but_gathered
from flowdit.models.config import ModelConfig
from flowdit.models.layers import (
    MLP,
    CrossAttention,
    Linear,
    SelfAttention,
    SwiGLU,
    cross_attention,
    mlp,
    norm_and_modulate,
    patchify,
    self_attention,
    unpatchify,
    zero_linear,
)
from flowdit.models.observe import Observed, collect, note, observe
from flowdit.models.positions import Positions
from flowdit.models.remat import remat_policy
from flowdit.sharding import REPLICATED, ParameterSpec

Values = Float[Array, "tokens heads head_dim"]


class BlockInputs(NamedTuple):
    """What every block reads besides the tokens.

    `modulation` is the condition of adaLN-Zero, (dim,), or the shared modulation of adaLN-single, (6, dim). `text` and
    `mask` are of the cross-attention, `angles` of rotary positions.
    """

    modulation: Float[Array, " dim"] | Float[Array, "6 dim"]
    angles: Float[Array, "tokens half"] | None = None
    text: Float[Array, "text_tokens dim"] | None = None
    mask: Bool[Array, " text_tokens"] | None = None


class Block(eqx.Module):
    """Pre-norm self-attention and MLP, modulated and gated; between them, with a text, cross-attention to it.

    The modulation (shift, scale, gate of the attention, then of the MLP) comes from the block's own projection `ada_ln`
    (adaLN-Zero, DiT) or is the shared one plus the block's `table` (adaLN-single, PixArt-alpha section 2.3). The
    cross-attention has neither norm nor gate.
    """

    attention: SelfAttention
    cross_attention: CrossAttention | None
    mlp: MLP | SwiGLU
    ada_ln: Linear | None
    table: Float[Array, "6 dim"] | None
    norm: str = eqx.field(static=True, default="layer")
    mlp_norm_eps: float = eqx.field(static=True, default=1e-6)

    def __call__(
        self, x: Float[Array, "tokens dim"], inputs: BlockInputs, first_value: Values | None = None
    ) -> tuple[Float[Array, "tokens dim"], Values]:
        """The tokens after the block, and the values of its attention."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self._modulation(inputs.modulation)
        attended, value = self.attention(norm_and_modulate(self.norm, x, shift_a, scale_a), inputs.angles, first_value)
        observe("self_attention", attended)
        x = x + gate_a[None] * attended
        if self.cross_attention is not None:
            assert inputs.text is not None and inputs.mask is not None
            attended = self.cross_attention(x, inputs.text, inputs.mask)
            observe("cross_attention", attended)
            x = x + attended
        mixed = self.mlp(norm_and_modulate(self.norm, x, shift_m, scale_m, self.mlp_norm_eps))
        observe("mlp", mixed)
        x = x + gate_m[None] * mixed
        observe("tokens", x)
        return x, value

    def _modulation(self, given: Array) -> Float[Array, "6 dim"] | list[Float[Array, " dim"]]:
        if self.table is not None:
            return self.table + given
        assert self.ada_ln is not None
        return jnp.split(checkpoint_name(self.ada_ln(jax.nn.silu(given)), "modulation"), 6)

    def parameter_specs(self) -> dict[str, ParameterSpec]:
        return {"table": REPLICATED}


def build_blocks(config: ModelConfig, *, has_text: bool, key: PRNGKeyArray) -> Block:
    """`config.depth` freshly initialised blocks, every array with a leading depth axis.

    With a text: adaLN-single and cross-attention with zero outputs, tables normal over the root of the width. Without:
    adaLN-Zero.
    """
    dim = config.hidden_dim

    def block(key: PRNGKeyArray) -> Block:
        keys = iter(jax.random.split(key, 4 if has_text else 2))
        return Block(
            attention=self_attention(dim, config.num_heads, config.qk_norm, config.value_residual, key=next(keys)),
            cross_attention=cross_attention(dim, config.num_heads, config.qk_norm, key=next(keys))
            if has_text
            else None,
            mlp=mlp(dim, config.mlp_ratio, config.mlp, key=next(keys)),
            ada_ln=None if has_text else zero_linear(dim, 6 * dim, axes=("embed", "modulation"), parts=6),
            table=jax.random.normal(next(keys), (6, dim)) / dim**0.5 if has_text else None,
            norm=config.norm,
            mlp_norm_eps=config.mlp_norm_eps,
        )

    return cast(Block, eqx.filter_vmap(block)(jax.random.split(key, config.depth)))


class Route(NamedTuple):
    """Blocks `start` to `stop` - 1 run on `keep` random tokens; the others skip them unchanged (TREAD).

    For objectives of your own: no setting of the training commands uses it.
    """

    start: int
    stop: int
    keep: int


class Hidden(NamedTuple):
    """The tokens after the last block, and those after the blocks that were asked for, by depth (1: the first block)."""

    x: Float[Array, "tokens dim"]
    depths: dict[int, Float[Array, "tokens dim"]]


def run_blocks(
    blocks: Block,
    x: Float[Array, "tokens dim"],
    inputs: BlockInputs,
    *,
    remat: str = "none",
    scan: bool = True,
    depths: Iterable[int] = (),
    route: Route | None = None,
    key: PRNGKeyArray | None = None,
) -> Hidden:
    """Run a stack of blocks, every array of which leads with the depth axis.

    With `scan` one block is compiled for all, so compile time does not grow with depth; every depth that is asked for and
    each end of a route divides the stack into one more scan. Without it the program holds every block. `remat` says what
    the backward pass keeps (`remat_policy`); weights that had to be gathered it never keeps. `key` draws the tokens of a
    route.

    Raises `ValueError` for a depth outside of [1, number of blocks], and for a route without a key or outside of the stack;
    with value residuals, the first block runs on all tokens.
    """
    count = jax.tree.leaves(blocks)[0].shape[0]
    wanted = sorted(set(depths))
    mixes_values = blocks.attention.value_mix is not None
    _check_depths(count, wanted)
    _check_route(count, x.shape[0], route, key, earliest=int(mixes_values))
    cuts = {0, count, *wanted}
    cuts |= {1} if mixes_values else set()
    cuts |= {route.start, route.stop} if route else set()

    hidden, first_value = {}, None
    observed = []
    for start, stop in itertools.pairwise(sorted(cuts)):
        part = blocks if (start, stop) == (0, count) else _cut(blocks, start, stop)
        tokens = None
        if route and key is not None and route.start <= start < route.stop:
            tokens = jax.random.permutation(key, x.shape[0])[: route.keep]
        is_first = mixes_values and start == 0
        x, value, seen = _run_part(part, x, inputs, first_value, tokens, remat=remat, scan=scan, return_value=is_first)
        observed.append(seen)
        first_value = value if is_first else first_value
        if stop in wanted:
            hidden[stop] = x
    note("blocks", jax.tree.map(lambda *parts: jnp.concatenate(parts), *observed))
    return Hidden(x, hidden)


def _cut(blocks: Block, start: int, stop: int) -> Block:
    return jax.tree.map(lambda leaf: leaf[start:stop], blocks)


def _check_depths(count: int, depths: Sequence[int]) -> None:
    for depth in depths:
        if not 1 <= depth <= count:
            raise ValueError(f"depths: must be in [1, {count}], the number of blocks, got {depth}")


def _check_route(count: int, tokens: int, route: Route | None, key: PRNGKeyArray | None, earliest: int) -> None:
    if route is None:
        return
    if not (earliest <= route.start < route.stop <= count and 1 <= route.keep <= tokens):
        raise ValueError(
            f"route: must have {earliest} <= start < stop <= {count} and keep 1 to {tokens} tokens, got {tuple(route)}"
        )
    if key is None:
        raise ValueError("route: must be given a key to draw its tokens with, got None")


def _run_part(
    blocks: Block,
    x: Float[Array, "tokens dim"],
    inputs: BlockInputs,
    first_value: Values | None,
    tokens: Int[Array, " kept"] | None,
    *,
    remat: str,
    scan: bool,
    return_value: bool,
) -> tuple[Float[Array, "tokens dim"], Values | None, Observed]:
    """Run consecutive blocks, on `tokens` alone where they are given; with `return_value` also the last values.

    What was observed has a leading axis over the blocks.
    """
    whole = x
    if tokens is not None:
        x = x[tokens]
        first_value = None if first_value is None else first_value[tokens]
        inputs = inputs._replace(angles=None if inputs.angles is None else inputs.angles[tokens])

    def body(x: Array, block: Block) -> tuple[Array, tuple[Values | None, Observed]]:
        with collect() as observed:
            x, value = gather(block)(x, inputs, first_value)
        return x, (value if return_value else None, observed)

    policy = remat_policy(remat) or (keep_all_but_gathered if is_gathering() else None)
    if policy is not None:
        body = jax.checkpoint(body, policy=policy, prevent_cse=not scan)
    x, (values, observed) = (jax.lax.scan if scan else _run_in_turn)(body, x, blocks)
    x = x if tokens is None else whole.at[tokens].set(x)
    return x, None if values is None else values[-1], observed


def _run_in_turn(body: Callable[..., Any], x: Array, blocks: Block) -> tuple[Array, Any]:
    """`jax.lax.scan` without its loop."""
    leaves, structure = jax.tree.flatten(blocks)
    count = leaves[0].shape[0]
    # The gradient of a split is one concatenation; that of an index would be a sum of stacks that are zero but for it.
    parts = [jax.lax.split(leaf, [1] * count) for leaf in leaves]
    results = []
    for i in range(count):
        x, result = body(x, structure.unflatten([part[i][0] for part in parts]))
        results.append(result)
    return x, jax.tree.map(lambda *each: jnp.stack(each), *results)


class TrunkSettings(NamedTuple):
    """The settings of a network besides its arrays; they do not depend on the size of the latents."""

    patch_size: int
    norm: str = "layer"
    remat: str = "none"
    positions: Positions = Positions()
    scan_blocks: bool = True

    @classmethod
    def of(cls, config: ModelConfig) -> TrunkSettings:
        return cls(config.patch_size, config.norm, config.remat, config.grid_positions, config.scan_blocks)


class Output(NamedTuple):
    """The velocity, the tokens after the blocks that were asked for, by depth (1: the first block), and the velocity of
    the guidance head if that was asked for.
    """

    velocity: Float[Array, "channels height width"]
    hidden: dict[int, Float[Array, "tokens dim"]]
    weak: Float[Array, "channels height width"] | None = None


def embed_patches(
    x_t: Float[Array, "channels height width"], linear: Linear, settings: TrunkSettings, head_dim: int
) -> tuple[Float[Array, "tokens dim"], Float[Array, "tokens half"] | None]:
    """Patches through `linear` in the dtype of the parameters; their positions are added, or returned as rotary angles."""
    x = linear(patchify(x_t, settings.patch_size).astype(linear.weight.dtype))
    observe("patch_embed", x)
    height, width = (side // settings.patch_size for side in x_t.shape[1:])
    if settings.positions.kind == "rope":
        return x, jnp.asarray(settings.positions.angles(head_dim, height, width))
    return x + jnp.asarray(settings.positions.table(x.shape[1], height, width), x.dtype), None


def project_velocity(
    x: Float[Array, "tokens dim"],
    modulation: Float[Array, "2 dim"] | Sequence[Float[Array, " dim"]],
    linear: Linear,
    settings: TrunkSettings,
    latent_shape: tuple[int, ...],
    name: str = "final_linear",
) -> Float[Array, "channels height width"]:
    """The final layer: norm, modulation by (shift, scale), and projection to patches of a float32 latent.

    `name` is that of the projection in a diagnosis.
    """
    shift, scale = modulation
    patches = linear(norm_and_modulate(settings.norm, x, shift, scale))
    observe(name, patches)
    return unpatchify(patches, settings.patch_size, latent_shape).astype(jnp.float32)
