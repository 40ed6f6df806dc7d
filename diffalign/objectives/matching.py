"""Policy gradients and regression on denoising errors of generated samples: AWM, DiffusionNFT, DSO's DRO.

The log-prob is minus a denoising error, so that training needs the final sample alone. Units are training times.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from diffalign.credit import Mode, optimality_probability
from diffalign.objectives.policy_gradient import advantage, per_candidate
from diffalign.registry import objective, shaping
from diffalign.types import Labels, LogProbs, Loss

Weighting = Literal["Uniform", "t", "t**2", "huber", "ghuber"]


def matching_penalty(error: Tensor, t: Tensor, weighting: Weighting, power: float = 0.25) -> Tensor:
    """``phi(E, t)``: what a mean squared velocity error costs at a time (AWM release).

    ============  ========================================
    Uniform       E
    t, t**2       t E, t^2 E
    huber         t (sqrt(E + 1e-10) - 1e-5)
    ghuber        t / p ((E + 1e-10)^p - (1e-10)^p)
    ============  ========================================
    """
    tiny = 1e-10
    if weighting == "Uniform":
        return error
    if weighting == "t":
        return t * error
    if weighting == "t**2":
        return t.square() * error
    if weighting == "huber":
        return t * ((error + tiny).sqrt() - tiny**0.5)
    return t / power * ((error + tiny).pow(power) - tiny**power)


@shaping(paper="arXiv:2509.25050, weighting of the release", fits=("diffusion",))
def matching_score(lp: LogProbs, labels: Labels, *, weighting: Weighting = "Uniform", power: float = 0.25) -> LogProbs:
    """AWM's score of every role: ``-phi(E, t)`` in place of ``-scale E``.

    Args:
        weighting: phi, see :func:`matching_penalty`. Uniform in the paper, which states that it works best; all
            released configurations use ghuber. All but Uniform read ``extra["t"]``.
        power: p of ghuber; 0.25 in the release.
    """
    t = lp.mask if weighting == "Uniform" else lp.extra["t"]

    def score(value: Tensor) -> Tensor:
        error = lp.counted(-value / lp.scale).clamp_min(0)
        return -matching_penalty(error, t.to(error.dtype), weighting, power)

    return replace(lp, by_role={role: score(value) for role, value in lp.by_role.items()}, scale=1.0)


@objective(
    k=None,
    paper="arXiv:2509.25050, on-policy loss equation",
    labels=("advantage",),
    fits=("diffusion",),
    vectors=("advantage",),
)
def advantage_weighted(
    lp: LogProbs, labels: Labels, *, adv_clip_max: float | None = 5.0, advantage_max: float | None = 1.0
) -> Loss:
    """AWM on policy: ``-A exp(log p - sg(log p))``, whose value is -A and whose gradient is ``-A grad log p``.

    One update per round makes the policy its own behaviour; there the clip never acts, and one ratio per time or per
    sample (the release's exp_first, sum_first) is the same. Off policy use ``clipped_policy_gradient``.

    Args:
        lp: scores (B, K, U), see ``matching_score``; units are training times.
        labels: ``advantage`` (B, K) or (B, K, U).
        adv_clip_max: bound of the advantage, 5 in the release.
        advantage_max: what that bound is rescaled to: 1 in the release, None for the paper's unscaled advantage.
    """
    score = lp.counted(lp.by_role["policy"])
    gain = advantage(lp, labels, adv_clip_max, advantage_max)
    return per_candidate(lp, -gain * (score - score.detach()).exp())


def _velocity_kl(lp: LogProbs, role: str, weight: str, noise_level: float) -> Loss:
    value = lp.counted(lp.gap[role])
    if weight == "ELBO":
        t = torch.where(lp.mask > 0, lp.extra["t"].to(value.dtype), 1.0).clamp_min(1e-6)
        value = value * (1 - t.clamp_max(0.99)) / (2 * noise_level**2 * t)
    return per_candidate(lp, value)


@objective(
    k=None,
    paper="arXiv:2509.25050, KL equation; arXiv:2509.16117, loss of the release",
    roles=("reference",),
    labels=(),
    reads=("gap.reference", "t"),
    fits=("diffusion",),
)
def velocity_kl(
    lp: LogProbs, labels: Labels, *, weight: Literal["Uniform", "ELBO"] = "Uniform", noise_level: float = 0.7
) -> Loss:
    """``w(t) mean |v - v_reference|^2``, an extra term of AWM and DiffusionNFT.

    Args:
        lp: ``gap["reference"]`` of predictions and ``t``, (B, K, U).
        labels: unused.
        weight: Uniform is 1, in every release; ELBO is ``1 / (2 h^2)`` with ``h = a sqrt(t / (1 - min(t, 0.99)))``.
        noise_level: a; 0.7 in the release.
    """
    return _velocity_kl(lp, "reference", weight, noise_level)


@objective(
    k=None,
    paper="arXiv:2509.25050, release scxue/advantage_weighted_matching, ema_beta equation",
    roles=("average",),
    labels=(),
    reads=("gap.average", "t"),
    fits=("diffusion",),
)
def velocity_kl_average(
    lp: LogProbs, labels: Labels, *, weight: Literal["Uniform", "ELBO"] = "Uniform", noise_level: float = 0.7
) -> Loss:
    """``velocity_kl`` to a moving average of the policy (role ``average``): AWM's trust region, absent in the paper.

    Args:
        lp: ``gap["average"]`` of predictions and ``t``, (B, K, U).
        labels: unused.
        weight: see ``velocity_kl``.
        noise_level: see ``velocity_kl``.
    """
    return _velocity_kl(lp, "average", weight, noise_level)


def branch_sizes(policy: Tensor, behaviour: Tensor, target: Tensor, mix: float, lead: int) -> dict[str, Tensor]:
    """``positive`` and ``negative``: mean absolute errors of both branches, without gradient.

    Args:
        policy, behaviour, target: predictions and target of the same shape.
        mix: b of the branches ``b v + (1 - b) v_old`` and ``(1 + b) v_old - b v``.
        lead: leading dimensions that stay.
    """
    move, offset = mix * (policy.detach() - behaviour), behaviour - target
    sizes = {"positive": offset + move, "negative": offset - move}
    return {name: value.abs().flatten(lead).mean(-1) for name, value in sizes.items()}


def branch_errors(lp: LogProbs) -> tuple[Tensor, Tensor]:
    """(B, K, U) each: mean squared velocity errors of ``b v + (1 - b) v_old`` and ``(1 + b) v_old - b v``.

    From the errors E and E_old of both policies and their gap: ``b E + (1 - b) E_old - b (1 - b) gap`` and
    ``(1 + b) E_old - b E + b (1 + b) gap``. b is ``extra["mix"]``.
    """
    b = lp.counted(lp.extra["mix"])
    new, old = (lp.counted(-lp.by_role[role] / lp.scale) for role in ("policy", "behaviour"))
    gap = lp.counted(lp.gap["behaviour"])
    return b * new + (1 - b) * old - b * (1 - b) * gap, (1 + b) * old - b * new + b * (1 + b) * gap


def branch_losses(lp: LogProbs) -> tuple[Tensor, Tensor]:
    """(B, K, U) each: self-normalised errors of the clean estimates of both branches, ``t^2 E / max(t |e|, 1e-5)``."""
    t = lp.counted(lp.extra["t"]).to(lp.by_role["policy"].dtype)  # its square, too
    scales = ((t * lp.counted(lp.extra[name])).clamp_min(1e-5) for name in ("positive", "negative"))
    positive, negative = (t.square() * error / scale for error, scale in zip(branch_errors(lp), scales, strict=True))
    return positive, negative


@objective(
    k=None,
    paper="arXiv:2509.16117 loss equation; release NVlabs/DiffusionNFT train_nft_sd3.py",
    roles=("behaviour",),
    labels=("advantage",),
    reads=("gap.behaviour", "t", "mix", "positive", "negative"),
    fits=("diffusion",),
    vectors=("advantage",),
)
def nft(lp: LogProbs, labels: Labels, *, adv_clip_max: float = 5.0, adv_mode: Mode = "all") -> Loss:
    """DiffusionNFT: ``M (r P + (1 - r) N) / b`` with ``r = clip(A / (2 M) + 1 / 2, 0, 1)``.

    P and N are the clean-estimate errors of the branches ``v+ = b v + (1 - b) v_old`` and ``v- = (1 + b) v_old - b v``,
    each divided by its own mean absolute error without gradient. At v = v_old the gradient is ``A grad P``: advantage
    weighted matching with a self-normalised error. The behaviour policy is an average of the policy
    (``anchors.linear_decay``). Without the negative branch training collapses.

    Args:
        lp: log-probs of policy and behaviour, their gap, ``t``, the branch strength ``mix`` (b) and the branches' mean
            absolute velocity errors ``positive`` and ``negative`` without gradient, all (B, K, U).
        labels: ``advantage`` (B, K) or (B, K, U).
        adv_clip_max: M; 5 in the release.
        adv_mode: which part of the advantage counts, see ``credit.mode``.
    """
    r = optimality_probability(advantage(lp, labels, None), clip_max=adv_clip_max, kind=adv_mode)
    positive, negative = branch_losses(lp)
    b = torch.where(lp.mask > 0, lp.extra["mix"], 1.0)
    return per_candidate(lp, adv_clip_max * (r * positive + (1 - r) * negative) / b)


@objective(
    k=None,
    paper="arXiv:2503.22677, DRO loss equation; release RuiningLi/dso finetune.py",
    labels=("desirable",),
    fits=("diffusion",),
)
def difference(lp: LogProbs, labels: Labels, *, per: Literal["candidate", "record"] = "candidate") -> Loss:
    """DSO's DRO: ``(2 o - 1) E``, plus the error of stable samples and minus that of unstable ones. No reference.

    Unbounded below: only the length of training, or an extra penalty, holds it. Not a value to stop early on.

    Args:
        lp: minus the errors (B, K, U), scale 1.
        labels: ``desirable`` (B, K), 1 or 0.
        per: ``candidate`` averages over samples, as in the paper; ``record`` sums a record's candidates first: the
            release's ``E_w - E_l``, twice as large on pairs.
    """
    value = (1 - 2 * labels["desirable"].to(lp.by_role["policy"].dtype)) * lp.mean()
    if per == "candidate":
        return Loss(value, lp.exists)
    return Loss(torch.where(lp.exists > 0, value, 0.0).sum(1), lp.exists.amax(1))
