"""Self-play objectives: regressions and policy gradients of preference games, on samples judged against each other.

``win_prob`` is the probability of being preferred, (B, K): by the mean of a candidate over the other samples of its
prompt (SPPO, DNO), over a third sample (EGPO), or over the other candidate of the pair, ``P(0 beats 1)`` and
``P(1 beats 0)``. Where only the pair matters, the two are antisymmetrised, which averages both orders of a judge.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from torch import Tensor

from diffalign.errors import UserError
from diffalign.objectives.links import logistic
from diffalign.objectives.pair import Normalize, oriented
from diffalign.registry import objective
from diffalign.types import Labels, LogProbs, Loss, Role


def win_gap(lp: LogProbs, labels: Labels) -> Tensor:
    """(B, 2): each candidate's win probability minus the other's."""
    win = labels["win_prob"].to(lp.by_role["policy"].dtype)
    return win - win.flip(1)


def self_play_target(lp: LogProbs, labels: Labels, variant: str) -> Tensor:
    """SPPO's ``P - 1/2`` (B, 2) under a variant."""
    if variant == "soft":
        return labels["win_prob"].to(lp.by_role["policy"].dtype) - 0.5
    if variant == "single":
        return win_gap(lp, labels) / 2
    if variant == "hard":
        return win_gap(lp, labels).sign() / 2
    raise UserError(f"unknown variant {variant!r}: choose soft, single or hard")


@objective(
    k=2,
    paper="arXiv:2405.00675, loss equation of algorithm 1; release uclaml/SPPO",
    roles=("reference",),
    labels=("win_prob",),
)
def sppo(
    lp: LogProbs,
    labels: Labels,
    *,
    eta: float = 1000.0,
    variant: Literal["soft", "single", "hard"] = "soft",
    reduction: Literal["half_sum", "sum"] = "half_sum",
) -> Loss:
    """SPPO: ``1/2 sum_i (h_i - eta (P_i - 1/2))^2`` over both candidates, h against the iterate that made the data.

    Pointwise: the winner rises in absolute terms, unlike under DPO. Targets are hundreds of nats, so that the loss is
    nearly linear and learning rate and clipping set the step.

    Args:
        lp: the reference is the previous iterate, renewed every round.
        labels: ``win_prob`` (B, 2).
        eta: 1 / beta; 1000 in the release.
        variant: ``soft`` takes P as it is, ``single`` the pair's own ``1/2 + (P_0 - P_1) / 2``, ``hard`` 1 and 0 (1/2
            for ties), the targets of TRL's ``sppo_hard``.
        reduction: ``sum`` leaves out the 1/2, as TRL does.
    """
    if reduction not in ("half_sum", "sum"):
        raise UserError(f"unknown reduction {reduction!r}: choose half_sum or sum")
    error = (lp.ratio() - eta * self_play_target(lp, labels, variant)).square().sum(1)
    return Loss(error / 2 if reduction == "half_sum" else error, lp.exists.prod(1))


def win_target(lp: LogProbs, labels: Labels, variant: str) -> Tensor:
    """DNO's probability (B,) that candidate 0 is the better one, under a variant."""
    gap = win_gap(lp, labels)[:, 0]
    if variant == "soft":
        return gap.sigmoid()
    if variant == "prct":
        return (1 + gap.sign()) / 2
    raise UserError(f"unknown variant {variant!r}: choose soft or prct")


