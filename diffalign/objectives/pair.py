"""Objectives over two candidates with a reference. Order never encodes preference: the larger reward wins."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from diffalign.registry import objective
from diffalign.types import Labels, LogProbs, Loss


def oriented_margin(lp: LogProbs, labels: Labels) -> tuple[Tensor, Tensor]:
    """Implicit reward of the preferred candidate minus that of the other, without beta.

    Returns:
        margin (B,) and weight (B,): 0 for ties and for rows in which a candidate is padding.
    """
    ratio = lp.ratio()
    preference = torch.sign(labels["reward"][:, 0] - labels["reward"][:, 1]).to(ratio.dtype)
    present = (lp.mask.sum(-1) > 0).all(1)
    return preference * (ratio[:, 0] - ratio[:, 1]), preference.abs() * present


@objective(
    k=2, paper="arXiv:2305.18290 eq. 7; diffusion: arXiv:2311.12908 eq. 14", roles=("reference",), identity=math.log(2)
)
def sigmoid(lp: LogProbs, labels: Labels, *, beta: float, label_smoothing: float = 0.0) -> Loss:
    """DPO: ``-log sigmoid(beta (log-ratio of the winner - log-ratio of the loser))``.

    Args:
        lp: policy and reference log-probs, (B, 2, U).
        labels: ``reward`` (B, 2); the higher candidate wins, equal rewards have weight 0.
        beta: strength in the unit of 1 / log-prob. For diffusion the log-prob is ``-scale * mean squared error``
            with scale 1/2 in the Diffusion-DPO row, so beta 5000 is the published 5000 (coefficient 2500).
        label_smoothing: probability that a label is flipped (conservative DPO); 0 in the paper.

    Returns:
        ln 2 wherever policy = reference, yet with a gradient.
    """
    margin, weight = oriented_margin(lp, labels)
    logit = beta * margin
    value = -F.logsigmoid(logit)
    if label_smoothing:
        value = (1 - label_smoothing) * value - label_smoothing * F.logsigmoid(-logit)
    return Loss(value, weight)
