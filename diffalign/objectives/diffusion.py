"""Pair objectives that came with diffusion models: soft labels, labels per frame, two conditions on one image."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from diffalign.objectives.links import logistic
from diffalign.objectives.pair import oriented, per_unit
from diffalign.registry import objective
from diffalign.types import Labels, LogProbs, Loss, Role

PICKSCORE = (0.11543526500463486, 0.28201571106910706)
"""Smallest and largest cosine in the release of SmPO."""


def errors(lp: LogProbs, role: Role = "policy") -> Tensor:
    """(B, K): mean squared error of a role's prediction, whatever scale the log-probs have."""
    return -lp.mean(role) / lp.scale


def lead(reward: Tensor, low: float, high: float) -> Tensor:
    """(B,): ``2 p - 1`` with p the odds that candidate 0 is better, a softmax of scores min-max normalised, unclipped.

    As ``tanh`` of half the gap, which keeps its digits near a tie.
    """
    return torch.tanh((reward[:, 0] - reward[:, 1]) / (2 * (high - low)))


@objective(
    k=2,
    paper="arXiv:2506.02698, loss equation; release JaydenLyh/SmPO",
    roles=("reference",),
    identity=math.log(2),
    differences=True,
)
def smoothed(
    lp: LogProbs,
    labels: Labels,
    *,
    beta: float,
    gamma: float = 10.0,
    kind: Literal["score", "probability"] = "score",
    score_min: float = PICKSCORE[0],
    score_max: float = PICKSCORE[1],
) -> Loss:
    """SmPO: ``-log sigmoid(beta gamma (2 p_w - 1) Delta)``, with a soft preference ``p_w`` from scores.

    ``p_w`` is the softmax of the two scores after ``(s - score_min) / (score_max - score_min)``. A tie multiplies the
    margin by 0: it stays in the mean with ln 2 and no gradient, as in the release, and is never a win. The release
    applies the probability of the first pair to the whole batch; here every pair has its own.

    Args:
        lp: policy and reference log-probs, (B, 2, U).
        labels: ``reward`` (B, 2).
        beta: strength, 1 / log-prob, at scale 1/2 in the published unit.
        gamma: multiplies the soft preference; 10 in the release, 1 with certain labels is DPO.
        kind: ``reward`` holds scores, or the ``probability`` of each candidate to be the better one.
        score_min: smallest score, not read for probabilities; that of PickScore cosines in the release.
        score_max: largest score, likewise.
    """
    reward = labels["reward"].to(lp.by_role["policy"].dtype)
    gap = lead(reward, score_min, score_max) if kind == "score" else reward[:, 0] - reward[:, 1]
    ratio = lp.ratio()
    return Loss(logistic(beta * gamma * gap * (ratio[:, 0] - ratio[:, 1])), lp.exists.prod(1))


@objective(
    k=2,
    paper="arXiv:2506.03517 eq. 7 and appendix A.3",
    roles=("reference",),
    identity=math.log(2),
    optional=("segment",),
    vectors=("reward", "segment"),
)
def dense(
    lp: LogProbs,
    labels: Labels,
    *,
    beta: float,
    segment_reduction: Literal["token_mean", "segment_sum", "per_segment"] = "token_mean",
) -> Loss:
    """DenseDPO: ``-log sigmoid(beta mean_f l[f] (h_0[f] - h_1[f]))`` over the frames f whose label is no tie.

    ``l[f]`` is +1 where candidate 0 is better and -1 where candidate 1 is. Equation 7 has the sum inside the logistic,
    appendix A.3 an average over tokens: together the default. A pair of ties alone has weight 0; with one label for
    all frames it is DPO on the mean log-ratio. The text has no factor 1/2 (scale 1).

    Args:
        lp: policy and reference log-probs, (B, 2, U), one unit per latent frame.
        labels: ``reward`` (B, 2, U), the higher candidate wins that unit, equal rewards are left out; or (B, 2) for
            one label. Optional ``segment`` (B, 2, U) says which segment a unit belongs to; each its own without it.
        beta: strength, 1 / log-prob; 500 in the paper.
        segment_reduction: ``token_mean``; ``segment_sum``, equation 7 to the letter: means of segments, summed; or
            ``per_segment``: one logistic per segment, averaged over the segments of a pair.
    """
    gap, counted = _gaps(lp, labels)
    weight = (counted.sum(1) > 0) * lp.exists.prod(1)
    if segment_reduction != "per_segment":
        return Loss(logistic(beta * dense_margin(lp, labels, segment_reduction)), weight)
    means, share = _by_segment(gap, counted, _segment(lp, labels))
    return Loss((share * logistic(beta * means)).sum(1) / share.sum(1).clamp_min(1), weight)


