"""A run whose loss fails goes back to its last good checkpoint, if it was told to."""

import json
import math

import pytest
import torch

from diffalign.train import core

SETTINGS = {"run": {"steps": 8, "save_every": 2, "keep": 9}}


@pytest.fixture
def failing(monkeypatch):
    """Spoils the loss of the 6th step, the first so many times that it is reached."""
    left = [0]
    real = core.loss_step
    calls = [0]

    def spoiled(*args, **kwargs):
        result = real(*args, **kwargs)
        calls[0] += 1
        if left[0] and calls[0] == 6:
            left[0] -= 1
            calls[0] = 4 - 1 if left[0] else 99  # back at step 4 after the rollback, one call earlier each time
            terms = tuple(term._replace(total=term.total * math.nan) for term in result.terms)
            return result._replace(terms=terms)
        return result

    monkeypatch.setattr(core, "loss_step", spoiled)
    return left


def rows(run) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_back_to_the_last_good_checkpoint_with_half_the_rate(cli, config, tmp_path, failing):
    failing[0] = 1
    outcome = cli("train", config("train", SETTINGS), "run.rollback=1")
    assert outcome.code == 0, outcome.err
    assert "step 6: loss nan" in outcome.out
    assert "back to step 4 with half the learning rate (1 of 1)" in outcome.out
    found = rows(tmp_path / "run")
    assert [row["step"] for row in found] == list(range(1, 9))
    assert [row["lr"] for row in found] == [1e-3] * 4 + [5e-4] * 4
    assert all(math.isfinite(row["loss"]) for row in found)
    state = torch.load(tmp_path / "run/checkpoint-000008/state.pt", weights_only=True)
    assert state["rollbacks"] == 1


def test_without_leave_or_too_often_it_stops(refused, config, failing):
    failing[0] = 1
    message = refused("train", config("train", SETTINGS), names=["step 6: loss nan", "checkpoint-000004"])
    assert "lower optim.lr and resume from the last good checkpoint" in message


def test_a_rolled_back_run_resumes_to_the_bit(cli, config, tmp_path, failing):
    """The halved rate and the changed noise are part of its state."""
    failing[0] = 1
    path = config("train", SETTINGS)
    assert cli("train", path, "run.rollback=1").code == 0
    whole = rows(tmp_path / "run")
    for gone in ("checkpoint-000008", "lora"):
        (tmp_path / "run" / gone).rename(tmp_path / gone)
    assert cli("train", path, "run.rollback=1", "--resume", "latest").code == 0
    again = rows(tmp_path / "run")
    assert [(row["loss"], row["lr"]) for row in again] == [(row["loss"], row["lr"]) for row in whole]
