"""An online run that is killed, fails or goes on elsewhere ends exactly where an undisturbed one does."""

import json
import math
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from diffalign.train import core

STEPS, EVERY = 8, 4  # four rounds of two updates; a checkpoint after every second round
SETTINGS: dict[str, Any] = {
    "online": {"updates": 2, "sampling": {"batch": 4}},
    "run": {"steps": STEPS, "save_every": EVERY, "batch": 2, "keep": 9},
}
BUFFER = {"online": {"credit": {"buffer": 6, "min_count": 2}}}
KILLED = """
import os, signal
from diffalign.train import core, feedback, rollout

def dies(owner, name, count):
    real, left = getattr(owner, name), [count]
    def call(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    setattr(owner, name, call)

dies({owner}, {name!r}, {count})
"""
"""The process dies at that call: two batches of a rollout and of scores in a round, four micro-steps."""
IN_ROLLOUT, IN_SCORING, IN_UPDATE = ("rollout.Roller", "_chunk"), ("feedback.Scorers", "_score"), ("core", "micro_step")


def merged(*changes: dict[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for change in changes:
        for key, value in change.items():
            out[key] = merged(out[key], value) if isinstance(out.get(key), dict) else value
    return out


def metrics(run: Path) -> list[dict[str, float]]:
    """What was logged, without what a clock says."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in row if not key.startswith(("seconds", "cpu", "memory"))} for row in rows]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "lora/pytorch_lora_weights.safetensors")


def remembered(run: Path) -> dict[str, Any]:
    return torch.load(run / f"checkpoint-{STEPS:06d}/state.pt", weights_only=True)["extra"]


def assert_same(run: Path, whole: Path) -> None:
    assert metrics(run) == metrics(whole)
    assert [row["step"] for row in metrics(run)] == list(range(1, STEPS + 1))
    assert weights(run).keys() == weights(whole).keys()
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(run).items())
    last = f"checkpoint-{STEPS:06d}/weights.safetensors"
    assert (run / last).read_bytes() == (whole / last).read_bytes(), "anchors and averages, too"
    assert remembered(run) == remembered(whole)


@pytest.mark.parametrize(
    ("method", "changes", "kills"),
    [
        ("ddpo", BUFFER, [(IN_ROLLOUT, 7), (IN_SCORING, 2), (IN_UPDATE, 6)]),
        ("awm-released", {"run": {"ema": 0.9}}, [(IN_SCORING, 8), (IN_UPDATE, 3)]),
        ("diffusion-nft", {}, [(IN_ROLLOUT, 8)]),
    ],
)
def test_a_killed_run_ends_bit_identical(cli, online, warm, tmp_path, method, changes, kills):
    path = online(method, merged(SETTINGS, changes))
    whole, run = tmp_path / "whole", tmp_path / "run"
    outcome = cli("train", path, f"run.dir={whole}")
    assert outcome.code == 0, outcome.err
    for (owner, name), count in kills:
        code, err = warm.run("train", path, "--resume=latest", first=KILLED.format(owner=owner, name=name, count=count))
        assert code == -signal.SIGKILL, err
        assert not (run / "lora").exists()
    assert (run / f"checkpoint-{EVERY:06d}").is_dir(), "killed too early, or this test shows nothing"
    assert cli("train", path, "--resume", "latest").code == 0
    assert_same(run, whole)
    if changes is BUFFER:
        assert all(len(kept) <= 6 for kept in remembered(whole)["buffer"].values())
        assert sum(map(len, remembered(whole)["buffer"].values())) > 6


def test_a_checkpoint_of_another_folder_brings_its_tracker(cli, online, tmp_path):
    path = online("ddpo", merged(SETTINGS, BUFFER))
    whole, other = tmp_path / "whole", tmp_path / "other"
    assert cli("train", path, f"run.dir={whole}").code == 0
    moved = shutil.copytree(whole / f"checkpoint-{EVERY:06d}", tmp_path / "moved")
    assert cli("train", path, f"run.dir={other}", "--resume", moved).code == 0
    assert metrics(other) == metrics(whole)[EVERY:]
    assert remembered(other) == remembered(whole)
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(other).items())


def test_a_checkpoint_within_a_round_is_refused(cli, refused, online):
    path = online("ddpo", SETTINGS)
    assert cli("train", path, "run.steps=6", "run.save_every=2").code == 0
    refused("train", path, "online.updates=4", "--resume=latest", names=["run.resume", "step 6", "online.updates=4"])


HELD_OUT = {
    "prompts": {"source": "shapes:heldout", "limit": 4},
    "scorers": [{"name": "picture", "label": "brightness", "params": {"metric": "brightness"}}],
    "every": 1,
}


@pytest.fixture
def failing(monkeypatch):
    """Spoils the loss of a micro-step once."""
    real, left = core.loss_step, [0]

    def spoiled(*args, **kwargs):
        result = real(*args, **kwargs)
        left[0] -= 1
        if left[0] == 0:
            return result._replace(terms=tuple(term._replace(total=term.total * math.nan) for term in result.terms))
        return result

    monkeypatch.setattr(core, "loss_step", spoiled)
    return left


def test_back_to_the_last_good_round(cli, online, tmp_path, failing):
    """The tracker and the held-out measurements go back, too; then the rewards are others, at half the rate."""
    stop = {"online": {"stop": HELD_OUT}, "run": {"rollback": 1, "save_every": 2}}
    path = online("ddpo", merged(SETTINGS, BUFFER, stop))
    failing[0] = 4 * 3 + 1  # the first update of the last round
    run = tmp_path / "run"
    outcome = cli("train", path)
    assert outcome.code == 0, outcome.err
    assert "back to step 4 with half the learning rate" in outcome.out
    rows = metrics(run)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["lr"] for row in rows] == [1e-3] * 4 + [5e-4] * 4
    lines = [json.loads(line) for line in (run / "held_out.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 2, 4, 6, 8], "measured in order, each once"
    total = sum(map(len, remembered(run)["buffer"].values()))
    assert total <= 8 * STEPS // 2, "what the failed round taught is forgotten"
    # the whole state of that rollback is in the checkpoint: it goes on from there alike
    whole = rows
    shutil.rmtree(run / f"checkpoint-{STEPS:06d}")
    shutil.rmtree(run / "lora")
    assert cli("train", path, "--resume", "latest").code == 0
    assert metrics(run) == whole
