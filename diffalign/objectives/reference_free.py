"""Objectives over candidates without a reference network. Order never encodes preference: the larger reward wins.

``a`` is the log-prob of a candidate, summed over its units, ``abar`` its mean per unit (``-scale * error`` for
diffusion, where ``e`` is the mean squared error itself).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from diffalign.errors import UserError
from diffalign.objectives.diffusion import errors
from diffalign.objectives.links import logistic
from diffalign.objectives.pair import Normalize, oriented, preferred, side
from diffalign.registry import objective
from diffalign.types import Labels, LogProbs, Loss


def token_nll(value: Tensor, tokens: Tensor, factor: float) -> Loss:
    """A part of the loss: ``factor`` times the batch's negative log-prob per unit, from means and counts of units."""
    return Loss(-factor * value, tokens.to(value.dtype))


def _contrast(
    chosen: Tensor, link: Literal["sigmoid", "hinge", "ipo"], beta: float, gamma: float, label_smoothing: float
) -> Tensor:
    """The loss of a difference of log-probs (B,), as TRL's reference-free trainers have it."""
    if label_smoothing and link != "sigmoid":
        raise UserError(f"label_smoothing is for link: sigmoid, {link} has none")
    if link == "ipo":
        return (chosen - 1 / (2 * beta)).square()
    logit = beta * chosen - gamma
    return torch.relu(1 - logit) if link == "hinge" else logistic(logit, label_smoothing)


def _ranking(lp: LogProbs, labels: Labels) -> tuple[Tensor, Tensor]:
    """Indices (B, 3) of the candidate to imitate and of the pair to separate, and the row's weight (B,).

    The best candidate is imitated; the pair is the second best (the best, of two) and the worst. Rows with equal
    rewards, or with fewer than two candidates, have weight 0.
    """
    reward = labels["reward"].masked_fill(lp.exists == 0, -torch.inf)
    ranked, order = reward.sort(dim=1, descending=True, stable=True)
    count = lp.exists.sum(1).long()
    places = torch.stack([0 * count, (count > 2).long(), (count - 1).clamp_min(0)], 1)
    tied = ((ranked[:, :-1] == ranked[:, 1:]) & ranked[:, 1:].isfinite()).any(1)  # padding is at minus infinity
    return order.gather(1, places), (~tied & (count > 1)).to(lp.exists.dtype)


@objective(k=2, paper="arXiv:2405.14734 eq. 6; release princeton-nlp/SimPO", labels=("reward",))
def simpo(
    lp: LogProbs,
    labels: Labels,
    *,
    beta: float = 2.0,
    gamma_beta_ratio: float = 0.25,
    label_smoothing: float = 0.0,
    link: Literal["sigmoid", "hinge"] = "sigmoid",
    sft_weight: float = 0.0,
) -> tuple[Loss, ...]:
    """SimPO: ``-log sigmoid(beta (abar_w - abar_l - rho))``, or ``max(0, 1 - z)`` of the same z.

    The margin is the ratio rho = gamma / beta as in the release, since gamma alone does not carry over between betas.
    TRL's CPO trainer takes gamma and adds an NLL of weight 1 unless told not to. Nothing anchors the policy. For
    diffusion the mean error takes the place of the mean log-prob: ``-log sigmoid(-beta (e_w - e_l) - gamma)``.

    Args:
        lp: policy log-probs, (B, 2, U); a candidate without units has mean 0.
        labels: ``reward`` (B, 2).
        beta: strength, 1 / log-prob per unit; 2 in the release's config, 2 to 10 in its runs.
        gamma_beta_ratio: rho, in log-prob per unit; 0.25 in the config, 0.1 to 0.8 in the runs.
        label_smoothing: probability that a label is flipped, for the sigmoid.
        link: ``sigmoid`` or ``hinge``.
        sft_weight: of the winners' NLL per token, a part of its own; 0 in the release.
    """
    margin, weight = oriented(lp.mean(), lp, labels)
    main = Loss(_contrast(margin - gamma_beta_ratio, link, beta, 0.0, label_smoothing), weight)
    if not sft_weight:
        return (main,)
    return main, token_nll(preferred(lp.mean(), labels), weight * preferred(lp.mask.sum(-1), labels), sft_weight)


