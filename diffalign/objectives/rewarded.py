"""Objectives over pairs that read numbers beside the preference: scores of reward models, visits of a search."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from diffalign.errors import UserError
from diffalign.objectives.links import LINKS, logistic
from diffalign.objectives.pair import oriented, oriented_margin, preferred
from diffalign.registry import objective
from diffalign.types import Labels, LogProbs, Loss


def margin_weight(margin: Tensor, c_max: float, c_min: float, sharpness: float, tau: float) -> tuple[Tensor, Tensor]:
    """MADPO's coefficient c(|m|), which is 1 at tau, and weight ``sigmoid(c m) / sigmoid(m)``, 1 below -tau."""
    if not 0 < c_min < 1 < c_max:
        raise UserError(f"margin weights need 0 < c_min < 1 < c_max, got {c_min} and {c_max}")
    offset = math.log((c_max - 1) / (1 - c_min))
    c = c_min + (c_max - c_min) * torch.sigmoid(-sharpness * (margin.abs() - tau) - offset)
    weight = (F.logsigmoid(c * margin) - F.logsigmoid(margin)).exp()
    return c, torch.where(margin > -tau, weight, 1.0)


@objective(
    k=2,
    paper="arXiv:2510.05342, loss equation; official release",
    roles=("reference",),
    labels=("reward", "score"),
    differences=True,
)
def madpo(
    lp: LogProbs,
    labels: Labels,
    *,
    beta: float = 0.1,
    c_max: float = 2.0,
    c_min: float | None = None,
    sharpness: float = 1.0,
    tau: float = math.log(999),
) -> Loss:
    """MADPO: the DPO loss of a pair times ``sigmoid(c m) / sigmoid(m)``, m the winner's score minus the loser's.

    More weight for pairs that a reward model orders rightly but barely, less for easy ones and for those it orders
    mildly the other way, 1 for those it contradicts by tau or more. Weights are not renormalised over the batch.

    Args:
        lp: policy and reference.
        labels: ``reward`` (B, 2) says who wins (ties have weight 0), ``score`` (B, 2) is a reward model's number,
            trained on the same preferences.
        beta: 0.1 in the release.
        c_max: coefficient at margin 0, above 1; 2 in the release, also 4.
        c_min: coefficient at large margins, below 1; None for 1 / c_max, as in the release.
        sharpness: the paper's lambda, how fast c falls around tau.
        tau: margin at which the weight is 1; the logit of 0.999.
    """
    margin, weight = oriented_margin(lp, labels)
    score, _ = oriented(labels["score"].to(margin.dtype), lp, labels)
    _, strength = margin_weight(score, c_max, 1 / c_max if c_min is None else c_min, sharpness, tau)
    return Loss(strength * logistic(beta * margin), weight)


def remaining_reward(lp: LogProbs, labels: Labels, beta: float, w: Sequence[float]) -> Tensor:
    """MODPO's reward of the trained objective (B, 2): ``(beta h - w_others . others) / w_trained``."""
    if not w or w[0] <= 0:
        raise UserError(f"MODPO needs a positive weight for the trained objective, the first of w = {list(w)}")
    ratio = lp.ratio()
    others = labels["others"].to(ratio.dtype)
    others = others[..., None] if others.ndim == 2 else others
    if others.shape[-1] != len(w) - 1:
        raise UserError(f"w = {list(w)} weighs {len(w) - 1} other objectives, label 'others' has {others.shape[-1]}")
    return (beta * ratio - others @ others.new_tensor(w[1:])) / w[0]


@objective(
    k=2,
    paper="arXiv:2310.03708, MODPO loss equation; release ZHZisZZ/modpo",
    roles=("reference",),
    labels=("reward", "others"),
    differences=True,
    vectors=("others",),
)
def modpo(
    lp: LogProbs,
    labels: Labels,
    *,
    beta: float = 0.1,
    w: Sequence[float] = (0.5, 0.5),
    link: Literal["logistic", "hinge"] = "logistic",
) -> Loss:
    """MODPO: DPO on ``R = (beta h - w_others . others) / w_trained``: one run per weighting of the objectives.

    Args:
        lp: policy and reference.
        labels: ``reward`` (B, 2), the preference of the trained objective (ties have weight 0); ``others``
            (B, 2, len(w) - 1), or (B, 2) for one, the rewards of the other objectives. They must be on the scale of
            ``beta h``, of order 1, or they alone decide the order.
        beta: 0.1 in the release.
        w: weights of the objectives, the trained one first and positive; (1,) with no others is DPO.
        link: ``hinge`` is ``max(0, 1 - (R_w - R_l))``.
    """
    margin, weight = oriented(remaining_reward(lp, labels, beta, w), lp, labels)
    return Loss(LINKS[link](margin), weight)


