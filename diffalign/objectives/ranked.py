"""Objectives over lists of candidates with graded rewards. ``s = beta h`` is the implicit reward of a candidate."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from diffalign.objectives.links import logistic
from diffalign.registry import objective
from diffalign.types import Labels, LogProbs, Loss


def _rewards(lp: LogProbs, labels: Labels) -> tuple[Tensor, Tensor]:
    """Rewards (B, K) in the type of the log-probs, and ``better`` (B, K, K): i beats j strictly and both exist."""
    reward = labels["reward"].to(lp.exists.dtype)
    both = (lp.exists[:, :, None] * lp.exists[:, None]) > 0
    return reward, (reward[:, :, None] > reward[:, None]) & both


class Gains(NamedTuple):
    """The pieces of the DCG weights."""

    rank: Tensor
    """(B, K), 1 is best; padding comes last."""
    gain: Tensor
    """(B, K) ``2^reward - 1``."""
    discount: Tensor
    """(B, K) ``ln(1 + rank)``."""
    pair: Tensor
    """(B, K, K) ``|G_i - G_j| |1 / D_i - 1 / D_j|``."""


def dcg_gains(reward: Tensor, rank_by: Tensor, exists: Tensor) -> Gains:
    """Weights from rewards (B, K) and the values (B, K) that rank; among equals the lower index ranks higher."""
    order = rank_by.detach().masked_fill(exists == 0, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(1) + 1
    gain, discount = torch.expm1(math.log(2) * reward), torch.log1p(rank.to(reward.dtype))
    inverse = 1 / discount
    pair = (gain[:, :, None] - gain[:, None]).abs() * (inverse[:, :, None] - inverse[:, None]).abs()
    return Gains(rank, gain, discount, pair)


@objective(k=None, paper="arXiv:2410.18013, ranking loss equation", roles=("reference",), listwise=True)
def dcg(lp: LogProbs, labels: Labels, *, beta: float, rank_by: Literal["target", "model"] = "target") -> Loss:
    """RankDPO: ``sum over i better than j of |G_i - G_j| |1/D_i - 1/D_j| (-log sigmoid(beta (h_i - h_j)))``.

    Gains ``G = 2^reward - 1``, discounts ``D = ln(1 + rank)`` with the natural logarithm; the text gives no base, and
    base 2 would multiply everything by ln 2. Two candidates: DPO times ``0.5325 |G_1 - G_2|``. Equal rewards add
    nothing but take up ranks, the lower index first: the weights of the others depend on it. Weights carry no
    gradient. The mean is over all records of two candidates or more; one of ties alone is in it with loss 0.

    Args:
        lp: policy and reference log-probs, (B, K, U).
        labels: ``reward`` (B, K), the aggregated score phi in [0, 1].
        beta: strength, 1 / log-prob; the text gives none, Diffusion-DPO's coefficient is 2500 at scale 1.
        rank_by: ``target`` ranks by reward, as the equations; ``model`` by the policy's own log-ratios, as the
            paper's figure suggests.
    """
    reward, better = _rewards(lp, labels)
    ratio = lp.ratio()
    gains = dcg_gains(reward, reward if rank_by == "target" else ratio, lp.exists)
    loss = logistic(beta * (ratio[:, :, None] - ratio[:, None]))
    value = torch.where(better, gains.pair * loss, 0.0).sum((1, 2))
    return Loss(value, (lp.exists.sum(1) > 1).to(value.dtype))


@objective(k=None, paper="arXiv:2305.18290 appendix A.3, Plackett-Luce equation", roles=("reference",), listwise=True)
def plackett_luce(lp: LogProbs, labels: Labels, *, beta: float, top: int | None = None) -> Loss:
    """Plackett-Luce DPO: ``sum over i of logsumexp({s_i} and all s_j worse than i) - s_i``, with ``s = beta h``.

    For distinct rewards this is the likelihood of the ranking; two candidates: DPO. Candidates with equal rewards do
    not compete with each other, so that a tie is nobody's win. A list of one or none has loss 0 and counts as a record;
    a list of ties has weight 0.

    Args:
        lp: policy and reference log-probs, (B, K, U).
        labels: ``reward`` (B, K).
        beta: strength, 1 / log-prob.
        top: only the choices of the best ``top`` places; 1 is the softmax of the best against all. None for all.
    """
    _, better = _rewards(lp, labels)
    score = torch.where(lp.exists > 0, beta * lp.ratio(), 0.0)
    rivals = better | torch.eye(score.shape[1], dtype=torch.bool, device=score.device)
    pool = torch.where(rivals, score[:, None], -torch.inf).logsumexp(2) - score
    counted = lp.exists > 0 if top is None else (lp.exists > 0) & (better.sum(1) < top)
    decided = better.flatten(1).any(1) | (lp.exists.sum(1) <= 1)
    return Loss(torch.where(counted, pool, 0.0).sum(1), decided.to(score.dtype))


def _log_softmax(logits: Tensor, exists: Tensor) -> Tensor:
    """Over the candidates that exist; finite everywhere."""
    return logits.masked_fill(exists == 0, torch.finfo(logits.dtype).min).log_softmax(1)


def entropy(distribution: Tensor) -> Tensor:
    """(B,): of a distribution over candidates."""
    return torch.special.entr(distribution).sum(1)


Target = Literal["normalized", "raw", "given"]


def anchored_target(reward: Tensor, exists: Tensor, target: Target, beta_reward: float) -> Tensor:
    """(B, K): the distribution that rewards ask for; see :func:`anchored`."""
    if target == "given":
        return reward * exists
    if target == "raw":
        return _log_softmax(beta_reward * reward, exists).exp() * exists
    count = exists.sum(1, keepdim=True)
    centred = (reward - (reward * exists).sum(1, keepdim=True) / count.clamp_min(1)) * exists
    deviation = (centred.square().sum(1, keepdim=True) / (count - 1).clamp_min(1)).sqrt()
    return _log_softmax(centred / (deviation + 1e-8) / beta_reward, exists).exp() * exists


@objective(k=None, paper="arXiv:2510.18913, loss equation; official integration", roles=("reference",), listwise=True)
def anchored(
    lp: LogProbs,
    labels: Labels,
    *,
    tau: float = 0.8,
    beta_reward: float = 0.5,
    target: Target = "normalized",
    drop_constant: bool = False,
) -> Loss:
    """ADPO: ``-sum_i q_i log p_i`` with ``p = softmax(h / tau)`` over the candidates of a prompt.

    The reference role is the anchor: the sampling policy online, a fixed model offline. A one-hot q over two with tau =
    1 / beta is DPO, ``(p, 1 - p)`` conservative DPO. At the optimum the value is the entropy of q, not 0. Equal
    rewards ask for a uniform q, which pulls back to the anchor.

    Args:
        lp: policy and anchor log-probs, (B, K, U).
        labels: ``reward`` (B, K).
        tau: temperature of the policy; 0.8 in one integration, 1 in the other.
        beta_reward: temperature of the rewards; 0.5 in the release.
        target: ``normalized``: q is the softmax of standardised rewards (unbiased, plus 1e-8) over beta_reward;
            ``raw``: of beta_reward times the rewards; ``given``: the rewards are q.
        drop_constant: weight 0 for records whose rewards are all equal; the release keeps them.
    """
    reward, better = _rewards(lp, labels)
    q = anchored_target(reward, lp.exists, target, beta_reward)
    value = -(q * _log_softmax(lp.ratio() / tau, lp.exists)).sum(1)
    here = better.flatten(1).any(1) if drop_constant else lp.exists.any(1)
    return Loss(value, here.to(value.dtype))


class Posterior(NamedTuple):
    """Distributions (B, K) over the samples of a prompt."""

    target: Tensor
    """``softmax(R / gamma + log sft - log proposal)``, detached."""
    policy: Tensor
    """Logarithm of ``softmax(log policy - log proposal)``."""


def posterior(lp: LogProbs, labels: Labels, gamma: float, hard: bool) -> Posterior:
    """What :func:`brain` compares."""
    reward, _ = _rewards(lp, labels)
    logits = (reward / gamma + lp.sum("reference") - lp.sum("behaviour")).detach()
    target = _log_softmax(logits, lp.exists).exp() * lp.exists
    if hard:
        top = (target == target.amax(1, keepdim=True)) * lp.exists
        target = top / top.sum(1, keepdim=True).clamp_min(1)
    return Posterior(target, _log_softmax(lp.ratio(against="behaviour"), lp.exists))


@objective(k=None, paper="arXiv:2402.02479, gradient equation", roles=("reference", "behaviour"), listwise=True)
def brain(lp: LogProbs, labels: Labels, *, gamma: float = 1.0, hard: bool = False) -> Loss:
    """BRAIn: KL of the reward posterior over samples to the policy, both self-normalised by the proposal.

    ``alpha = softmax(R / gamma + log sft - log proposal)``, ``b = softmax(log policy - log proposal)``, value
    ``KL(alpha || b)`` with gradient ``b - alpha``. Two samples and a hard posterior: DPO with beta 1 against the
    proposal.

    Args:
        lp: log-probs (B, K, U) of the policy, the SFT model (``reference``) and the proposal (``behaviour``).
        labels: ``reward`` (B, K).
        gamma: temperature of the rewards; 1 leaves them as they are, the paper's value could not be checked.
        hard: all of alpha on the best sample, shared by equals.
    """
    target, policy = posterior(lp, labels, gamma, hard)
    value = -(target * policy).sum(1) - entropy(target)
    return Loss(value, lp.exists.any(1).to(value.dtype))
