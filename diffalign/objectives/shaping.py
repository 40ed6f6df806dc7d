"""Transformations of log-probs that compose with any objective: f-divergence scores, token weights, suffixes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from diffalign.errors import UserError
from diffalign.registry import shaping
from diffalign.types import Labels, LogProbs

Divergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]


def divergence_score(ratio: Tensor, divergence: Divergence, alpha: float = 0.5) -> Tensor:
    """``f'(u)`` at ``u = exp(ratio)``, shifted to be 0 at ratio 0; reverse KL gives the ratio itself.

    The exponent is clamped where it would overflow (at 80 in float32, as TRL does): there the gradient is 0.
    """
    if divergence == "reverse_kl":
        return ratio
    if divergence == "js_divergence":
        return F.logsigmoid(ratio) + math.log(2)
    if divergence not in ("forward_kl", "alpha_divergence"):
        raise UserError(
            f"unknown divergence {divergence!r}: choose reverse_kl, forward_kl, js_divergence, alpha_divergence"
        )
    power = 1.0 if divergence == "forward_kl" else alpha
    if power == 0:
        return ratio
    largest = 80.0 if ratio.dtype == torch.float32 else 600.0
    return -torch.expm1((-power * ratio).clamp_max(largest)) / power


@shaping(paper="arXiv:2309.16240, theorem 1 and its loss equation", roles=("reference",), over="differences")
def f_divergence(lp: LogProbs, labels: Labels, *, divergence: Divergence, alpha: float = 0.5) -> LogProbs:
    """f-DPO: the log-ratio h of a candidate becomes the score ``s(h) = f'(exp h)``.

    ``h``, ``1 - exp(-h)``, ``ln 2 + log sigmoid(h)`` and ``(1 - exp(-alpha h)) / alpha``. The policy role then holds
    s(h) in one unit and the reference role 0, so that an objective's ``beta * ratio`` is the paper's reward (TRL logs
    ``beta h`` instead). The optimum fixes scores up to a constant per prompt only, hence pairs. Useful betas differ by
    orders of magnitude: 0.1 to 0.9 in the release, but 1e-5 to 3e-2 for forward KL, whose pairs die (loss and gradient
    0) once the loser's h is far below 0.

    Args:
        divergence: which f.
        alpha: of the alpha-divergence, between reverse KL (0) and forward KL (1) as in the paper; TRL's coefficient is
            1 - alpha.
    """
    score = divergence_score(lp.ratio(), divergence, alpha)[..., None]
    by_role = {"policy": score, "reference": torch.zeros_like(score)}
    return replace(lp, by_role=by_role, mask=torch.ones_like(score), gap={}, extra={})


@shaping(paper="arXiv:2402.13228, the condition of its eq. 3", roles=("reference",), labels=("reward",))
def winner_guard(lp: LogProbs, labels: Labels, *, tolerance: float = 0.0) -> LogProbs:
    """Where the best candidate has become worse than under the reference, the others are not pushed any further.

    DPO-Positive adds a penalty in that case; here the log-probs of the other candidates lose their gradient, which
    works with every objective: what is left of it raises the winner. No value changes.

    Args:
        tolerance: how far the winner's log-prob per unit may fall, in parts of the reference's.
    """
    reward = labels["reward"].to(lp.mask)
    best = reward == reward.masked_fill(lp.exists == 0, -torch.inf).amax(1, keepdim=True)
    policy, reference = lp.mean().detach(), lp.mean("reference")
    fallen = ((policy < reference - tolerance * reference.abs()) & best & (lp.exists > 0)).any(1, keepdim=True)
    free = (best | ~fallen)[..., None]
    own = lp.by_role["policy"]
    return replace(lp, by_role={**lp.by_role, "policy": torch.where(free, own, own.detach())})


def weighted(lp: LogProbs, weight: Tensor) -> LogProbs:
    """Every role's log-probs times a weight (B, K, U) per unit."""
    by_role = {role: lp.counted(weight * value) for role, value in lp.by_role.items()}
    return replace(lp, by_role=by_role)


