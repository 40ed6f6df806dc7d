"""Clipped policy gradients on log-probs of transitions or tokens, and the penalties that go with them.

Units are sampling steps or tokens; the advantage is one number per candidate (B, K) or per unit (B, K, U).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from diffalign.errors import UserError
from diffalign.objectives.links import logistic
from diffalign.objectives.pair import per_unit, side
from diffalign.registry import objective
from diffalign.types import Labels, LogProbs, Loss

Reduction = Literal["sequence", "token", "fixed"]
LARGEST = 60.0
"""Log-ratios are clamped here, far above any clip range, so that the exponential and its gradient stay finite."""


def advantage(lp: LogProbs, labels: Labels, clip_max: float | None, rescale_to: float | None = None) -> Tensor:
    """(B, K, U) or (B, K, 1): the label, clipped, optionally rescaled so that ``clip_max`` becomes ``rescale_to``."""
    value = per_unit(lp, labels, "advantage").to(lp.by_role["policy"].dtype)
    if clip_max is not None:
        value = value.clamp(-clip_max, clip_max)
        value = value if rescale_to is None else value / clip_max * rescale_to
    return value


def clipped_surrogate(ratio_log: Tensor, gain: Tensor, low: float, high: float) -> Tensor:
    """``max(-A rho, -A clip(rho, 1 - low, 1 + high))`` from ``log rho``."""
    ratio = ratio_log.clamp(-LARGEST, LARGEST).exp()
    return torch.maximum(-gain * ratio, -gain * ratio.clamp(1 - low, 1 + high))


def per_candidate(lp: LogProbs, value: Tensor) -> Loss:
    """The mean over a candidate's units, every candidate counting once."""
    return Loss(lp.counted(value).sum(-1) / lp.lengths, lp.exists)


def reduced(lp: LogProbs, value: Tensor, reduction: Reduction, max_length: int | None) -> Loss:
    """A value per unit (B, K, U), to be averaged as ``reduction`` says."""
    if reduction == "sequence":
        return per_candidate(lp, value)
    if reduction == "token":
        return Loss(lp.counted(value), lp.mask.to(value.dtype) * lp.exists[..., None])
    if max_length is None:
        raise UserError("reduction 'fixed' needs max_length")
    return Loss(lp.counted(value).sum(-1) / max_length, lp.exists)


@objective(
    k=None,
    paper="DDPO arXiv:2305.13301, loss of the release; Flow-GRPO arXiv:2505.05470; GRPO arXiv:2402.03300 eq. 3",
    roles=("behaviour",),
    labels=("advantage",),
    vectors=("advantage",),
)
def clipped_policy_gradient(
    lp: LogProbs,
    labels: Labels,
    *,
    clip_low: float = 1e-4,
    clip_high: float = 1e-4,
    adv_clip_max: float | None = 5.0,
    level: Literal["unit", "candidate"] = "unit",
    reduction: Reduction = "sequence",
    max_length: int | None = None,
) -> Loss:
    """PPO clip: ``max(-A rho, -A clip(rho, 1 - c_low, 1 + c_high))``, ``rho = exp(log p - log p_behaviour)``.

    DDPO, Flow-GRPO and DanceGRPO on transitions, GRPO on tokens, off-policy AWM on matching scores. A log-prob that is
    a mean over latent elements makes clip ranges of 1e-4 and less meaningful. Value -A wherever policy = behaviour.
    DanceGRPO's release divides by accumulation steps times trained steps; here the training loop averages.

    Args:
        lp: policy and behaviour log-probs (B, K, U).
        labels: ``advantage`` (B, K) or (B, K, U), with any normalisation done.
        clip_low: half-width of the clip range below 1. 1e-4 for DDPO, Flow-GRPO and DanceGRPO; 1e-5 for
            Flow-GRPO-Fast; 0.2 for text.
        clip_high: half-width above 1.
        adv_clip_max: bound of the advantage; 5 in the diffusion releases, None for text.
        level: ``candidate`` takes one ratio per candidate, of the mean log-prob over its units (AWM's ``sum_first``).
        reduction: how units are averaged: ``sequence`` the mean of means (GRPO), ``token`` all units of the batch
            alike (BNPO), ``fixed`` the sum over ``max_length`` (Dr. GRPO). At level ``candidate`` there is one unit.
        max_length: divisor of ``fixed``.
    """
    gain = advantage(lp, labels, adv_clip_max)
    if level == "candidate":
        whole = lp.ratio("mean", "behaviour")
        mean_gain = lp.counted(gain.expand_as(lp.mask)).sum(-1) / lp.lengths
        return Loss(clipped_surrogate(whole, mean_gain, clip_low, clip_high), lp.exists)
    value = clipped_surrogate(lp.unit_ratio("behaviour"), gain, clip_low, clip_high)
    return reduced(lp, value, reduction, max_length)


def _mean_by_step(values: Tensor, real: Tensor, std: Tensor) -> Tensor:
    """(B, K, U): means over the real transitions of one standard deviation, which are those of one step."""
    levels, step = std.flatten().unique(return_inverse=True)
    total, count = (
        values.new_zeros(len(levels)).index_add(0, step, x.flatten().to(values))
        for x in (torch.where(real, values, 0.0), real)
    )
    return (total / count.clamp_min(1))[step].view_as(values)


