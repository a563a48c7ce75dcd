"""`train.scores`: scores of samples during a run."""

import json
import shutil

import equinox as eqx
import jax.numpy as jnp
import pytest
from runs import train_here

from flowdit import features
from flowdit.features.base import Extracted, FeatureNetwork


class Means(eqx.Module):
    """Mean colours."""

    def __call__(self, images) -> Extracted:
        return Extracted(images.astype(jnp.float32).mean(axis=(1, 2)), None)


SETTINGS = ("train.scores.every=2", "train.scores.num_images=12", "train.scores.reference_split=all")
SCORES = ("scores/fd_efficientnet", "scores/kid_efficientnet")


@pytest.fixture(autouse=True)
def mean_colours(monkeypatch):
    network = FeatureNetwork("efficientnet", Means(), 3, "means, float32")
    monkeypatch.setitem(features.LOADERS, "efficientnet", lambda weights: network)


def scored(run) -> dict[int, dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: {name: line[name] for name in SCORES} for line in lines if SCORES[0] in line}


def test_a_run_logs_scores_and_a_resumed_one_the_same(tiny_data, tmp_path):
    settings = (
        *SETTINGS,
        "train.scores.metrics=[fd,kid]",
        "train.keep_best=fd",
        f"train.scores.cache={tmp_path / 'cache'}",
    )
    whole = train_here(tiny_data, tmp_path / "whole", *settings)
    assert whole.status == 0, whole.err
    assert "scores of 12 images: Frechet distance " in whole.out and "(real images " in whole.out
    found = scored(tmp_path / "whole")
    assert sorted(found) == [2, 4, 6] and found[2] != found[4]
    best = json.loads((tmp_path / "whole" / "best.json").read_text())
    lowest = min(found, key=lambda step: found[step][SCORES[0]])
    assert (best["metric"], best["step"], best["value"]) == (SCORES[0], lowest, found[lowest][SCORES[0]])
    cut = shutil.copytree(
        tmp_path / "whole", tmp_path / "cut", ignore=shutil.ignore_patterns("4", "6", "metrics.jsonl")
    )
    resumed = train_here(tiny_data, cut, *settings, "train.is_restore=true")
    assert resumed.status == 0, resumed.err
    again = scored(cut)
    assert again.keys() >= {4, 6} and again == {step: found[step] for step in again}


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ("train.scores.every=-1", "train.scores.every: must be 0 (never) or more, got -1"),
        ("train.scores.metrics=fid", "train.scores.metrics: must be one of fd, kid"),
        ("train.scores.features=vgg", "train.scores.features: must be one of efficientnet"),
        ("train.scores.num_images=9", "train.scores.num_images: must be at least 10 for kid, got 9"),
        ("train.scores.reference=nowhere", "train.scores.reference: must be images as prepare reads them"),
    ],
)
def test_a_mistake_is_one_line_before_the_first_step(tiny_data, tmp_path, settings, error):
    done = train_here(tiny_data, tmp_path / "run", *SETTINGS, settings)
    assert done.status == 2 and done.err.startswith(f"error: {error}"), done.err
    assert done.err.count("\n") == 1 and not (tmp_path / "run").exists()
