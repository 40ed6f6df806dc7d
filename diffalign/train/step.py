"""One step of any method on one batch: draw -> estimate -> objective, plus the metrics every method reports."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from diffalign.registry import find_objective
from diffalign.types import Batch, DiffusionFamily, Labels, LogProbs, Method, Term, Weights


class TermLoss(NamedTuple):
    """A term's part of the loss, unreduced across micro-steps and ranks: the loss is ``factor * sum / weight``."""

    total: Tensor
    """``sum(w v)`` of this batch, a scalar with graph."""
    weight: Tensor
    """``sum(w)`` of this batch."""
    factor: float


class StepResult(NamedTuple):
    """What :func:`loss_step` returns."""

    terms: tuple[TermLoss, ...]
    metrics: dict[str, float]
    log_probs: LogProbs
    """Of the main term, for checks."""

    @property
    def loss(self) -> Tensor:
        """The loss of this batch alone."""
        return torch.stack([t.factor * t.total / t.weight.clamp_min(1e-30) for t in self.terms]).sum()


def _run_term(
    term: Term,
    family: DiffusionFamily,
    weights: Weights,
    batch: Batch,
    generator: torch.Generator,
    autocast: Callable[[], AbstractContextManager],
) -> tuple[TermLoss, LogProbs]:
    objective = find_objective(term.objective)
    draw = term.draw(family, weights, batch, generator)
    lp = term.estimate(family, weights, batch, draw, objective.roles, autocast)
    loss = objective(lp, batch.labels, **term.params)
    return TermLoss((loss.weight * loss.value).sum(), loss.weight.sum().detach(), term.weight), lp


@torch.no_grad()
def preference_metrics(lp: LogProbs, labels: Labels, beta: float) -> dict[str, float]:
    """The metrics of DPO-like training, the same names for every method. Implicit accuracy counts ties one half."""
    present = lp.mask.sum(-1) > 0
    metrics = {"err/policy": (-lp.mean() / lp.scale)[present].mean().item()}
    if lp.gap is not None:
        metrics["gap"] = lp.gap[present].mean().item()
    if "reference" not in lp.by_role:
        return metrics
    metrics["err/reference"] = (-lp.mean("reference") / lp.scale)[present].mean().item()
    reward = labels.get("reward")
    if reward is None or reward.ndim != 2 or reward.shape[1] < 2:
        return metrics
    best = reward.masked_fill(~present, -torch.inf).argmax(1, keepdim=True)
    worst = reward.masked_fill(~present, torch.inf).argmin(1, keepdim=True)
    distinct = (reward.gather(1, best) > reward.gather(1, worst))[:, 0]
    if not distinct.any():
        return metrics
    drift = (lp.mean("reference") - lp.mean()) / lp.scale
    implicit = beta * lp.ratio()
    chosen, rejected = (implicit.gather(1, index)[distinct, 0] for index in (best, worst))
    margin = chosen - rejected
    return {
        **metrics,
        "reward/chosen": chosen.mean().item(),
        "reward/rejected": rejected.mean().item(),
        "reward/margin": margin.mean().item(),
        "reward/accuracy": (0.5 * (1 + margin.sign())).mean().item(),
        "drift/chosen": drift.gather(1, best)[distinct, 0].mean().item(),
        "drift/rejected": drift.gather(1, worst)[distinct, 0].mean().item(),
    }


def loss_step(
    method: Method,
    family: DiffusionFamily,
    weights: Weights,
    batch: Batch,
    generator: torch.Generator,
    *,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> StepResult:
    """The loss of one batch under a method.

    Args:
        method: a row of the catalogue, resolved.
        batch: on the family's device.
        generator: all randomness of the step.
        autocast: makes the precision context that every role runs in.
    """
    main, lp = _run_term(method.main, family, weights, batch, generator, autocast)
    extra = [_run_term(term, family, weights, batch, generator, autocast)[0] for term in method.extra]
    result = StepResult((main, *extra), {}, lp)
    beta = float(method.main.params.get("beta", 1.0))
    metrics = {"loss": result.loss.item(), **preference_metrics(lp, batch.labels, beta)}
    return result._replace(metrics=metrics)
