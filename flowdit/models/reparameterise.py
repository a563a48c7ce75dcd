"""A text model that starts as a trained class model: the re-parameterisation of PixArt-alpha (section 2.3).

At one flow time t*, the tables of adaLN-single are set so that every modulation equals that of the class model without
its class. The paper does not specify the shared map or how the class is removed, and its code was not released, so both
are options here.
"""

from __future__ import annotations

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flowdit.models.config import ModelConfig, PixArtConfig
from flowdit.models.dit import DiT
from flowdit.models.layers import Linear
from flowdit.models.pixart import PixArt, TextCondition

SHARED_MAPS = ("block0", "mean")
CLASS_CONDITIONS = ("dropped", "null_class")
# From `norm` on they shape no array, but trained weights need the same value.
COPIED_FIELDS = (
    "depth",
    "hidden_dim",
    "num_heads",
    "patch_size",
    "mlp_ratio",
    "mlp",
    "qk_norm",
    "value_residual",
    "norm",
    "positions",
    "time_freq_shift",
    "time_scale",
    "mlp_norm_eps",
)


def check_compatible(
    theirs: ModelConfig,
    ours: ModelConfig,
    their_latent_shape: tuple[int, int, int],
    our_latent_shape: tuple[int, int, int],
) -> None:
    """Raise `ValueError` naming the first reason why our model cannot use the weights of theirs.

    Both are of one kind, or theirs is a class model and ours a text model. Latent shapes are (channels, height, width);
    height and width may differ, as positions are not learned.
    """
    pairs = {field: (getattr(theirs, field), getattr(ours, field)) for field in COPIED_FIELDS}
    # On another grid the positions may be scaled; on the same one they are part of what must not change.
    if their_latent_shape == our_latent_shape:
        pairs["interpolation_scale"] = (theirs.interpolation_scale, ours.interpolation_scale)
        pairs["position_base"] = (
            theirs.position_base_on(their_latent_shape),
            ours.position_base_on(our_latent_shape),
        )
    # A size embedding that is new has no effect at first, one that was trained cannot be left out.
    if isinstance(theirs, PixArtConfig) and theirs.micro_conditioning:
        pairs["micro_conditioning"] = (True, getattr(ours, "micro_conditioning", False))
    for field, (expected, got) in pairs.items():
        if expected != got:
            raise ValueError(f"model.{field}: must be {expected} as in train.init_from, got {got}")
    if their_latent_shape[0] != our_latent_shape[0]:
        shapes = ("x".join(map(str, shape)) for shape in (their_latent_shape, our_latent_shape))
        raise ValueError("train.init_from: its latents are {}, the data's are {}: channels must agree".format(*shapes))


def reparameterise(
    class_model: DiT,
    text_model: PixArt,
    *,
    time: float = 0.5,
    shared_map: str = "block0",
    class_condition: str = "dropped",
) -> PixArt:
    """`text_model` with the weights of `class_model`, equal to it without its class at flow time `time`.

    With S_i(t) = W_i SiLU(t_emb(t) + c) + b_i the modulation of class-model block i and f the shared map, `"block0"`'s
    or the `"mean"` W and b over blocks applied to SiLU(t_emb(t)), the table of block i is S_i(t*) - f(t*), and the
    final table is the final layer's (shift, scale) at t* minus t_emb(t*). c is 0 (`"dropped"`) or the `"null_class"` class.

    Patch and time embedding, self-attention, MLPs and final projection are copied. Caption MLP, null caption and
    cross-attention stay `text_model`'s, with zero cross-attention outputs, so that any caption gives the same velocity.
    Outputs of a size embedding are zeroed too: it would shift the time embedding. Static fields, such as the scale of the
    positions, stay `text_model`'s. Check with `check_compatible` first. Works under jit, on sharded arrays and shapes.
    """
    with jax.default_matmul_precision("highest"):  # the tables are differences of nearly equal numbers
        adaln_single = _adaln_single(class_model, time, shared_map, class_condition)
    # Array by array: static fields are not copied.
    model = eqx.tree_at(_copied_arrays, text_model, _copied_arrays(class_model))
    model = eqx.tree_at(lambda m: (m.time_block, m.blocks.table, m.final_table), model, adaln_single)
    model = eqx.tree_at(lambda m: jax.tree.leaves(m.blocks.cross_attention.out), model, replace_fn=jnp.zeros_like)
    return model if model.size_embed is None else without_sizes(model)


def without_sizes(model: PixArt) -> PixArt:
    """`model` with zero outputs of its size embedding: the image size has no effect until it is trained."""
    outputs = lambda m: jax.tree.leaves((m.size_embed.side.down, m.size_embed.aspect.down))
    return eqx.tree_at(outputs, model, replace_fn=jnp.zeros_like)


def _copied_arrays(model: DiT | PixArt) -> list:
    blocks = model.blocks
    return jax.tree.leaves((model.patch_embed, model.time_embed, blocks.attention, blocks.mlp, model.final_linear))


def _adaln_single(
    class_model: DiT, time: float, shared_map: str, class_condition: str
) -> tuple[Linear, Float[Array, "depth 6 dim"], Float[Array, "2 dim"]]:
    """The shared map, the tables of the blocks and the table of the final layer."""
    embedding = class_model.time_embed(jnp.asarray(time, jnp.float32))
    condition = jax.nn.silu(embedding + _class_vector(class_model, class_condition))
    ada_ln = class_model.blocks.ada_ln
    shared = jax.tree.map(lambda leaf: leaf[0] if shared_map == "block0" else leaf.mean(0), ada_ln)
    modulations = jax.vmap(lambda linear: linear(condition))(ada_ln)
    tables = modulations - shared(jax.nn.silu(embedding))[None]
    final_table = class_model.final_ada_ln(condition).reshape(2, -1) - embedding[None]
    return shared, tables.reshape(len(tables), 6, -1), final_table


def _class_vector(class_model: DiT, class_condition: str) -> Float[Array, " dim"]:
    null_class = class_model.class_table[class_model.null_label]
    return null_class if class_condition == "null_class" else jnp.zeros_like(null_class)


def drift(
    class_model: DiT,
    text_model: PixArt,
    times: Float[Array, " times"],
    x_t: Float[Array, "times batch channels height width"],
    class_condition: str = "dropped",
) -> Float[Array, " times"]:
    """How far the text model without caption is from the class model without class, at each flow time.

    Root mean square of the difference of the velocities over that of the class model's, on the text model's latents
    `x_t`, already noised to their times. One time after the other, to spare memory.
    """
    table = _class_vector(class_model, class_condition)[None]
    # With the text model's positions, which are of the grid that both see here.
    class_model = dataclasses.replace(class_model, class_table=table, settings=text_model.settings)
    rows = text_model.null_caption.size // text_model.text_dim
    nothing = TextCondition(
        features=jnp.zeros((rows, text_model.text_dim)),
        mask=jnp.ones(rows, bool),
        dropped=jnp.asarray(True),
        size=None if text_model.size_embed is None else jnp.ones(2),
    )

    def at_time(time_and_inputs):
        t, inputs = time_and_inputs
        reference = jax.vmap(lambda x: class_model(x, t, jnp.asarray(0)))(inputs)
        velocity = jax.vmap(lambda x: text_model(x, t, nothing))(inputs)
        # A class model that was never trained has no velocity to compare with.
        return jnp.linalg.norm((velocity - reference).ravel()) / jnp.maximum(jnp.linalg.norm(reference.ravel()), 1e-12)

    return jax.lax.map(at_time, (times, x_t))