@objective(
    k=2,
    paper="arXiv:2404.03715 eq. 8 and 13",
    roles=("reference",),
    labels=("win_prob",),
    identity=math.log(2),
    differences=True,
)
def dno(lp: LogProbs, labels: Labels, *, eta: float, variant: Literal["soft", "prct"] = "soft") -> Loss:
    """DNO: cross-entropy of ``sigmoid(eta (h_0 - h_1))`` to ``sigmoid(P_0 - P_1)``, h against the current iterate.

    Args:
        lp: the reference is the current iterate, renewed every round.
        labels: ``win_prob`` (B, 2), the expected win rate of each candidate. As P is in [0, 1], soft targets are
            within 0.27 to 0.73; scaling P and eta together sharpens them and keeps the optimum.
        eta: strength in the unit of 1 / nat.
        variant: ``soft`` is algorithm 1; ``prct`` is algorithm 2, the target 1 for the candidate that wins more (ties
            have weight 0), which is DPO. Its restriction to pairs with a large gap is left to the data.
    """
    target = win_target(lp, labels, variant)
    ratio = lp.ratio()
    logit = eta * (ratio[:, 0] - ratio[:, 1])
    weight = lp.exists.prod(1)
    weight = weight * (target != 0.5) if variant == "prct" else weight
    return Loss(target * logistic(logit) + (1 - target) * logistic(-logit), weight)


def anchored_gap(
    lp: LogProbs, labels: Labels, anchors: Mapping[Role, float], how: Normalize = "sum"
) -> tuple[Tensor, Tensor]:
    """Winner minus loser of ``log policy - sum_j weight_j log anchor_j`` (B,), and a weight (B,) that is 0 for ties."""
    reduce = lp.sum if how == "sum" else lp.mean
    score = reduce("policy") - sum(weight * reduce(role) for role, weight in anchors.items())
    return oriented(score, lp, labels)


@objective(k=2, paper="arXiv:2407.00617, loss equation of algorithm 1", roles=("reference", "prev"))
def inpo(lp: LogProbs, labels: Labels, *, eta: float = 0.0075, reference_weight: float = 1 / 3) -> Loss:
    """INPO: ``(g - 1 / (2 eta))^2``, g the winner's gap over a mixture of reference and previous iterate.

    ``g = gap of (log policy - tau/eta log reference - (1 - tau/eta) log prev)``.

    Args:
        lp: roles ``reference`` and ``prev``, the iterate that made the data.
        labels: ``reward`` (B, 2); equal rewards have weight 0.
        eta: inverse step size; a loss of 1e3 to 1e4 is normal at small eta. The default is that of MNPO's release.
        reference_weight: tau / eta, with tau the game's KL strength. 0 is mirror descent without anchor, 1 is IPO on
            sums with tau = eta. 1/3 in MNPO's release.

    One table of arXiv:2509.23102 prints the target as ``1 / (2 tau)``; its proofs and code have ``1 / (2 eta)``.
    """
    gap, weight = anchored_gap(lp, labels, {"reference": reference_weight, "prev": 1 - reference_weight})
    return Loss((gap - 1 / (2 * eta)).square(), weight)


def history_anchors(
    lp: LogProbs, reference_weight: float, history_weights: Sequence[float], max_history: int
) -> dict[Role, float]:
    """MNPO's anchors: the reference, and the iterates there are, newest first, with normalised weights."""
    there = (f"history.{age}" for age in range(max_history))
    history = [role for role in there if role in lp.by_role]
    weights = list(history_weights[: len(history)])
    if len(weights) < len(history):
        raise UserError(f"history_weights {list(history_weights)} are fewer than the {len(history)} iterates")
    total = sum(weights)
    share = [weight / total if total else 1 / len(weights) for weight in weights]
    mixture = {role: (1 - reference_weight) * part for role, part in zip(history, share, strict=True)}
    return {"reference": reference_weight, **mixture}


@objective(
    k=2,
    paper="arXiv:2509.23102, loss equation; release smiles724/MNPO",
    roles=("reference", "history.0", "history.1"),
)
def mnpo(
    lp: LogProbs,
    labels: Labels,
    *,
    eta: float = 0.0075,
    reference_weight: float = 1 / 3,
    history_weights: Sequence[float] = (1.0, 0.0),
    max_history: int = 2,
    length_normalize: bool = False,
) -> Loss:
    """MNPO: INPO with a weighted mixture of several previous iterates in place of one.

    Args:
        lp: roles ``reference`` and ``history.0`` (newest), ``history.1`` ...; without any, only the reference term is
            left, with its factor, as in the release.
        labels: ``reward`` (B, 2); equal rewards have weight 0.
        eta: inverse step size; the target is ``1 / (2 eta)``. 0.0075 in the release.
        reference_weight: the reference's share; 1/3 in the release.
        history_weights: of the iterates, newest first, normalised over those there are (equal if they sum to 0); the
            release's (1, 0) drops all but the newest.
        max_history: how many iterates count; 2 in the release.
        length_normalize: log-probs per token, as the release does by inheriting SimPO's forward; a target of 66.7 nats
            is then out of reach and the loss linear. The paper has sums.
    """
    anchors = history_anchors(lp, reference_weight, history_weights, max_history)
    gap, weight = anchored_gap(lp, labels, anchors, "mean" if length_normalize else "sum")
    return Loss((gap - 1 / (2 * eta)).square(), weight)


