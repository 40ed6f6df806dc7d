"""One step of any method on one batch: draw -> estimate -> shaping -> objective, and the metrics of every method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from diffalign.methods import needs
from diffalign.randomness import Generator
from diffalign.registry import find_objective, find_shaping
from diffalign.types import Batch, Family, Labels, LogProbs, Method, Term, Weights

Autocast = Callable[[], AbstractContextManager]
WorldMean = Callable[[Tensor], Tensor]


class TermLoss(NamedTuple):
    """A part of the loss, unreduced across micro-steps and ranks: the loss is ``factor * total / weight``."""

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


def term_losses(term: Term, lp: LogProbs, labels: Labels) -> tuple[TermLoss, ...]:
    """A term's parts on given log-probs: shaping, then the objective, then sums over the batch."""
    for name, params in term.shaping:
        lp = find_shaping(name)(lp, labels, **params)
    losses = find_objective(term.objective)(lp, labels, **term.params)
    sums = ((loss.weight.detach(), loss.value) for loss in losses)
    return tuple(TermLoss((weight * value).sum(), weight.sum(), term.weight) for weight, value in sums)


def _estimate(
    terms: Sequence[Term],
    family: Family,
    weights: Weights,
    batch: Batch,
    generator: Generator,
    autocast: Autocast,
    world_mean: WorldMean,
) -> LogProbs:
    """The log-probs that the first term draws and estimates, with every role that any of the terms reads."""
    draw, estimate = terms[0].draw, terms[0].estimate
    assert draw is not None
    assert estimate is not None
    with autocast():  # a draw that runs the network runs it as the roles do
        drawn = draw(family, weights, batch, generator)
    return replace(estimate(family, weights, batch, drawn, needs(*terms).roles, autocast), world_mean=world_mean)


@torch.no_grad()
def preference_metrics(lp: LogProbs, labels: Labels, beta: float) -> dict[str, float]:
    """The metrics of DPO-like training, the same names for every method. Implicit accuracy counts ties one half."""
    present = lp.exists > 0
    metrics = {"err/policy": (-lp.mean() / lp.scale)[present].mean().item()}
    if "reference" in lp.gap:
        gap = lp.counted(lp.gap["reference"]).sum(-1) / lp.lengths
        metrics["gap"] = gap[present].mean().item()
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
    total = lp.sum()
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
        "logp/chosen": total.gather(1, best)[distinct, 0].mean().item(),
        "logp/rejected": total.gather(1, worst)[distinct, 0].mean().item(),
        "drift/chosen": drift.gather(1, best)[distinct, 0].mean().item(),
        "drift/rejected": drift.gather(1, worst)[distinct, 0].mean().item(),
    }


def loss_step(
    method: Method,
    family: Family,
    weights: Weights,
    batch: Batch,
    generator: Generator,
    *,
    autocast: Autocast = nullcontext,
    world_mean: WorldMean = torch.mean,
) -> StepResult:
    """The loss of one batch under a method.

    Args:
        method: a row of the catalogue, resolved.
        batch: on the family's device.
        generator: all randomness of the step.
        autocast: makes the precision context that every role runs in.
        world_mean: mean of a detached tensor over all ranks, for objectives with a global statistic (KTO).

    Returns:
        The terms of the loss with their graphs, metrics, and the log-probs of the main term.

    Raises:
        UserError: the batch lacks what the method reads.
    """

    def run(*terms: Term) -> LogProbs:
        return _estimate(terms, family, weights, batch, generator, autocast, world_mean)

    lp = run(method.main, *(term for term in method.extra if term.draw is None))
    losses = list(term_losses(method.main, lp, batch.labels))
    for term in method.extra:
        losses += term_losses(term, lp if term.draw is None else run(term), batch.labels)
    result = StepResult(tuple(losses), {}, lp)
    beta = float(method.main.params.get("beta", 1.0))
    metrics = {"loss": result.loss.item(), **preference_metrics(lp, batch.labels, beta)}
    return result._replace(metrics=metrics)