def desensitised_weights(lp: LogProbs, alpha: float) -> Tensor:
    """(B, K, U): 1 for the counted units within the shortest candidate's length, alpha beyond, 0 for the masked."""
    lengths = lp.mask.sum(-1).masked_fill(lp.exists == 0, torch.inf)
    shared = lengths.amin(1)[:, None, None]
    counted = lp.mask.to(lp.by_role["policy"].dtype)
    return torch.where(lp.mask.cumsum(-1) <= shared, counted, alpha * counted)


@shaping(paper="arXiv:2409.06411, loss equation", over="pairs", fits=("text",))
def length_desensitised(lp: LogProbs, labels: Labels, *, alpha: float = 0.5) -> LogProbs:
    """LD-DPO: units past the length that both completions share count with weight alpha, in every role.

    Positions are counted among the units that count, so that holes in the mask (turns of a user or tool) do not shift
    them.

    Args:
        alpha: 1 leaves everything, 0 truncates at the shorter length; 0.5 as in TRL's documentation, best value
            depends on the model (arXiv:2409.06411).
    """
    return weighted(lp, desensitised_weights(lp, alpha))


def guided_weights(lp: LogProbs, labels: Labels, alpha: float, beta: float) -> Tensor:
    """(B, K, U): ``1 + alpha u`` for the better candidate, ``1 - alpha u`` for the other, 1 for ties, 0 if masked.

    ``u = beta (log guide - log reference)`` is the guide's reward of a unit, without gradient.
    """
    guide = lp.counted(lp.by_role["guide"] - lp.by_role["reference"]).detach()
    reward = labels["reward"]
    side = torch.sign(reward - reward.flip(1)).to(guide.dtype)[..., None]
    return lp.mask.to(guide.dtype) * (1 + alpha * beta * side * guide)


@shaping(
    paper="arXiv:2506.14574, loss equation; release dvlab-research/TGDPO",
    roles=("reference", "guide"),
    labels=("reward",),
    over="pairs",
    fits=("text",),
)
def token_guided(lp: LogProbs, labels: Labels, *, beta: float, alpha: float = 0.5) -> LogProbs:
    """TGDPO: ``sum_t (1 + alpha u_t) l_t`` for the winner and ``sum_t (1 - alpha u_t) l_t`` for the loser.

    ``l_t`` is a token's log-ratio, ``u_t = beta (log guide_t - log reference_t)`` its reward under a model trained
    before with DPO or SimPO on the same pairs (role ``guide``). Weights turn negative where ``|alpha u| > 1`` and are
    not clamped, as in the release. Metrics keep the unweighted ``beta h``.

    Args:
        beta: scale of the guide's reward; the paper and release use the objective's own beta.
        alpha: strength; 0 is DPO. 0.5 in the release.
    """
    return weighted(lp, guided_weights(lp, labels, alpha, beta))


@shaping(
    paper="arXiv:2405.00451, section 3.3; release YuxiXie/MCTS-DPO",
    labels=("ids",),
    over="pairs",
    fits=("text",),
    vectors=("ids",),
)
def first_difference(lp: LogProbs, labels: Labels) -> LogProbs:
    """MCTS-DPO: units count from the first one at which two completions with a common prefix differ.

    Reads ``ids`` (B, 2, U), the token of every unit. A unit counted in only one of the two differs. Pairs that never
    differ are skipped: they are marked as padding, which has weight 0 in every objective.
    """
    ids, counts = labels["ids"], lp.mask > 0
    differs = torch.where(counts.all(1), ids[:, 0] != ids[:, 1], counts.any(1))
    suffix = differs.cumsum(-1)[:, None] > 0
    present = lp.exists * differs.any(-1, keepdim=True)
    return replace(lp, mask=lp.mask * suffix, present=present)
