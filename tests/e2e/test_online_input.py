"""What an online run refuses, in one line, before it samples anything."""

import sys
from types import ModuleType
from typing import Any

import pytest

from diffalign.scoring import Failure

STOP = {
    "prompts": {"source": "shapes:heldout", "limit": 2},
    "scorers": [{"name": "picture", "label": "brightness", "params": {"metric": "brightness"}}],
}
TWICE = {**STOP, "scorers": [{"name": "picture", "label": "contrast"}]}
DIVERSITY = [{"name": "diversity"}]
EXPERTS = {"prompts": None, "samples": 1, "scorers": []}

BEFORE: list[tuple[str, dict[str, Any], list[str]]] = [
    ("awm", {"online": {"prompts": None}}, ["online", "prompts"]),
    ("awm", {"online": {"prompts": {"source": "no.txt"}}}, ["no.txt"]),
    ("awm", {"online": {"scorers": []}}, ["online.scorers", "online.source=human"]),
    ("awm", {"online": {"reward": {"beauty": 1.0}}}, ["online.reward", "beauty"]),
    ("awm", {"online": {"updates": 3}, "run": {"steps": 4}}, ["run.steps", "online.updates=3"]),
    ("awm", {"online": {"updates": 2, "passes": 4}}, ["online.updates", "4 passes"]),
    ("awm", {"online": {"updates": 5}, "run": {"steps": 5}}, ["online.groups", "8 samples or pairs", "5 updates"]),
    ("awm", {"run": {"accumulate": 2}}, ["run.accumulate", "online.updates"]),
    ("awm", {"run": {"shard": True}, "model": {"lora": None}}, ["run.shard"]),
    ("awm", {"online": {"window": 2}}, ["online.window", "awm"]),
    ("awm", {"online": {"tau": 0.4}}, ["online.tau", "sa_solver"]),
    ("awm", {"online": {"samples": 1}}, ["online.samples", "at least 2"]),
    ("d3po", {"online": {"samples": 1}}, ["online.samples", "at least 2"]),
    ("rank-dpo", {"online": {"samples": 2}}, ["online.samples", "at least 3"]),
    ("awm", {"online": {"credit": {"pareto": True}}}, ["online.credit.pareto", "awm"]),
    ("awm", {"online": {"credit": {"pairs": "all"}}}, ["online.credit.pairs", "awm"]),
    ("awm", {"online": {"credit": {"threshold": 0.5}}}, ["online.credit.threshold", "desirable"]),
    ("diffusion-dpo", {"online": {"credit": {"spread": "none"}}}, ["online.credit.spread", "advantage"]),
    ("awm", {"online": {"credit": {"min_count": 2}}}, ["online.credit.min_count", "credit.buffer"]),
    ("awm", {"online": {"credit": {"buffer": 8}}}, ["online.credit.min_count", "8", "16"]),
    ("awm", {"online": {"credit": {"buffer": 16, "eps": 0.1}}}, ["online.credit.eps", "credit.buffer"]),
    ("awm", {"online": {"credit": {"buffer": 16}, "refill": 1}}, ["online.refill", "credit.buffer"]),
    ("awm", {"online": {"credit": {"buffer": 16}, "keep_alike": False}}, ["online.keep_alike", "credit.buffer"]),
    ("awm", {"online": {"anchors": {"average": {}}}}, ["online.anchors", "average"]),
    ("flow-grpo", {"online": {"window": 5}}, ["online.window", "0 to 3"]),
    ("flow-grpo", {"online": {"window": 2, "window_range": [2, 6]}}, ["online.window", "2 to 6", "4 steps"]),
    ("flow-grpo", {"online": {"window_range": [0, 2]}}, ["online.window_range", "online.window"]),
    ("flow-grpo", {"online": {"sampling": {"guidance": 3.0}}}, ["online.sampling.guidance 3", "method.estimate"]),
    ("ddpo", {"method": {"estimate": {"guidance": 3.0}}}, ["online.sampling.guidance 1", "guidance 3"]),
    ("awm", {"online": {"sampling": {"sampler": "heun"}}}, ["sampling.sampler", "heun"]),
    ("awm", {"online": {"scorers": DIVERSITY}}, ["diversity", "all samples of a prompt"]),
    ("awm", {"online": {"stop": TWICE}}, ["online.stop", "contrast"]),
    ("awm", {"online": {"stop": {**STOP, "scorers": DIVERSITY}}}, ["diversity", "all samples of a prompt"]),
    ("awm", {"data": {"records": "x.jsonl"}}, ["awm", "remove `data`"]),
    ("diffusion-dro", {}, ["diffusion-dro", "`data`"]),
    ("text-dpo", {}, ["text-dpo", "text"]),
]