@objective(
    k=None,
    paper="arXiv:2510.22319, loss equation; release yifan123/flow_grpo train_sd3_GRPO_Guard.py",
    roles=("behaviour",),
    labels=("advantage",),
    vectors=("advantage",),
    reads=("gap.behaviour", "std", "dt"),
    fits=("diffusion",),
)
def guarded_policy_gradient(
    lp: LogProbs,
    labels: Labels,
    *,
    clip_low: float = 2e-6,
    clip_high: float = 2e-6,
    adv_clip_max: float | None = 5.0,
    bias: Literal["per_sample", "batch"] = "per_sample",
    divide_by_dt: bool = True,
) -> Loss:
    """GRPO-Guard: the clip on ``rho = exp((log p - log p_behaviour + |mu - mu_behaviour|^2 / (2 q^2)) q)``, over d.

    ``q`` is the transition's standard deviation and d its length. The bias removes the quadratic term of a Gaussian
    log-ratio, which is never positive, so that ``log rho`` has mean 0; q gives all steps the same spread.

    Args:
        lp: log-probs of transitions, ``gap["behaviour"]`` of their means, ``std`` and ``dt``, all (B, K, U).
        labels: ``advantage`` (B, K) or (B, K, U).
        clip_low: half-width of the clip range below 1; 2e-6 for GenEval and OCR, 4e-6 for PickScore.
        clip_high: half-width above 1.
        adv_clip_max: bound of the advantage.
        bias: the paper's mean over the elements of each sample. ``batch`` is the release: its mean runs over an empty
            tuple of dimensions, which averages over the whole micro-batch, there all samples at one step; here over
            the transitions of one ``std``.
        divide_by_dt: divide by the step length, which rebalances the steps.
    """
    gap, std, dt = (lp.counted(x) for x in (lp.gap["behaviour"], lp.extra["std"], lp.extra["dt"]))
    real = (lp.mask > 0) & (lp.exists > 0)[..., None]
    std, dt = torch.where(real, std, 1.0), torch.where(real, dt, 1.0)
    if bias == "batch":
        gap = _mean_by_step(gap, real, std)
    corrected = (lp.unit_ratio("behaviour") + gap / (2 * std.square())) * std
    value = clipped_surrogate(corrected, advantage(lp, labels, adv_clip_max), clip_low, clip_high)
    return per_candidate(lp, value / dt if divide_by_dt else value)


@objective(
    k=None,
    paper="arXiv:2505.05470, KL equation; release yifan123/flow_grpo train_sd3.py",
    roles=("reference",),
    labels=(),
    reads=("gap.reference", "std", "diffusion"),
    fits=("diffusion",),
)
def gaussian_kl(lp: LogProbs, labels: Labels, *, exact: bool = False) -> Loss:
    """KL of a transition from the reference's: ``mean |mu - mu_reference|^2 / (2 g^2)``, as an extra term.

    Args:
        lp: ``gap["reference"]`` of transition means, ``std`` and ``diffusion`` (g), all (B, K, U).
        labels: unused.
        exact: divide by the transition's variance ``g^2 d`` instead; the release leaves the step length d out, which
            makes the penalty smaller by d. Either way it is a mean over latent elements, not their sum.
    """
    width = torch.where(lp.mask > 0, lp.extra["std" if exact else "diffusion"], 1.0)
    return per_candidate(lp, lp.counted(lp.gap["reference"]) / (2 * width.square()))


@objective(k=None, paper="arXiv:2402.03300 eq. 4; estimator k3", roles=("reference",), labels=(), identity=0.0)
def k3_kl(lp: LogProbs, labels: Labels, *, reduction: Reduction = "sequence", max_length: int | None = None) -> Loss:
    """Per-unit KL estimate ``exp(r) - r - 1`` with ``r = log p_reference - log p``: never negative, unbiased at p.

    An extra term for GRPO on text: weight 0.04 in the classical form; TRL's current default is 0.

    Args:
        lp: policy and reference log-probs (B, K, U); r is clamped at 60.
        labels: unused.
        reduction: as in the main term, see ``clipped_policy_gradient``.
        max_length: divisor of ``fixed``.
    """
    r = (-lp.unit_ratio("reference")).clamp_max(LARGEST)
    return reduced(lp, torch.expm1(r) - r, reduction, max_length)


@objective(
    k=2,
    paper="arXiv:2311.13231, loss of the release yk7333/d3po train_d3po.py",
    roles=("reference",),
    labels=("reward",),
    fits=("diffusion",),
    identity=math.log(2),
)
def clipped_ratio(
    lp: LogProbs, labels: Labels, *, beta: float = 0.1, clip_eps: float = 0.1, keep_ties: bool = False
) -> Loss:
    """D3PO: ``-log sigmoid(beta sum_k c_k log clip(p / p_reference, 1 - e, 1 + e))`` of every pair of transitions.

    ``c`` is +1 for the preferred candidate and -1 for the other. The denominator is the frozen reference, not the
    policy that sampled. A candidate whose ratio has left the band has no gradient.

    Args:
        lp: policy and reference log-probs (B, 2, U): unit u of both candidates is the same sampling step.
        labels: ``reward`` (B, 2), for several rewards their Pareto preference (``credit.pareto_preference``).
        beta: 0.1 in the release.
        clip_eps: half-width e of the band. The paper has no clip; the release corrected 0.2 to 0.1, with 0.2 images
            disintegrate.
        keep_ties: count ties as ln 2 without gradient, as the release does, which scales the others' gradient down;
            the default drops them.

    Returns:
        The mean over a pair's steps (B,); ln 2 wherever policy = reference.
    """
    ratio = lp.unit_ratio("reference")
    low, high = torch.log1p(ratio.new_tensor([-clip_eps, clip_eps])).tolist()
    sign = side(labels, ratio)
    value = logistic(beta * (sign[..., None] * ratio.clamp(low, high)).sum(1))
    both = lp.mask.to(ratio.dtype).prod(1)
    weight = lp.exists.prod(1) * both.amax(-1)
    return Loss((both * value).sum(-1) / both.sum(-1).clamp_min(1), weight if keep_ties else weight * sign[:, 0].abs())
