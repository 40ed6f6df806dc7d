"""Online training through the command line: every row of the catalogue, what it costs, and what it leaves behind."""

import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from diffalign.families.base import load_family
from diffalign.generate import sample_media
from diffalign.scoring import Score
from diffalign.types import Request, Sampling

GROUPS, SAMPLES, STEPS, ROUNDS = 2, 4, 4, 2
MADE = GROUPS * SAMPLES
ROLLOUT = MADE * STEPS
FORWARD, TRAINED = 1, 3  # a backward pass counts two

ROWS: dict[str, tuple[str, dict[str, Any], int]] = {
    "d3po": ("d3po", {}, ROLLOUT + GROUPS * 2 * (TRAINED + FORWARD)),
    "ddpo": ("ddpo", {}, ROLLOUT + MADE * TRAINED),
    # the KL runs the reference; the behaviour's predictions are those of the rollout
    "flow-grpo": ("flow-grpo", {}, ROLLOUT + MADE * (TRAINED + FORWARD)),
    "flow-grpo-fast": (
        "flow-grpo",
        {"online": {"window": 2}, "method": {"draw": {"count": None}, "estimate": {"kind": "cps"}}},
        ROLLOUT + MADE * 2 * (TRAINED + FORWARD),
    ),
    "grpo-guard": ("grpo-guard", {}, ROLLOUT + MADE * TRAINED),
    "dance-grpo": ("dance-grpo", {"method": {"draw": {"count": 2}}}, ROLLOUT + MADE * 2 * TRAINED),
    "awm": ("awm", {}, ROLLOUT + MADE * 4 * (TRAINED + FORWARD)),
    # six times; the reference and the average
    "awm-released": ("awm-released", {"run": {"ema": 0.9}}, ROLLOUT + MADE * 6 * (TRAINED + 2 * FORWARD)),
    # nine times; the old policy and the reference
    "diffusion-nft": ("diffusion-nft", {}, ROLLOUT + MADE * 9 * (TRAINED + 2 * FORWARD)),
    "diffusion-dpo": ("diffusion-dpo", {}, ROLLOUT + GROUPS * 2 * (TRAINED + FORWARD)),
    "all-pairs": (
        "diffusion-dpo",
        {"online": {"credit": {"pairs": "all"}}},
        ROLLOUT + GROUPS * math.comb(SAMPLES, 2) * 2 * (TRAINED + FORWARD),
    ),
    "rank-dpo": ("rank-dpo", {}, ROLLOUT + MADE * (TRAINED + FORWARD)),
    "diffusion-kto": (
        "diffusion-kto",
        {"online": {"credit": {"threshold": 0.05}}},
        ROLLOUT + MADE * (TRAINED + FORWARD),
    ),
    "dso-dro": ("dso-dro", {}, ROLLOUT + MADE * TRAINED),
}


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def samples(model: Path, name: str, lora: Path | None) -> torch.Tensor:
    """Pictures of a loaded folder, with or without what a run wrote."""
    family = load_family(name, str(model), "cpu", None if lora is None else str(lora))
    requests = [Request("a red circle", seed) for seed in range(2)]
    return sample_media(family, requests, Sampling(steps=2))


def assert_trained(run: Path, model: Path, name: str, evaluations: int) -> list[dict[str, float]]:
    """Two rounds of one update, their cost, and a policy that is loaded again and is another one."""
    rows = metrics(run)
    assert [row["step"] for row in rows] == [1, 2]
    assert [row["evaluations"] for row in rows] == [evaluations] * ROUNDS
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
    assert not torch.equal(samples(model, name, run / "lora"), samples(model, name, None))
    return rows


@pytest.mark.parametrize("row", ROWS)
def test_two_rounds_of_every_row(cli, online, tmp_path, tiny_sd, tiny_sd3, row):
    method, changes, evaluations = ROWS[row]
    outcome = cli("train", online(method, changes))
    assert outcome.code == 0, outcome.err
    name, model = ("sd", tiny_sd) if method in ("ddpo", "d3po") else ("sd3", tiny_sd3)
    rows = assert_trained(tmp_path / "run", model, name, evaluations)
    assert all(0 < row["reward/mean"] <= row["reward/best"] for row in rows)
    assert all(row["reward/failed"] == row["reward/alike_high"] == row["reward/alike_low"] == 0 for row in rows)
    assert rows[0]["reward/mean"] != rows[1]["reward/mean"], "every round has samples of its own"
    if "ratio/log_abs" in rows[0]:
        assert rows[0]["ratio/log_abs"] < 1e-5, "one update per round is on policy"


