"""Time of forward + backward of every objective on [64, K, 1024] log-probs, against trl's own code where it has one.

    python benchmarks/objectives.py                # one thread; takes a minute

trl's losses live inside its trainers and log metrics as they go, so those of ``DPOTrainer`` and ``KTOTrainer`` are
compared with our objective plus the metrics that every step of ours logs. Its CPO and ORPO losses are plain functions
and are compared with the objective alone. Both sides are run in turn, and the ratio is that of the medians.
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from _results import machine, write_section
from torch import Tensor

from diffalign.registry import OBJECTIVES
from diffalign.train.step import preference_metrics
from diffalign.types import LogProbs

ROOT = Path(__file__).parents[1]
B, U, ROUNDS = 64, 1024, 41


def load(path: str) -> ModuleType:
    """A helper module of the tests."""
    name = Path(path).stem
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


cases, trl = load("tests/property/registry_cases.py"), load("tests/crosscheck/trl_losses.py")


def seconds(*runs: Callable[[], Tensor]) -> list[float]:
    """Median seconds of forward + backward of each, run in turn."""
    taken: list[list[float]] = [[] for _ in runs]
    for number in range(ROUNDS + 3):
        for run, times in zip(runs, taken, strict=True):
            start = time.perf_counter()
            run().backward()
            if number >= 3:  # after warming up
                times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in taken]


def objective_run(name: str, metrics: bool = False, **params: Any) -> Callable[[], Tensor]:
    """Forward of a registered objective on fixed float32 log-probs; each call starts from fresh leaves."""
    case = cases.example(name, b=B, u=U, **params).to(torch.float32)
    rewards = {"reward": torch.tensor([[1.0, 0.0]]).expand(B, 2)} if case.objective.k == 2 else {}
    labels = {**case.labels, **rewards}

    def run() -> Tensor:
        leaves = {key: value.detach().requires_grad_() for key, value in case.extra.items()}
        gap = {key: value.detach().requires_grad_() for key, value in case.gap.items()}
        policy = case.by_role["policy"].detach().requires_grad_()
        lp = LogProbs({**case.by_role, "policy": policy}, case.mask, gap, extra=leaves)
        losses = case.objective(lp, labels, **case.params)
        if metrics:
            preference_metrics(lp, labels, 0.1)
        return torch.stack([loss.reduce() for loss in losses]).sum()

    return run


def pair() -> tuple[Tensor, Tensor, Tensor]:
    """Policy, reference and mask (B, 2, U) in float32."""
    case = cases.example("sigmoid", b=B, u=U).to(torch.float32)
    return case.by_role["policy"], case.by_role["reference"], case.mask


def dpo_run(loss_type: str, **settings: Any) -> Callable[[], Tensor]:
    """Forward of ``DPOTrainer``'s loss."""
    policy, reference, mask = pair()
    return lambda: trl.dpo(loss_type, policy.detach().requires_grad_(), reference, mask, **settings)


def mean_run(loss: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
    """Forward of a loss of trl that takes mean log-probs (B, 2), the masked mean included."""
    policy, _, mask = pair()

    def run() -> Tensor:
        leaf = policy.detach().requires_grad_()
        return loss((leaf * mask).sum(-1) / mask.sum(-1))

    return run


def kto_run() -> Callable[[], Tensor]:
    """Forward of ``KTOTrainer``'s loss on (B K, U) token log-probs."""
    case = cases.example("kto", b=B, u=U).to(torch.float32)
    policy, reference = (case.by_role[role].flatten(0, 1) for role in ("policy", "reference"))
    mask, label, mismatched = case.mask.flatten(0, 1), case.labels["desirable"].flatten(), torch.zeros(len(policy))

    def run() -> Tensor:
        leaf = policy.detach().requires_grad_()
        return trl.kto(leaf, reference, mask, label, mismatched, beta=0.5, weights=(1.0, 1.0))

    return run


COMPARED: dict[str, tuple[dict[str, Any], bool, Callable[[], Tensor]]] = {
    "sigmoid": ({}, True, dpo_run("sigmoid", beta=0.5)),
    "hinge": ({}, True, dpo_run("hinge", beta=0.5)),
    "ipo": ({}, True, dpo_run("ipo", beta=0.1)),
    "robust": ({}, True, dpo_run("robust", beta=0.5, label_smoothing=0.1)),
    "exo_pair": ({}, True, dpo_run("exo_pair", beta=0.5, label_smoothing=1e-3)),
    "nca_pair": ({}, True, dpo_run("nca_pair", beta=0.5)),
    "bco_pair": ({}, True, dpo_run("bco_pair", beta=0.5)),
    "apo_zero": ({}, True, dpo_run("apo_zero", beta=0.5)),
    "apo_down": ({}, True, dpo_run("apo_down", beta=0.5)),
    "discopop": ({}, True, dpo_run("discopop", beta=0.5)),
    "sft": ({}, True, dpo_run("sft", beta=0.5)),
    "sppo": ({"variant": "hard"}, True, dpo_run("sppo_hard", beta=0.001)),
    "kto": ({}, True, kto_run()),
    "simpo": ({}, False, mean_run(lambda mean: trl.cpo("simpo", mean, beta=2.0, gamma=0.5).mean())),
    "orpo": ({}, False, mean_run(lambda mean: (-mean[:, 0] - trl.orpo_ratio(mean, beta=0.5)).mean())),
}
"""Ours, whether metrics are included on both sides, and trl's."""


def main() -> None:
    """Measure and write the section."""
    torch.set_num_threads(1)
    lines = ["| objective | ms | with metrics | trl | ratio |", "|---|---:|---:|---:|---:|"]
    worst = 0.0
    for name in sorted(OBJECTIVES):
        params, metrics, theirs = COMPARED.get(name, ({}, False, None))
        if theirs is None:
            [alone] = seconds(objective_run(name))
            lines.append(f"| {name} | {1e3 * alone:.2f} | | | |")
            continue
        alone, logged, other = seconds(objective_run(name, **params), objective_run(name, True, **params), theirs)
        mine = logged if metrics else alone
        worst = max(worst, mine / other)
        with_metrics = f"{1e3 * logged:.2f}" if metrics else ""
        lines.append(f"| {name} | {1e3 * alone:.2f} | {with_metrics} | {1e3 * other:.2f} | {mine / other:.2f} |")
        print(lines[-1], flush=True)
    from importlib.metadata import version

    intro = (
        f"`python benchmarks/objectives.py`, {machine()}, trl {version('trl')}; one thread, float32, [{B}, K, {U}] "
        f"log-probs, K = 2 for pairs and 3 for lists, median of {ROUNDS} runs in turn. The DPO and KTO trainers of trl "
        "log metrics inside their loss, so there the ratio is ours with our metrics to theirs with theirs; CPO "
        f"(simpo) and ORPO are plain functions. Largest ratio: {worst:.2f} (the aim was 1.0)."
    )
    write_section("Objectives", f"{intro}\n\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