@objective(
    k=2,
    paper="arXiv:2405.19316, distillation loss equation",
    roles=("reference",),
    differences=True,
    vectors=("reward",),
)
def distilled(lp: LogProbs, labels: Labels, *, beta: float) -> Loss:
    """Reward distillation: ``(beta (h_0 - h_1) - (R_0 - R_1))^2``; of several reward models, the best explained one.

    The smallest batch mean over the models is taken, not the smallest of each pair: one model must explain all data.
    On minibatches that is a stochastic version of it. The minimiser has finite gaps, unlike DPO's. The paper adds
    gamma times the forward KL on the reference's samples: objective ``forward_kl`` as a second term.

    Args:
        lp: policy and reference.
        labels: ``reward`` (B, 2), or (B, 2, M) of M reward models. Equal rewards are information here, not a tie.
        beta: KL strength: rewards to the unit of nats.
    """
    ratio = lp.ratio()
    reward = labels["reward"].to(ratio.dtype)
    gap = (reward[:, 0] - reward[:, 1]).reshape(len(ratio), -1)
    weight = lp.exists.prod(1)
    error = (beta * (ratio[:, :1] - ratio[:, 1:]) - gap).square()
    if error.shape[1] == 1:
        return Loss(error[:, 0], weight)
    means = torch.stack([lp.world_mean(weight * model) for model in error.detach().unbind(1)])
    return Loss(error[:, means.argmin()], weight)


@objective(k=2, paper="arXiv:2406.07327, equation of the Flex-DPO loss", roles=("reference",))
def flex(
    lp: LogProbs,
    labels: Labels,
    *,
    beta_chosen: float = 0.1,
    beta_rejected: float = 0.08,
    sft_weight: float = 0.0,
    sft_reduction: Literal["mean", "sum"] = "mean",
) -> Loss:
    """Flex-DPO: ``-log sigmoid(beta_chosen h_w - beta_rejected h_l)``, plus the winner's negative log-likelihood.

    The loser's likelihood collapses faster than the winner's, by the ratio of their probabilities, and mass then moves
    to text nobody saw; a smaller beta on its side slows that.

    Args:
        lp: policy and reference.
        labels: ``reward`` (B, 2); equal rewards have weight 0.
        beta_chosen: 0.1 in the paper.
        beta_rejected: about 0.08 worked best in the paper; equal to beta_chosen it is DPO.
        sft_weight: of the winner's negative log-likelihood; 0 leaves it out.
        sft_reduction: that likelihood per token of the sequence, or its sum.
    """
    if sft_reduction not in ("mean", "sum"):
        raise UserError(f"unknown sft_reduction {sft_reduction!r}: choose mean or sum")
    ratio = lp.ratio()
    _, weight = oriented(ratio, lp, labels)
    value = logistic(beta_chosen * preferred(ratio, labels) - beta_rejected * preferred(ratio.flip(1), labels))
    if sft_weight:
        value = value - sft_weight * preferred(lp.mean() if sft_reduction == "mean" else lp.sum(), labels)
    return Loss(value, weight)


def visit_smoothing(lp: LogProbs, labels: Labels) -> Tensor:
    """MCTS-DPO's probability (B,) that a pair's label is wrong: ``min(1 - 1 / (1 + N_l / max(1, N_w)), 1/2)``."""
    visits = labels["visits"].to(lp.exists.dtype)
    share = preferred(visits.flip(1), labels) / preferred(visits, labels).clamp_min(1)
    return (share / (1 + share)).clamp_max(0.5)


@objective(
    k=2,
    paper="arXiv:2405.00451, loss equation with label smoothing; release YuxiXie/MCTS-DPO",
    roles=("reference",),
    labels=("reward", "visits"),
    identity=math.log(2),
    differences=True,
)
def visit_smoothed(lp: LogProbs, labels: Labels, *, beta: float = 0.1) -> Loss:
    """MCTS-DPO: conservative DPO whose label smoothing is each pair's own, from the visits of a tree search.

    Pairs are siblings of a tree; with shaping ``first_difference`` only their differing ends count.

    Args:
        lp: policy and reference.
        labels: ``reward`` (B, 2) of the search (ties have weight 0), ``visits`` (B, 2) how often each was visited.
        beta: 0.1 in the release.
    """
    margin, weight = oriented_margin(lp, labels)
    logit = beta * margin
    flipped = visit_smoothing(lp, labels)
    return Loss((1 - flipped) * logistic(logit) + flipped * logistic(-logit), weight)
