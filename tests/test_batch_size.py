"""Steps to a loss by batch size: the best learning rates and the fit of the critical batch size."""

from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import batch_size
from benchmarks.batch_size import Trial, best_trials, fitted, page
from flowdit.reporting.metrics import Curve, Metrics


def trial(batch: int, rate: float, factor: float = 1.0) -> Trial:
    """Steps by the law with 1,000 steps at least and a critical batch of 64."""
    return Trial(batch, rate, 0.5, factor * 1000 * (1 + 64 / batch))


def test_the_law_is_found_in_the_best_runs():
    trials = [
        trial(batch, rate, 1 + abs(i - 1)) for batch in (16, 64, 256) for i, rate in enumerate((1e-3, 2e-3, 4e-3))
    ]
    assert [one.rate for one in best_trials(trials)] == [2e-3] * 3
    fit = fitted(best_trials(trials))
    assert fit is not None and (fit.fewest, fit.critical) == (pytest.approx(1000), pytest.approx(64))
    text = page(trials, 0.6, "validation/loss")
    assert "| 64 | 0.002 | 2,000 | 128,000 | 2,000 | 4,000 | 2,000 | 4,000 |" in text
    assert "outside" not in text and "at an end" not in text


def test_what_is_not_known_is_said():
    trials = [trial(16, 1e-3), Trial(32, 1e-3, 0.9, None), trial(1024, 1e-3), trial(2048, 2e-3)]
    text = page(trials, 0.6, "loss")
    assert "| 32 | – | not reached | not reached |" in text and "at an end" in text
    assert fitted([trial(16, 1e-3), trial(32, 1e-3)]) is None
    assert fitted([Trial(batch, 1e-3, 0.5, steps) for batch, steps in ((16, 10), (32, 20), (64, 30))]) is None


def test_runs_are_read_and_their_chart_is_written(tmp_path, monkeypatch):
    def run(batch: int, lowest: float):
        values = np.linspace(2.0, lowest, 11)
        curve = Curve(np.arange(0, 110, 10), values)
        config = SimpleNamespace(train=SimpleNamespace(batch_size=batch), optim=SimpleNamespace(learning_rate=1e-3))
        metrics = Metrics({"validation/loss": curve}, [], curve, 0)
        return SimpleNamespace(folder=f"b{batch}", metrics=metrics, meta=SimpleNamespace(config=config))

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").touch()
    monkeypatch.setattr(batch_size, "read_runs", lambda first, others: [run(8, 1.0), run(16, 0.5)])
    text = batch_size.measure(str(tmp_path))
    assert "validation/loss 1.0000" in text and "| 8 | 0.001 | 100 | 800 |" in text and "| 16 | 0.001 | 67 |" in text
    assert (tmp_path / "batch_size.svg").read_text().startswith("<svg")
    assert (tmp_path / "batch_size.md").read_text() == text + "\n"
    assert "| 8 | – | not reached |" in batch_size.measure(str(tmp_path), "target=0.8")


@pytest.mark.parametrize("arguments", [[], ["{folder}"], ["{folder}", "aim=3"], ["{folder}", "target"]])
def test_wrong_arguments_are_one_line(tmp_path, arguments):
    with pytest.raises(ValueError, match="batch_size: must be a folder"):
        batch_size.check([argument.format(folder=tmp_path) for argument in arguments])
