"""Rematerialisation: what the backward pass keeps of a block, and what it computes again (Chen et al. 2016)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

NAMES = (
    "qkv",
    "attended",
    "attention_out",
    "cross_qkv",
    "cross_attended",
    "cross_out",
    "up",
    "down",
    "modulation",
    "statistics",
)
"""What a block names, by `checkpoint_name`: queries, keys and values; the weighted sums of values and their projection;
the same of the cross-attention; the outputs of both layers of the MLP; shifts, scales and gates; and small float32
statistics: those of norms, and sums of exponentials."""

KEPT = tuple(name for name in NAMES if name not in ("attention_out", "cross_out"))
"""By `names`. On TPUs a product of the size of the others takes no longer than to store and load its result."""
KEPT_BY_LEAN = ("attended", "cross_attended", "up", "down", "statistics")
"""By `lean`: with `model.kernels=fast` as fast as `names`, in three quarters of the memory."""

ON_HOST = "@host"
"""Follows a name whose values are moved to the host's memory until the backward pass needs them."""

POLICIES: dict[str, Callable[..., Any] | None] = {
    "none": None,
    "names": jax.checkpoint_policies.save_only_these_names(*KEPT),
    "lean": jax.checkpoint_policies.save_only_these_names(*KEPT_BY_LEAN),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}
"""The policies that have a name of their own; None keeps everything."""


def remat_policy(remat: str, names: Sequence[str] = NAMES) -> Callable[..., Any] | None:
    """The policy for `jax.checkpoint` of `model.remat`, None for none.

    Either one of `POLICIES`, or some of `names` joined by `+`, as in `qkv+attended+up@host`. Raises `ValueError` for
    anything else.
    """
    if remat in POLICIES:
        return POLICIES[remat]
    on_device = [name for name in remat.split("+") if not name.endswith(ON_HOST)]
    on_host = [name.removesuffix(ON_HOST) for name in remat.split("+") if name.endswith(ON_HOST)]
    listed = [*on_device, *on_host]
    if wrong := [name for name in listed if name not in names or listed.count(name) > 1]:
        raise ValueError(
            f"must be {', '.join(POLICIES)}, or names out of {', '.join(names)}, each once, joined by + "
            f"(each may end in {ON_HOST}), got {wrong[0]!r}"
        )
    if not on_host:
        return jax.checkpoint_policies.save_only_these_names(*on_device)
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=on_device,
        names_which_can_be_offloaded=on_host,
        offload_src="device",
        offload_dst="pinned_host",
    )
