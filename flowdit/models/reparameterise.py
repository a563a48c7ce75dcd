"""A text model that starts as a trained class model: the re-parameterisation of PixArt-alpha (section 2.3).

At one flow time t*, the tables of adaLN-single are set so that every modulation equals the class model's without its
class. The paper does not say how the shared map is chosen nor what "without" means, and its code was never released:
both are options here.
"""

from __future__ import annotations

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flowdit.models.ccdit import CCDiT
from flowdit.models.layers import Linear
from flowdit.models.mmdit import MMDiT, TextCondition
from flowdit.models.transformer import ModelConfig

SHARED_MAPS = ("block0", "mean")
CLASS_CONDITIONS = ("dropped", "null_class")
COPIED_FIELDS = ("depth", "hidden_dim", "num_heads", "patch_size", "mlp_ratio", "qk_norm")


def check_compatible(
    class_config: ModelConfig,
    text_config: ModelConfig,
    class_latent_shape: tuple[int, int, int],
    text_latent_shape: tuple[int, int, int],
) -> None:
    """Raise `ValueError` naming the first thing that keeps the text model from taking the class model's weights.

    Latent shapes are (channels, height, width); height and width may differ, for positions are not learned.
    """
    if class_config.name != "ccdit":
        raise ValueError(f"train.init_from: must be a class-conditional model (ccdit), got {class_config.name}")
    # On another grid the positions are to be stretched; on the same one they are part of what must not change.
    same_grid = ("interpolation_scale",) if class_latent_shape == text_latent_shape else ()
    for field in COPIED_FIELDS + same_grid:
        theirs, ours = getattr(class_config, field), getattr(text_config, field)
        if theirs != ours:
            raise ValueError(f"model.{field}: must be {theirs} as in train.init_from, got {ours}")
    if class_latent_shape[0] != text_latent_shape[0]:
        theirs, ours = ("x".join(map(str, shape)) for shape in (class_latent_shape, text_latent_shape))
        raise ValueError(f"train.init_from: its latents are {theirs}, the data's are {ours}: channels must agree")


def reparameterise(
    class_model: CCDiT,
    text_model: MMDiT,
    *,
    time: float = 0.5,
    shared_map: str = "block0",
    class_condition: str = "dropped",
) -> MMDiT:
    """`text_model` with the weights of `class_model`, equal to it without its class at flow time `time`.

    With S_i(t) = W_i SiLU(t_emb(t) + c) + b_i the modulation of class-model block i and f the shared map, `"block0"`'s
    or the `"mean"` W and b over blocks applied to SiLU(t_emb(t)), the table of block i is S_i(t*) - f(t*), and the
    final table is the final layer's (shift, scale) at t* minus t_emb(t*). c is 0 (`"dropped"`) or the `"null_class"` class.

    Patch and time embedding, self-attention, MLPs and final projection are copied. Caption MLP, null caption and
    cross-attention stay `text_model`'s, with zero cross-attention outputs, so that any caption gives the same velocity.
    Outputs of a size embedding are zeroed too: it would shift the time embedding. Static fields, such as the latent
    shape, stay `text_model`'s. Check with `check_compatible` first. Works under jit, on sharded arrays and shapes.
    """
    with jax.default_matmul_precision("highest"):  # the tables are differences of nearly equal numbers
        adaln_single = _adaln_single(class_model, time, shared_map, class_condition)
    # Array by array: static fields, such as the attention kernel, are not copied.
    model = eqx.tree_at(_copied_arrays, text_model, _copied_arrays(class_model))
    model = eqx.tree_at(lambda m: (m.time_block, m.blocks.table, m.final_table), model, adaln_single)
    return eqx.tree_at(_silent_arrays, model, replace_fn=jnp.zeros_like)


def _copied_arrays(model: CCDiT | MMDiT) -> list:
    blocks = model.blocks
    return jax.tree.leaves((model.patch_embed, model.time_embed, blocks.attention, blocks.mlp, model.final_linear))


def _silent_arrays(model: MMDiT) -> list:
    sizes = model.size_embed
    return jax.tree.leaves((model.blocks.cross_attention.out, (sizes.side.down, sizes.aspect.down) if sizes else None))


def _adaln_single(
    class_model: CCDiT, time: float, shared_map: str, class_condition: str
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


def _class_vector(class_model: CCDiT, class_condition: str) -> Float[Array, " dim"]:
    null_class = class_model.class_table[class_model.null_label]
    return null_class if class_condition == "null_class" else jnp.zeros_like(null_class)


def drift(
    class_model: CCDiT,
    text_model: MMDiT,
    times: Float[Array, " times"],
    x_t: Float[Array, "times batch channels height width"],
    class_condition: str = "dropped",
) -> Float[Array, " times"]:
    """How far the text model without caption is from the class model without class, at each flow time.

    Root mean square of the difference of the velocities over that of the class model's, on the text model's latents
    `x_t`, already noised to their times. One time after the other, to spare memory.
    """
    table = _class_vector(class_model, class_condition)[None]
    class_model = dataclasses.replace(class_model, class_table=table, latent_shape=text_model.latent_shape)
    nothing = TextCondition(
        features=jnp.zeros((1, text_model.text_dim)),
        mask=jnp.ones(1, bool),
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