@objective(k=2, paper="arXiv:2401.08417, loss equation; arXiv:2305.18290 without reference")
def contrastive(
    lp: LogProbs, labels: Labels, *, beta: float = 0.1, label_smoothing: float = 0.0, sft_weight: float = 1.0
) -> tuple[Loss, ...]:
    """CPO: ``-log sigmoid(beta (a_w - a_l))`` plus the winners' NLL; without the NLL, DPO with a uniform reference.

    Args:
        lp: policy log-probs, (B, 2, U).
        labels: ``reward`` (B, 2).
        beta: strength, 1 / log-prob; 0.1 in the paper and in TRL.
        label_smoothing: probability that a label is flipped; 0 in the paper.
        sft_weight: of the NLL per token, a part of its own as in TRL; 1 in the paper, 0 for reference-free DPO.
    """
    margin, weight = oriented(lp.sum(), lp, labels)
    main = Loss(logistic(beta * margin, label_smoothing), weight)
    if not sft_weight:
        return (main,)
    return main, token_nll(preferred(lp.mean(), labels), weight * preferred(lp.mask.sum(-1), labels), sft_weight)


@objective(k=3, paper="arXiv:2405.16681, loss equation; TRL TPO")
def tpo(
    lp: LogProbs,
    labels: Labels,
    *,
    beta: float = 0.01,
    alpha: float = 1.0,
    link: Literal["sigmoid", "hinge", "ipo"] = "sigmoid",
    normalize: Normalize = "sum",
    gamma: float = 0.0,
    label_smoothing: float = 0.0,
) -> tuple[Loss, ...]:
    """TPO: ``-log sigmoid(beta (a_w - a_l) - gamma)`` plus ``alpha`` times the NLL per token of a gold answer.

    Of three candidates the one with the highest reward is gold, the others are the pair. Long pairs dominate sums:
    with beta 0.1 the logit saturates within a few steps. TPO-L is ``normalize: mean`` with a gamma; TRL has means for
    ``ipo`` too, ``(abar_w - abar_l - 1 / (2 beta))^2``.

    Args:
        lp: policy log-probs, (B, 3, U).
        labels: ``reward`` (B, 3); rows with equal rewards have weight 0.
        beta: strength, 1 / log-prob; 0.01 in TRL and the released models, 1 in the release's class; tau for ``ipo``.
        alpha: weight of the NLL over all gold tokens of the batch; 1 in the release and TRL.
        link: ``sigmoid``, or ``hinge`` and ``ipo`` as in TRL.
        normalize: ``sum``, or ``mean`` per token.
        gamma: margin in the unit of the logit; 0.5 in TRL's TPO-L, 0.5 to 3 with beta 0.01 in the release.
        label_smoothing: probability that a label is flipped, for the sigmoid.
    """
    index, weight = _ranking(lp, labels)
    values = (lp.sum() if normalize == "sum" else lp.mean()).gather(1, index)
    main = Loss(_contrast(values[:, 1] - values[:, 2], link, beta, gamma, label_smoothing), weight)
    gold, tokens = (v.gather(1, index)[:, 0] for v in (lp.mean(), lp.mask.sum(-1)))
    return main, token_nll(gold, weight * tokens, alpha)


@objective(k=None, paper="arXiv:2305.10425, loss equation")
def slic_hf(lp: LogProbs, labels: Labels, *, delta: float = 1.0, sft_weight: float = 0.1) -> Loss:
    """SLiC-HF: ``max(0, delta - a_w + a_l) + lambda (-a_target)``, log-probs summed over tokens.

    The target is the best candidate: the winner, or with three candidates an SFT answer that outranks the pair. TRL
    and GPO call the hinge on log-ratios "SLiC": ``hinge``.

    Args:
        lp: policy log-probs, (B, K, U) with K at least 2.
        labels: ``reward`` (B, K); rows with equal rewards have weight 0. The pair is the second best (the best, of
            two) and the worst.
        delta: margin in nats; 1 in HALOs, 0.5 to 10 tried in the paper.
        sft_weight: lambda; 0.1 in HALOs.
    """
    index, weight = _ranking(lp, labels)
    target, winner, loser = lp.sum().gather(1, index).unbind(1)
    return Loss(torch.relu(delta - winner + loser) - sft_weight * target, weight)


def log_odds(mean: Tensor) -> Tensor:
    """``log(p / (1 - p))`` of ``p = exp(abar)``, from mean log-probs per token; at p = 1 of the nearest smaller p.

    ``expm1`` alone is exact here: where 1 - p loses the digits of a small p, they do not count against ``log p``.
    """
    return mean - torch.log(-torch.expm1(mean.clamp_max(-torch.finfo(mean.dtype).eps)))


@objective(k=2, paper="arXiv:2403.07691 eq. 6", fits=("text",))
def orpo(lp: LogProbs, labels: Labels, *, odds_weight: float = 0.1) -> Loss:
    """ORPO: ``-abar_w - lambda log sigmoid(odds_w - odds_l)`` with the log-odds of mean probabilities per token.

    The NLL is the mean over completion tokens per sequence; TRL's is a mean over the batch that counts prompt tokens.

    Args:
        lp: policy log-probs, (B, 2, U).
        labels: ``reward`` (B, 2).
        odds_weight: lambda; 0.1 in the paper and in TRL (as ``beta``).
    """
    mean = lp.mean()
    margin, weight = oriented(log_odds(mean), lp, labels)
    return Loss(odds_weight * logistic(margin) - preferred(mean, labels), weight)


