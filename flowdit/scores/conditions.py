"""What the scored images show: classes or prompts of as many images as are drawn.

The condition of an image depends on the seed and its number only, as its noise does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, Real

from flowdit.conditioning import Requests
from flowdit.config import as_list
from flowdit.fields import FieldError, require
from flowdit.hashing import fingerprint

DATA = "data"
BALANCED = "balanced"


class Asked(NamedTuple):
    """Requests for the images, in words how they were chosen, and an identity of the choice.

    `prompts` are those of a text model.
    """

    requests: Requests
    choice: str
    identity: str
    prompts: list[str] | None = None


def draw_labels(frequencies: Real[np.ndarray, " classes"], count: int, seed: int) -> Int[np.ndarray, " count"]:
    """`count` classes with these relative frequencies; those of fewer images are the first ones of more."""
    upto = np.cumsum(np.asarray(frequencies, np.float64))
    drawn = np.random.default_rng([seed, 0x6C6162]).random(count) * upto[-1]
    return np.searchsorted(upto, drawn, side="right").astype(np.int64)


def ask_for_classes(
    make: Callable[..., Requests],
    labels: Any,
    count: int,
    num_classes: int,
    seed: int,
    counted: Callable[[], np.ndarray],
) -> Asked:
    """Requests for `count` images of a class model. `counted` returns how often each class occurs in the data.

    `labels` is `data`, `balanced`, or classes by number or name, which are repeated. Raises `FieldError`.
    """
    if labels == DATA:
        values, choice = draw_labels(counted(), count, seed).tolist(), "classes with the frequencies of the data"
    elif labels == BALANCED:
        values, choice = [i % num_classes for i in range(count)], "as many images of each class"
    else:
        given = as_list(labels)
        require("labels", labels, bool(given), "must be data, balanced, or at least one class")
        assert given is not None
        values, choice = [given[i % len(given)] for i in range(count)], f"{len(given)} given classes"
    requests = make(1, labels=values)
    return Asked(requests, choice, fingerprint("\n".join(requests.captions)))


def ask_for_prompts(
    make: Callable[..., Requests], prompts: Any, negative: str, count: int, seed: int, captions: list[str] | None
) -> Asked:
    """Requests for `count` images of a text model. `captions` are those of the reference, None if it has none.

    `prompts` is `data`, or the prompts, which are repeated. Raises `FieldError`.
    """
    if prompts == DATA:
        if not captions:
            raise FieldError("prompts", "must be given, as the reference has no captions (prompts or prompts_file)")
        order = np.random.default_rng([seed, 0x70726F]).permutation(len(captions))
        chosen, choice = [captions[i] for i in order], f"{len(captions)} captions of the reference"
    else:
        given = as_list(prompts)
        require("prompts", prompts, bool(given), "must be data, or at least one prompt")
        assert given is not None
        chosen, choice = [str(prompt) for prompt in given], f"{len(given)} given prompts"
    values = [chosen[i % len(chosen)] for i in range(count)]
    requests = make(1, prompts=values, negative_prompt=negative)
    return Asked(requests, choice, fingerprint("\n".join([*values, negative])), values)
