"""Objectives over two candidates with a reference. Order never encodes preference: the larger reward wins.

``h`` is a candidate's log-ratio of policy to reference, ``Delta = h_w - h_l`` the winner's less the loser's.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from diffalign.errors import UserError
from diffalign.objectives.links import LINKS, logistic
from diffalign.registry import objective
from diffalign.types import Labels, LogProbs, Loss

Normalize = Literal["sum", "mean"]
Link = Literal["logistic", "hinge", "squared", "exponential", "truncated_quadratic", "savage"]


def side(labels: Labels, like: Tensor) -> Tensor:
    """(B, 2): 1 for the preferred candidate and -1 for the other, 0 for both at a tie."""
    reward = labels["reward"]
    return torch.sign(reward - reward.flip(1)).to(like.dtype)


def per_unit(lp: LogProbs, labels: Labels, name: str) -> Tensor:
    """(B, K, U), or (B, K, 1) for all units alike: a label that may be given either way.

    Raises:
        UserError: it has another number of units than the log-probs.
    """
    value = labels[name] if labels[name].ndim == 3 else labels[name][..., None]
    if value.shape[-1] not in (1, lp.mask.shape[-1]):
        raise UserError(
            f"label {name!r} has {value.shape[-1]} units per candidate, the samples have {lp.mask.shape[-1]}"
        )
    return value


def oriented(values: Tensor, lp: LogProbs, labels: Labels) -> tuple[Tensor, Tensor]:
    """A value (B, 2) of the preferred candidate minus that of the other.

    Returns:
        difference (B,) and weight (B,): 0 for ties and for rows in which a candidate is padding.
    """
    sign = side(labels, values)
    weight = sign[:, 0].abs()
    return (sign * values).sum(1), weight if lp.present is None else weight * lp.exists.prod(1)


def oriented_margin(lp: LogProbs, labels: Labels, how: Normalize = "sum") -> tuple[Tensor, Tensor]:
    """Implicit reward of the preferred candidate minus that of the other, without beta, and the weight, (B,) each."""
    return oriented(lp.ratio(how), lp, labels)


def preferred(values: Tensor, labels: Labels) -> Tensor:
    """(B,): the value (B, 2) of the preferred candidate; the mean of both at a tie, where it has no weight."""
    return 0.5 * ((1 + side(labels, values)) * values).sum(1)


@objective(
    k=2,
    paper="arXiv:2305.18290 eq. 7; diffusion: arXiv:2311.12908 eq. 14",
    roles=("reference",),
    identity=math.log(2),
    differences=True,
)
def sigmoid(lp: LogProbs, labels: Labels, *, beta: float, label_smoothing: float = 0.0) -> Loss:
    """DPO: ``-log sigmoid(beta (log-ratio of the winner - log-ratio of the loser))``.

    TRL ignores label smoothing for this loss; the release of DPO, which we follow, does not.

    Args:
        lp: policy and reference log-probs, (B, 2, U).
        labels: ``reward`` (B, 2); the higher candidate wins, equal rewards have weight 0.
        beta: strength in the unit of 1 / log-prob. For diffusion the log-prob is ``-scale * mean squared error``
            with scale 1/2 in the Diffusion-DPO row, so beta 5000 is the published 5000 (coefficient 2500).
        label_smoothing: probability that a label is flipped (conservative DPO); 0 in the paper.

    Returns:
        ln 2 wherever policy = reference, yet with a gradient.
    """
    margin, weight = oriented_margin(lp, labels)
    return Loss(logistic(beta * margin, label_smoothing), weight)


@objective(
    k=2,
    paper="arXiv:2403.00409, loss equation; TRL 'robust'",
    roles=("reference",),
    identity=math.log(2),
    differences=True,
)
def robust(lp: LogProbs, labels: Labels, *, beta: float, flip_rate: float) -> Loss:
    """Robust DPO: ``(-(1 - e) log sigmoid(z) + e log sigmoid(-z)) / (1 - 2 e)`` with ``z = beta Delta``.

    Unbiased for the loss on clean labels where a share e of them is flipped. Not bounded below: it falls like
    ``-e z / (1 - 2 e)`` at large z, so that a negative loss is legitimate and the gradient wants clipping.

    Args:
        lp: policy and reference log-probs, (B, 2, U).
        labels: ``reward`` (B, 2).
        beta: strength, 1 / log-prob.
        flip_rate: e, the share of wrong labels to expect, at least 0 and below 1/2; 0 is DPO.
    """
    if not 0 <= flip_rate < 0.5:
        raise UserError(f"robust: flip_rate must be at least 0 and below 0.5, got {flip_rate}")
    margin, weight = oriented_margin(lp, labels)
    right, wrong = logistic(beta * margin), logistic(-beta * margin)
    return Loss(((1 - flip_rate) * right - flip_rate * wrong) / (1 - 2 * flip_rate), weight)


@objective(
    k=2,
    paper="arXiv:2309.06657, hinge-norm equation; diffusion with beta 1: arXiv:2510.18353, loss equation",
    roles=("reference",),
    differences=True,
)
def hinge(lp: LogProbs, labels: Labels, *, beta: float, margin: float = 1.0) -> Loss:
    """``max(0, margin - beta Delta)``: SLiC's hinge on log-ratios (RSO; TRL 'hinge'), and Diffusion-DRO.

    DRO is ``max(0, d + m)`` with ``d = -Delta`` in plain errors (scale 1, beta 1); the paper writes ``max(-m, d)``,
    less by the constant m with the same gradient. At the kink the derivative is 0. SLiC-HF itself has no reference:
    ``slic_hf``.

    Args:
        lp: policy and reference log-probs, (B, 2, U).
        labels: ``reward`` (B, 2).
        beta: strength, 1 / log-prob; 0.05 to 0.1 for text, 1 for DRO.
        margin: where the loss ends, in the unit of ``beta Delta``; 1 as in RSO and TRL, 0.001 in DRO.
    """
    gap, weight = oriented_margin(lp, labels)
    return Loss(torch.relu(margin - beta * gap), weight)


@objective(k=2, paper="arXiv:2310.12036 eq. 17", roles=("reference",), differences=True)
def ipo(lp: LogProbs, labels: Labels, *, tau: float = 0.1, normalize: Normalize = "mean") -> Loss:
    """IPO: ``(d - 1 / (2 tau))^2`` with d the difference of log-ratios.

    The equation has sums over tokens; its authors' results, TRL and HALOs divide each log-ratio by its length. Per
    token a target of 5 nats is out of reach and the loss nearly linear: say which form a result used.

    Args:
        lp: policy and reference log-probs, (B, 2, U).
        labels: ``reward`` (B, 2).
        tau: strength; the target difference is 1 / (2 tau). 0.1 in TRL; 2500 for diffusion in diffusers.
        normalize: ``mean`` per unit, or ``sum`` as in the equation, the release of DPO and TRL's online trainer.
            The same for an image, which is one unit.
    """
    gap, weight = oriented_margin(lp, labels, normalize)
    return Loss((gap - 1 / (2 * tau)).square(), weight)


@objective(k=2, paper="arXiv:2402.05749 table 1, loss equation", roles=("reference",), differences=True)
def gpo(lp: LogProbs, labels: Labels, *, link: Link, beta: float) -> Loss:
    """GPO: ``f(beta Delta)`` for a family of links.

    ``logistic`` softplus(-z) is DPO, ``hinge`` max(0, 1 - z), ``squared`` (z - 1)^2 is beta^2 IPO with tau = beta / 2,
    ``exponential`` exp(-z), ``truncated_quadratic`` max(0, 1 - z)^2, ``savage`` sigmoid(-z)^2, which is bounded and
    gives up on confident mistakes. Betas do not carry over between links; compare at equal KL.

    Args:
        lp: policy and reference log-probs, (B, 2, U).
        labels: ``reward`` (B, 2).
        link: f.
        beta: strength, 1 / log-prob.
    """
    margin, weight = oriented_margin(lp, labels)
    return Loss(LINKS[link](beta * margin), weight)


@objective(k=2, paper="arXiv:2402.13228, loss equation", roles=("reference",), identity=math.log(2))
def dpop(lp: LogProbs, labels: Labels, *, beta: float, penalty: float = 50.0) -> Loss:
    """DPO-Positive: ``-log sigmoid(beta (Delta - lambda max(0, -h_w)))``.

    A winner that becomes less likely than under the reference costs inside the logistic, so that margins cannot be
    bought by losing both candidates.

    Args:
        lp: policy and reference log-probs, (B, 2, U).
        labels: ``reward`` (B, 2).
        beta: strength, 1 / log-prob.
        penalty: lambda; 5 to 50 in the paper.
    """
    margin, weight = oriented_margin(lp, labels)
    drop = torch.relu(-preferred(lp.ratio(), labels))
    return Loss(logistic(beta * (margin - penalty * drop)), weight)
