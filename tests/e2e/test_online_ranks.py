"""Two processes that sample, score and train together do what one does."""

from pathlib import Path
from typing import Any

import pytest
import torch

from .test_online_resume import merged, metrics, weights
from .test_ranks import PLAIN, launch

SETTINGS: dict[str, Any] = {
    "online": {"groups": 4, "updates": 2},
    "optim": PLAIN,
    "run": {"steps": 4, "save_every": 2, "batch": 4},
}
EVERYWHERE = ("loss", "grad_norm", "evaluations", "reward/mean", "reward/best", "reward/spread", "reward/alike_low")
"""What is of all processes; the rest is of the one that writes."""
ROWS: dict[str, dict[str, Any]] = {
    "awm": {"online": {"credit": {"spread": "all"}, "sampling": {"batch": 4}}, "method": {"extra": []}},
    "d3po": {"online": {"credit": {"pairs": "all"}}},
}


def rows(run: Path) -> list[dict[str, float]]:
    return [{name: row[name] for name in EVERYWHERE if name in row} for row in metrics(run)]


@pytest.mark.parametrize("method", ROWS)
def test_two_processes_train_like_one(cli, online, tmp_path, method):
    """The same prompts, noise, statistics and updates; `save_every` fails unless both hold the same weights."""
    path = online(method, merged(SETTINGS, ROWS[method]))
    one, two = tmp_path / "one", tmp_path / "two"
    outcome = cli("train", path, f"run.dir={one}")
    assert outcome.code == 0, outcome.err
    launch(2, "train", path, "run.batch=2", f"run.dir={two}")
    assert len(rows(one)) == 4
    # a pixel that rounds the other way moves an advantage by a ten-thousandth
    for ours, theirs in zip(rows(two), rows(one), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)
    moved = 0.0
    for name, value in weights(two).items():
        torch.testing.assert_close(value, weights(one)[name], rtol=0, atol=1e-6)
        moved = max(moved, float(value.abs().max()) if "lora_B" in name or "lora.up" in name else 0.0)
    assert moved > 1e-4, "the weights must move, or this test shows nothing"