def alignment_term(mean: Tensor, labels: Labels, beta: float) -> Tensor:
    """(B,): ``-log sigmoid(beta odds_w) - log sigmoid(-beta odds_l)`` from mean log-probs (B, 2) per token."""
    odds = log_odds(mean)
    return logistic(beta * side(labels, odds) * odds).sum(1)


@objective(k=2, paper="arXiv:2409.10571, loss equation; arXiv:2502.01237", fits=("text",))
def asft(lp: LogProbs, labels: Labels, *, odds_weight: float, sft_weight: float = 1.0, beta: float = 1.0) -> Loss:
    """ASFT: ``-s abar_w - lambda (log sigmoid(beta odds_w) + log sigmoid(-beta odds_l))``.

    At beta 1 it is ``-(s + lambda) abar_w - lambda log(1 - p_l)``: NLL of the winner and unlikelihood of the loser
    (proved in arXiv:2502.01237). Averaging over the length is taken over from ORPO: without it 1 - p is 1.

    Args:
        lp: policy log-probs, (B, 2, U).
        labels: ``reward`` (B, 2).
        odds_weight: lambda; 0.1 to 1 in arXiv:2502.01237.
        sft_weight: s, of the winner's NLL per token, averaged over sequences; 1, or 0 as a second stage after SFT.
        beta: tempering of the odds, from arXiv:2502.01237; 1 in the paper.
    """
    mean = lp.mean()
    _, weight = oriented(mean, lp, labels)
    aligned = odds_weight * alignment_term(mean, labels, beta)
    return Loss(aligned - sft_weight * preferred(mean, labels), weight)


@objective(k=2, paper="arXiv:2403.07691, odds equation; diffusers diffusion_orpo script", fits=("diffusion",))
def error_ratio(
    lp: LogProbs, labels: Labels, *, beta: float = 0.1, sign: Literal["corrected", "as_published"] = "corrected"
) -> Loss:
    """Diffusion-ORPO: ``e_w - beta log sigmoid(e_l - e_w)``.

    The published script has ``e_w - e_l`` in the sigmoid, which rewards a larger error on the winner: SFT on winners
    plus a weak SFT on losers. Neither has a factor T: at error gaps of 0.01 the ratio term is nearly flat.

    Args:
        lp: policy log-probs, (B, 2, U).
        labels: ``reward`` (B, 2).
        beta: weight of the ratio term; 0.1 in the script.
        sign: ``corrected``, or ``as_published`` to reproduce the script.
    """
    error = errors(lp)
    gap, weight = oriented(error, lp, labels)
    return Loss(preferred(error, labels) + beta * logistic(-gap if sign == "corrected" else gap), weight)


def amplified(x: Tensor) -> Tensor:
    """``x / (exp(x) - 1)`` for x >= 0 with its derivative, 1 at 0: a series near 0, where the quotient cancels."""
    square = x.square()
    series = 1 - x / 2 + square / 12 * (1 - square / 60 * (1 - square / 42 * (1 - square / 40)))
    far = torch.where(x < 0.1, 1.0, x)
    return torch.where(x < 0.1, series, far * torch.exp(-far) / -torch.expm1(-far))


@objective(k=2, paper="arXiv:2406.06424, loss equation; release mapo-t2i/mapo", fits=("diffusion",))
def mapo(lp: LogProbs, labels: Labels, *, beta: float = 0.1, snr_value: float = 0.5, timesteps: float = 1000.0) -> Loss:
    """MaPO: ``e_w - beta log sigmoid(T (f(e_w) - f(e_l)))`` with ``f(e) = kappa e / (exp(kappa e) - 1)``.

    As in the release; the paper has ``f(e)^beta`` inside and 1 / beta outside. The release computes ``exp(x) - 1``,
    which has no digits left at small errors; here f is exact down to 0, where it is 1.

    Args:
        lp: policy log-probs, (B, 2, U).
        labels: ``reward`` (B, 2).
        beta: weight of the ratio term; 0.1 in the release.
        snr_value: kappa; 0.5 in the release.
        timesteps: T; 1000 in the release.
    """
    error = errors(lp)
    gap, weight = oriented(amplified(snr_value * error), lp, labels)
    return Loss(preferred(error, labels) + beta * logistic(timesteps * gap), weight)
