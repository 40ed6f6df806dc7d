"""Further losses of the DPO family over two candidates with a reference, under the names TRL gives them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from diffalign.errors import UserError
from diffalign.objectives.links import exponential, logistic
from diffalign.objectives.pair import oriented_margin, preferred
from diffalign.registry import objective
from diffalign.types import Labels, LogProbs, Loss


def _rewards(lp: LogProbs, labels: Labels, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Implicit rewards of winner and loser, and the weight, (B,) each."""
    margin, weight = oriented_margin(lp, labels)
    chosen = preferred(lp.ratio(), labels)
    return beta * chosen, beta * (chosen - margin), weight


@objective(k=2, paper="arXiv:2402.00856 eq. 16", roles=("reference",), differences=True)
def exo_pair(lp: LogProbs, labels: Labels, *, beta: float, label_smoothing: float = 1e-3) -> Loss:
    """EXO: the reverse KL ``KL(p || q)`` with ``p = (S(z), S(-z))``, ``q = (1 - e, e)``, ``z = beta Delta``.

    Mode-seeking where DPO, the forward KL, covers modes. Without smoothing it is infinite, so e must be positive.

    Args:
        lp: policy and reference log-probs, (B, 2, U).
        labels: ``reward`` (B, 2).
        beta: strength, 1 / log-prob.
        label_smoothing: e, above 0 and below 1/2; 1e-3 in the paper and TRL.
    """
    if not 0 < label_smoothing < 0.5:
        raise UserError(f"exo_pair: label_smoothing must be above 0 and below 0.5, got {label_smoothing}")
    margin, weight = oriented_margin(lp, labels)
    z = beta * margin
    first = torch.sigmoid(z) * (F.logsigmoid(z) - math.log1p(-label_smoothing))
    return Loss(first + torch.sigmoid(-z) * (F.logsigmoid(-z) - math.log(label_smoothing)), weight)


@objective(k=2, paper="arXiv:2402.05369, loss equation; TRL 'nca_pair'", roles=("reference",), identity=2 * math.log(2))
def nca_pair(lp: LogProbs, labels: Labels, *, beta: float) -> Loss:
    """Noise-contrastive alignment: ``-LS(r_w) - LS(-r_w) / 2 - LS(-r_l) / 2`` with ``r = beta h``.

    It fixes the level of both rewards, not only their difference, so the winner's likelihood does not fall away.

    Args:
        lp: policy and reference log-probs, (B, 2, U).
        labels: ``reward`` (B, 2).
        beta: strength, 1 / log-prob.
    """
    chosen, rejected, weight = _rewards(lp, labels, beta)
    return Loss(logistic(chosen) + 0.5 * logistic(-chosen) + 0.5 * logistic(-rejected), weight)


@objective(k=2, paper="arXiv:2404.04656, loss equation; TRL 'bco_pair'", roles=("reference",), identity=2 * math.log(2))
def bco_pair(lp: LogProbs, labels: Labels, *, beta: float) -> Loss:
    """Binary classifier: ``-LS(r_w) - LS(-r_l)`` with ``r = beta h``; TRL's paired form, without the reward shift.

    Args:
        lp: policy and reference log-probs, (B, 2, U).
        labels: ``reward`` (B, 2).
        beta: strength, 1 / log-prob.
    """
    chosen, rejected, weight = _rewards(lp, labels, beta)
    return Loss(logistic(chosen) + logistic(-rejected), weight)


@objective(k=2, paper="arXiv:2408.06266 eq. 7", roles=("reference",), identity=1.0)
def apo_zero(lp: LogProbs, labels: Labels, *, beta: float) -> Loss:
    """Anchored preference optimisation: ``1 - S(r_w) + S(r_l)``: winners up, losers down, each against the reference.

    For data that is better than what the model writes. Not the accelerated PO of arXiv:2410.06293.

    Args:
        lp: policy and reference log-probs, (B, 2, U).
        labels: ``reward`` (B, 2).
        beta: strength, 1 / log-prob.
    """
    chosen, rejected, weight = _rewards(lp, labels, beta)
    return Loss(torch.sigmoid(-chosen) + torch.sigmoid(rejected), weight)


@objective(k=2, paper="arXiv:2408.06266 eq. 8", roles=("reference",), identity=1.0)
def apo_down(lp: LogProbs, labels: Labels, *, beta: float) -> Loss:
    """Anchored preference optimisation: ``S(r_w) + 1 - S(r_w - r_l)``: both down, the loser further.

    For data that is worse than what the model writes.

    Args:
        lp: policy and reference log-probs, (B, 2, U).
        labels: ``reward`` (B, 2).
        beta: strength, 1 / log-prob.
    """
    chosen, rejected, weight = _rewards(lp, labels, beta)
    return Loss(torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen), weight)


@objective(
    k=2, paper="arXiv:2406.08414 eq. 5", roles=("reference",), identity=0.5 * math.log(2) + 0.5, differences=True
)
def discopop(lp: LogProbs, labels: Labels, *, beta: float, tau: float = 0.05) -> Loss:
    """DiscoPOP: ``(1 - s) softplus(-z) + s exp(-z)`` with ``z = beta Delta`` and ``s = S(z / tau)``.

    Args:
        lp: policy and reference log-probs, (B, 2, U).
        labels: ``reward`` (B, 2).
        beta: strength, 1 / log-prob.
        tau: width of the blend; 0.05 in the paper and TRL.
    """
    margin, weight = oriented_margin(lp, labels)
    z = beta * margin
    share = torch.sigmoid(z / tau)
    return Loss((1 - share) * logistic(z) + share * exponential(z), weight)