@pytest.mark.parametrize(("method", "family"), [("diffusion-dro", "sd3"), ("diffusion-dro", "sd")])
def test_experts_beside_own_samples(cli, online, tmp_path, tiny_sd, tiny_sd3, own_pairs, method, family):
    model = {"sd": tiny_sd, "sd3": tiny_sd3}[family]
    changes = {
        "model": {"family": family, "path": str(model)},
        "data": {"records": str(own_pairs)},
        "online": {"prompts": None, "groups": 4, "samples": 1, "scorers": []},
    }
    outcome = cli("train", online(method, changes))
    assert outcome.code == 0, outcome.err
    rows = assert_trained(tmp_path / "run", model, family, 4 * STEPS + 4 * 2 * (TRAINED + FORWARD))
    assert all("reward/margin" in row for row in rows), "the expert is preferred to the sample"


@pytest.mark.parametrize(
    ("method", "trained"),
    [("ddpo", 2 * MADE * TRAINED), ("flow-grpo", 2 * MADE * (TRAINED + FORWARD))],
)
def test_guidance_in_rollout_and_training_alike(cli, online, tmp_path, method, trained):
    """Both branches cost a row each, in sampling, training, and the reference's forward; the ratio stays 1."""
    guided = {"online": {"sampling": {"guidance": 3.0}}, "method": {"estimate": {"guidance": 3.0}}}
    outcome = cli("train", online(method, guided))
    assert outcome.code == 0, outcome.err
    rows = metrics(tmp_path / "run")
    assert [row["evaluations"] for row in rows] == [2 * ROLLOUT + trained] * ROUNDS
    assert all(row["ratio/log_abs"] < 1e-5 for row in rows)


def test_several_updates_and_passes(cli, online, tmp_path):
    """A round's samples twice in four updates: the last ones are off policy, and only the first pays for sampling."""
    path = online("ddpo", {"online": {"updates": 4, "passes": 2}, "run": {"steps": 8}, "optim": {"lr": 1e-2}})
    outcome = cli("train", path)
    assert outcome.code == 0, outcome.err
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, 9))
    each = MADE // 2 * TRAINED
    assert [row["evaluations"] for row in rows] == [each + ROLLOUT, each, each, each] * 2
    assert [n for n, row in enumerate(rows) if "reward/mean" in row] == [0, 4]
    off = [row["ratio/log_abs"] for row in rows]
    assert off[0] < 1e-5 < off[1]
    assert off[4] < 1e-5 < off[7]
    assert rows[3]["ratio/above"] + rows[3]["ratio/below"] > 0


@pytest.mark.parametrize("batches", [(8, 1), (3, 2), (1, 8), (5, 3)])
def test_batches_of_rollout_and_training_differ(cli, online, tmp_path, batches):
    """Stored predictions come from another batch: their last bits differ, and that is no reason to stop."""
    path = online("flow-grpo", {"online": {"sampling": {"batch": batches[0]}}, "run": {"steps": 1}})
    outcome = cli("train", path, f"run.batch={batches[1]}")
    assert outcome.code == 0, outcome.err
    assert metrics(tmp_path / "run")[0]["ratio/log_abs"] < 1e-5


def test_the_samples_of_sa_solver(cli, online, tmp_path):
    """AWM samples with noise in the middle of the path."""
    path = online(
        "awm", {"online": {"sampling": {"sampler": "sa_solver", "steps": 6}, "tau": 0.4}, "run": {"steps": 1}}
    )
    whole, plain = tmp_path / "whole", tmp_path / "plain"
    assert cli("train", path, f"run.dir={whole}").code == 0
    assert cli("train", path, f"run.dir={plain}", "online.tau=0").code == 0
    # one network call per step, with noise or without
    assert metrics(whole)[0]["evaluations"] == metrics(plain)[0]["evaluations"] == MADE * 6 + MADE * 4 * 4
    assert metrics(whole)[0]["reward/mean"] != metrics(plain)[0]["reward/mean"]


