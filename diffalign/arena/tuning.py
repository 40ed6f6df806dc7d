"""The learning rate of an entry, chosen by trials on training prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from diffalign import comparison
from diffalign.arena import cell
from diffalign.arena.plan import Plan
from diffalign.arena.results import Trial


class Tuned(NamedTuple):
    """The learning rates that were tried, and what cells train with: of the best one, the middle one if all failed."""

    trials: list[Trial]
    rate: float


def tuned(plans: Sequence[Plan]) -> Tuned:
    """The judge's means on training prompts, of the samples that it could judge in every trial."""
    label = plans[0].config.evaluate.judge.key
    found = {plan.lr: cell.read(plan.result)[0][-1].outcomes[label] for plan in plans if plan.result.is_file()}
    found = {lr: one for lr, one in found.items() if comparison.is_judged(one)}
    kept = comparison.common(*found.values())[0] if found else []
    scores = {lr: comparison.means(one)["overall"] for lr, one in zip(found, kept, strict=True)}
    trials = [Trial(learning_rate=plan.lr, score=scores.get(plan.lr)) for plan in plans]
    best = max(scores, key=lambda lr: scores[lr]) if scores else plans[len(plans) // 2].lr
    return Tuned(trials, best * plans[0].config.tuning.scale)
