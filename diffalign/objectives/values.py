"""Objectives over single candidates that regress the log-ratio on rewards, values or advantages."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from diffalign.errors import UserError
from diffalign.objectives.pair import per_unit
from diffalign.registry import objective
from diffalign.types import Labels, LogProbs, Loss

Granularity = Literal["token", "step", "response"]


def mean_over(values: Tensor, where: Tensor) -> Tensor:
    """(B, K): the mean of (B, K, U) values over the units chosen by a 0/1 mask; 0 where it chooses none."""
    return torch.where(where > 0, values, 0.0).sum(-1) / where.sum(-1).clamp_min(1)


def value_target(lp: LogProbs, labels: Labels, tau: float) -> Tensor:
    """(B, K, 1): what DRO's value should be, ``R - tau h`` with the log-ratio h of the whole candidate."""
    ratio = lp.ratio()
    return (labels["reward"].to(ratio.dtype) - tau * ratio)[..., None]


@objective(
    k=1,
    paper="arXiv:2405.19107 eq. 4, 7 and 8",
    roles=("reference",),
    labels=("reward",),
    reads=("values",),
)
def dro_v(lp: LogProbs, labels: Labels, *, tau: float = 1.0, joint: bool = False) -> tuple[Loss, ...]:
    """DRO-V: ``1/2 d^2`` with ``d = R - V - tau h``, as a policy loss over tau and a value loss.

    The policy's gradient is ``-d grad log pi``, the joint one over tau, which is part of the method: the joint problem
    is ill-conditioned. The value's gradient is ``-d grad V``. V is no variance baseline: data are off-policy, so
    without it the solution is biased. The paper's algorithm box prints the penalty without tau; this is its equation.

    Args:
        lp: policy and reference, and ``values`` (B, K, U) of a second network, one per position (the paper's
            "multiple values"), averaged over a candidate's positions.
        labels: ``reward`` (B, K), standardised over the data set.
        tau: KL strength, in reward per nat; 1 in the paper.
        joint: both networks descend ``1/2 d^2`` itself (eq. 4), the policy with a gradient tau times smaller.
    """
    target = value_target(lp, labels, tau)
    values = lp.counted(lp.extra["values"])

    def loss(d: Tensor, scale: float = 0.5) -> Loss:
        return Loss(mean_over(scale * d.square(), lp.mask), lp.exists)

    if joint:
        return (loss(target - values),)
    return loss(target - values.detach(), 0.5 / tau), loss(target.detach() - values)


@objective(k=None, paper="arXiv:2412.18279, policy loss equation", roles=("reference",), labels=("advantage",))
def direct_advantage(lp: LogProbs, labels: Labels, *, beta: float) -> Loss:
    """Direct advantage policy optimisation: ``1/2 (beta h - A)^2`` per step of reasoning.

    At policy = reference the gradient is ``-beta A``: advantage-weighted imitation, without pairs. The quadratic form
    is the paper's; which of A and h carries the factor is our reading, no code being public.

    Args:
        lp: policy and reference on candidates that are one step each, given the steps before.
        labels: ``advantage`` (B, K), see :func:`diffalign.token_credit.step_advantages`.
        beta: KL strength, in advantage per nat.
    """
    ratio = lp.ratio()
    return Loss((beta * ratio - labels["advantage"].to(ratio.dtype)).square() / 2, lp.exists)


def step_ratios(ratios: Tensor, starts: Tensor) -> Tensor:
    """(B, K, U): at every start of a step, the sum of the ratios from there to the next start."""
    step = starts.long().cumsum(-1)
    sums = torch.zeros_like(torch.cat([ratios, ratios[..., :1]], -1))  # one more: step 0 is before the first start
    return sums.scatter_add(-1, step, ratios).gather(-1, step)


@objective(
    k=1,
    paper="arXiv:2412.16145, soft Bellman loss equations; release jwhj/OREO",
    roles=("reference",),
    labels=("reward",),
    reads=("values", "kl"),
    fits=("text",),
    optional=("state",),
    vectors=("state",),
)
def oreo(
    lp: LogProbs, labels: Labels, *, beta: float = 0.03, granularity: Granularity = "token", kl_reg: float = 0.01
) -> tuple[Loss, ...]:
    """OREO: the soft Bellman equation, telescoped: ``V_t - R + beta sum_{i >= t} l_i = 0`` at every state t.

    Value loss: its square with the log-ratios held fixed, averaged over states, then over sequences. Policy loss: the
    same with V fixed and, of the log-ratios, only those of the state's own action free. That stop-gradient on the
    future keeps the gradient of every action at one scale. Third part: ``kl_reg`` times the mean KL per token.

    Args:
        lp: policy and reference, ``values`` (B, K, U) before each token, and ``kl`` (B, K, U), the exact KL(policy ||
            reference) over the vocabulary, with gradient. The release steps the critic first but hands the policy the
            values from before that step, as one loss does.
        labels: ``reward`` (B, K) at the end, 0 or 1 in the paper; for steps also ``state`` (B, K, U), 1 at the first
            token of each; without it every token is a step.
        beta: KL strength, in reward per nat; 0.03 in paper and release.
        granularity: an action is a ``token``, a ``step`` or the whole ``response``; in the last case the policy has one
            state, the value still one per token.
        kl_reg: 0.01 in the paper; 0 leaves ``kl`` unread.
    """
    ratios = lp.unit_ratio()
    future = ratios.flip(-1).cumsum(-1).flip(-1)
    values = lp.counted(lp.extra["values"])
    error = values - labels["reward"].to(values.dtype)[..., None]
    states = lp.mask * (per_unit(lp, labels, "state") if "state" in labels else lp.mask)
    if granularity == "token":
        acts, own = states, ratios
    elif granularity == "step":
        acts, own = states, step_ratios(ratios, states)
    elif granularity == "response":
        acts, own = states * (states.cumsum(-1) == 1), future
    else:
        raise UserError(f"unknown granularity {granularity!r}: choose token, step or response")
    value = (error + beta * future.detach()).square()
    policy = (error.detach() + beta * (own + (future - own).detach())).square()
    parts = [Loss(mean_over(value, states), lp.exists), Loss(mean_over(policy, acts), lp.exists)]
    if kl_reg:
        parts.append(Loss(kl_reg * mean_over(lp.extra["kl"], lp.mask), lp.exists))
    return tuple(parts)
