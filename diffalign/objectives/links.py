"""Losses of one number: a margin that should be large."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def logistic(logit: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """``-(1 - e) log sigmoid(z) - e log sigmoid(-z)``: the cross-entropy of a label that is wrong with odds e.

    Not softplus, which torch cuts off at 20: 2e-9 off.
    """
    value = -F.logsigmoid(logit)
    if label_smoothing:
        value = (1 - label_smoothing) * value - label_smoothing * F.logsigmoid(-logit)
    return value


def exponential(logit: Tensor) -> Tensor:
    """``exp(-z)``, flat where it would overflow (beyond 80 in float32, as TRL clamps)."""
    return torch.exp((-logit).clamp_max(80.0 if logit.dtype == torch.float32 else 600.0))


LINKS: dict[str, Callable[[Tensor], Tensor]] = {
    "logistic": logistic,
    "hinge": lambda z: torch.relu(1 - z),
    "squared": lambda z: (z - 1).square(),
    "exponential": exponential,
    "truncated_quadratic": lambda z: torch.relu(1 - z).square(),
    "savage": lambda z: torch.sigmoid(-z).square(),
}
"""GPO's family (arXiv:2402.05749 table 1); all but savage are convex."""