def preference_gap(lp: LogProbs, labels: Labels, target: str) -> Tensor:
    """Online IPO's T (B,): of candidate 0 over candidate 1."""
    gap = win_gap(lp, labels)[:, 0]
    if target == "vs_third":
        return gap
    if target == "half":
        return gap / 2
    raise UserError(f"unknown target {target!r}: choose vs_third or half")


@objective(
    k=2,
    paper="arXiv:2503.08942, online IPO equation; arXiv:2403.08635 (online IPO, IPO-MD)",
    roles=("reference",),
    labels=("win_prob",),
    differences=True,
)
def online_ipo(
    lp: LogProbs,
    labels: Labels,
    *,
    beta: float = 0.1,
    target: Literal["vs_third", "half"] = "half",
    length_normalize: bool = False,
) -> Loss:
    """Online IPO, IPO-MD and EGPO: ``(h_0 - h_1 - T / beta)^2``.

    Who samples makes the method: the policy (online IPO), a geometric mixture with the reference (IPO-MD), or any
    exploratory law with an opponent's sample to judge against (EGPO).

    Args:
        lp: policy and fixed reference.
        labels: ``win_prob`` (B, 2).
        beta: KL strength of the game; 0.1 in EGPO's release.
        target: ``half`` judges the two against each other, ``T = P(0 beats 1) - 1/2``; with P in {0, 1} this is IPO on
            sums with tau = beta. ``vs_third`` judges both against a third, ``T = P_0 - P_1``.
        length_normalize: log-ratios per token, as EGPO's release does; both papers have sums.
    """
    ratio = lp.ratio("mean" if length_normalize else "sum")
    error = ratio[:, 0] - ratio[:, 1] - preference_gap(lp, labels, target) / beta
    return Loss(error.square(), lp.exists.prod(1))


@objective(
    k=1,
    paper="arXiv:2312.00886, policy-gradient equation of section 7",
    roles=("reference",),
    labels=("win_prob",),
    fits=("text",),
)
def nash_md(
    lp: LogProbs, labels: Labels, *, tau: float = 0.008, kl_credit: Literal["sequence", "token"] = "sequence"
) -> Loss:
    """Nash-MD: ``(tau sg(h) - (P - 1/2)) log pi(y)``, y from the policy, judged against a sample of the mixture.

    Args:
        lp: policy and fixed reference on the policy's own samples. Their opponents come from
            :func:`diffalign.likelihood.geometric_mixture`.
        labels: ``win_prob`` (B, 1), ``P(y beats y')``.
        tau: KL strength; 0.008 in the paper, 0.1 in TRL.
        kl_credit: ``token`` multiplies every token's log-prob by its own log-ratio only, as TRL did: that drops the
            credit of later tokens and is biased for sequences.
    """
    log_prob = lp.sum()
    if kl_credit == "token":
        penalty = (lp.unit_ratio().detach() * lp.counted(lp.by_role["policy"])).sum(-1)
    elif kl_credit == "sequence":
        penalty = lp.ratio().detach() * log_prob
    else:
        raise UserError(f"unknown kl_credit {kl_credit!r}: choose sequence or token")
    win = labels["win_prob"].to(log_prob.dtype) - 0.5
    return Loss(tau * penalty - win * log_prob, lp.exists)