def dense_margin(lp: LogProbs, labels: Labels, segment_reduction: str) -> Tensor:
    """(B,): the winner's log-ratio less the loser's, averaged over the units that count, or per segment and summed."""
    gap, counted = _gaps(lp, labels)
    if segment_reduction == "segment_sum":
        means, share = _by_segment(gap, counted, _segment(lp, labels))
        return (share * means).sum(1)
    return gap.sum(1) / counted.sum(1).clamp_min(1)


def _gaps(lp: LogProbs, labels: Labels) -> tuple[Tensor, Tensor]:
    """(B, U): the winner's log-ratio less the loser's per unit, and 1 for units with a winner in both candidates."""
    reward = per_unit(lp, labels, "reward")
    ratio = lp.unit_ratio()
    side = torch.sign(reward[:, 0] - reward[:, 1]).to(ratio.dtype)
    counted = (lp.mask > 0).all(1) * side.abs()
    return counted * side * (ratio[:, 0] - ratio[:, 1]), counted


def _segment(lp: LogProbs, labels: Labels) -> Tensor | None:
    """(B, 2, U): which segment a unit belongs to, None for each its own."""
    return per_unit(lp, labels, "segment").expand_as(lp.mask) if "segment" in labels else None


def _by_segment(gap: Tensor, counted: Tensor, segment: Tensor | None) -> tuple[Tensor, Tensor]:
    """(B, U): the mean gap of the segment of a unit, and shares that sum to 1 over what counts of a segment."""
    if segment is None:
        return gap, counted
    together = (segment[..., None] == segment[..., None, :]).all(1).to(gap.dtype)
    size = (together @ counted[..., None])[..., 0].clamp_min(1)
    return (together @ gap[..., None])[..., 0] / size, counted / size


class Contrast(NamedTuple):
    """What two conditions do to the error of one image, (B,) each."""

    policy: Tensor
    """Error under the better condition minus that under the worse, with gradient."""
    reference: Tensor
    pull: Tensor
    """``sigmoid(beta scale (policy - reference))``, the weight of a pair in the gradient of DPO, detached."""
    weight: Tensor


def contrast(lp: LogProbs, labels: Labels, beta: float) -> Contrast:
    """Differences of errors between two conditions; without weight for ties, padding and rows at t = 0."""
    difference, weight = oriented(errors(lp), lp, labels)
    reference, _ = oriented(errors(lp, "reference"), lp, labels)
    pull = torch.sigmoid(beta * lp.scale * (difference - reference)).detach()
    clean = (lp.extra["t"] == 0) & (lp.mask > 0)
    return Contrast(difference, reference, pull, weight * ~clean.flatten(1).any(1))


@objective(
    k=2,
    paper="arXiv:2511.04753, loss equation; release ZonglinL/CPO",
    roles=("reference",),
    reads=("t",),
    fits=("diffusion",),
)
def condition(lp: LogProbs, labels: Labels, *, beta: float, margin: float = 0.01, smoothing: float = 0.1) -> Loss:
    """Condition PO: ``(1 - e) a max(0, D + m) + e (1 - a) max(0, m - D)`` for two conditions on one noisy image.

    D is the error under the better condition minus that under the worse, ``a = sigmoid(beta scale (D - D_ref))``
    without gradient. Where the hinge is active this has the gradient of DPO but for its factor ``beta scale``; beta
    shapes the weight alone. Rows at t = 0 have weight 0. The pre-training loss of the method, under the better
    condition with its own draw, is a separate ``sft`` term. Not the CPO of language models, which is ``contrastive``.

    Args:
        lp: policy and reference log-probs, (B, 2, U); ``extra["t"]`` the time.
        labels: ``reward`` (B, 2): which condition the image fulfils better.
        beta: strength of the weight, 1 / log-prob; at scale 1/2 the published unit (5000).
        margin: m, in mean squared error; 0.01 in most launchers (canny 0.005, line art 0.03).
        smoothing: e; 0.1 in the main script of the release, 0 in its DINO script. It pulls pairs back together that
            are far apart, which makes the loss rise late in training.
    """
    difference, _, pull, weight = contrast(lp, labels, beta)
    value = (1 - smoothing) * pull * torch.relu(difference + margin)
    if smoothing:
        value = value + smoothing * (1 - pull) * torch.relu(margin - difference)
    return Loss(value, weight)