def test_full_weights(cli, online, tmp_path, tiny_sd3):
    """Anchors, an average and a frozen reference of a network without LoRA."""
    path = online("awm-released", {"model": {"lora": None}, "run": {"ema": 0.5}})
    outcome = cli("train", path)
    assert outcome.code == 0, outcome.err
    import diffusers

    made = diffusers.SD3Transformer2DModel.from_pretrained(tmp_path / "run/transformer")
    state = load_file(tmp_path / "run/checkpoint-000002/weights.safetensors")
    name = "proj_out.weight"
    assert torch.equal(made.state_dict()[name], state[f"evaluation.{name}"]), "what is exported is the average"
    assert not torch.equal(state[f"evaluation.{name}"], state[name])
    assert not torch.equal(state[f"average.{name}"], state[f"evaluation.{name}"])


class Counting:
    """The n-th call gives every sample n times a slope: rewards that rise or fall, whatever the samples are."""

    accepts = frozenset({"image"})

    def __init__(self, slope: float) -> None:
        self.slope, self.calls = slope, 0

    def __call__(self, samples) -> list[Score]:
        self.calls += 1
        return [Score(self.slope * self.calls + 0.01 * n) for n in range(len(samples))]


@pytest.mark.parametrize("every", [1, 2, 3])
def test_an_average_stands_still_between_its_moves(cli, online, tmp_path, every):
    path = online("awm", {"run": {"ema": 0.9, "ema_every": every}})
    assert cli("train", path).code == 0
    weights = load_file(tmp_path / "run/lora/pytorch_lora_weights.safetensors")
    moved = any(weight.abs().max() > 0 for name, weight in weights.items() if "lora_B" in name)
    assert moved == (every <= 2), "of two updates"


def test_stops_and_writes_the_best(cli, online, tmp_path, monkeypatch):
    """The held-out reward falls from the start: what is written is the start, a LoRA of nothing."""
    module: Any = ModuleType("counting_scorers")
    module.build = Counting
    monkeypatch.setitem(sys.modules, "counting_scorers", module)
    scorer = {"name": "counting_scorers:build", "label": "up", "params": {"slope": 1.0}}
    other = {"name": "counting_scorers:build", "label": "down", "params": {"slope": -1.0}}
    stop = {"prompts": {"source": "shapes:heldout", "limit": 4}, "scorers": [other], "every": 2}
    changes = {"online": {"scorers": [scorer], "stop": stop}, "run": {"steps": 6, "save_every": 1}}
    outcome = cli("train", online("awm", changes))
    assert outcome.code == 0, outcome.err
    assert "stop: held-out rewards were best after 0 updates" in outcome.out
    run = tmp_path / "run"
    rows = metrics(run)
    assert [row["step"] for row in rows] == [1, 2]
    assert {row["evaluations"] for row in rows} == {ROLLOUT + MADE * 4 * (TRAINED + FORWARD)}, "looking is not counted"
    written = load_file(run / "lora/pytorch_lora_weights.safetensors")
    ups = [value for name, value in written.items() if "lora_B" in name or "lora.up" in name]
    assert ups
    assert not any(value.any() for value in ups)
    trained = load_file(run / "checkpoint-000002/weights.safetensors")
    assert any(value.any() for name, value in trained.items() if "lora_B" in name)
    lines = [json.loads(line) for line in (run / "held_out.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 2]
    assert all(line["outcomes"].keys() == {"up", "down", "trained"} for line in lines)


def test_a_rehearsal_writes_nothing(cli, online, tmp_path):
    outcome = cli("train", online("awm"), "--dry-run")
    assert outcome.code == 0, outcome.err
    assert "2 rounds of 2 prompts x 4 samples" in outcome.out
    assert "would run 2 rounds" in outcome.out
    assert not (tmp_path / "run").exists()