@pytest.mark.parametrize(("method", "changes", "names"), BEFORE, ids=[f"{m}-{n[0]}-{n[-1]}" for m, _, n in BEFORE])
def test_refused(refused, online, tmp_path, method, changes, names):
    refused("train", online(method, changes), names=names)
    assert not (tmp_path / "run").exists(), "nothing is written"


@pytest.mark.parametrize(
    ("data", "changes", "names"),
    [
        ({"size": [16, 16]}, EXPERTS, ["data", "the size of online.sampling"]),
        ({"bank": 2}, EXPERTS, ["data", "bank"]),
        ({}, {**EXPERTS, "samples": 2}, ["online.samples", "one sample per expert"]),
        ({}, {**EXPERTS, "prompts": {"source": "shapes:train"}}, ["online.prompts", "`data`"]),
        ({}, {**EXPERTS, "window": 2}, ["online.window", "diffusion-dro"]),
        ({}, {**EXPERTS, "stop": STOP}, ["online.stop"]),
        ({}, {**EXPERTS, "refill": 1}, ["online.refill", "diffusion-dro"]),
    ],
)
def test_experts_refused(refused, online, own_pairs, data, changes, names):
    path = online("diffusion-dro", {"data": {"records": str(own_pairs), **data}, "online": changes})
    refused("train", path, names=names)


def test_a_step_of_another_schedule(refused, online, tiny_sd, tiny_sd3):
    for method, family, folder in (("ddpo", "sd3", tiny_sd3), ("flow-grpo", "sd", tiny_sd)):
        path = online(method, {"model": {"family": family, "path": str(folder)}})
        refused("train", path, names=["transition", "does not fit the schedule"])
    solver = {"sampler": "sa_solver"}
    path = online("awm", {"model": {"family": "sd", "path": str(tiny_sd)}, "online": {"sampling": solver}})
    refused("train", path, names=["sa_solver", "flow models"])


class Failing:
    accepts = frozenset({"image"})

    def __call__(self, samples) -> list[Failure]:
        return [Failure("remote", "nobody there")] * len(samples)


def test_scorers_that_always_fail(refused, online, monkeypatch):
    module: Any = ModuleType("failing_scorers")
    module.build = Failing
    monkeypatch.setitem(sys.modules, "failing_scorers", module)
    failing = [{"name": "failing_scorers:build", "label": "far"}]
    path = online("awm", {"online": {"stop": {**STOP, "scorers": failing}}})
    refused("train", path, names=["online.stop", "far", "none of the 2 held-out samples"])
    path = online("awm", {"online": {"scorers": failing}})
    refused("train", path, "run.dir=" + str(path.parent / "other"), names=["8 of 8 scores", "remote: nobody there"])


def test_neither_records_nor_samples(refused, config):
    import yaml

    path = config("train")
    settings = yaml.safe_load(path.read_text())
    del settings["data"]
    path.write_text(yaml.safe_dump(settings))
    refused("train", path, names=["`data`", "`online`"])
    settings["online"] = {"groups": 0, "samples": 2}
    path.write_text(yaml.safe_dump(settings))
    refused("train", path, names=["online.groups"])
