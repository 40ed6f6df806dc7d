"""Training times drawn in strata (AWM, arXiv:2509.25050; release scxue/advantage_weighted_matching).

``discrete`` kinds choose entries of the sampling grid, one per stratum (the release shares them in a micro-batch);
``uniform`` and ``logit_normal`` choose times in [0, 1] that the schedule's shift is applied to. Randomness comes in as
uniform numbers, so that every function here is exact and repeatable.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["discrete", "discrete_wo_init", "discrete_with_init"]


def strata(kind: Kind, count: int, levels: int) -> tuple[Tensor, Tensor]:
    """Lower and upper index bounds of the strata, int64.

    Args:
        kind: ``discrete`` cuts [0, levels); ``discrete_wo_init`` cuts [1, levels) and so never trains at pure noise;
            ``discrete_with_init`` cuts [1, levels) too, for all but the first time, which is index 0.
        count: number of training times.
        levels: grid entries that may be trained on, ``int(steps * fraction)`` in the release.
    """
    first, cuts = (0, count) if kind == "discrete" else (1, count - (kind == "discrete_with_init"))
    bounds = torch.tensor([first + index * (levels - first) // cuts for index in range(cuts + 1)] if cuts else [0])
    return bounds[:-1], bounds[1:]


def discrete(kind: Kind, count: int, levels: int, u: Tensor) -> Tensor:
    """(..., count) grid indices: one uniform number (in [0, 1)) per stratum, along the last dimension."""
    lower, upper = (bound.to(u.device) for bound in strata(kind, count, levels))
    if u.shape[-1:] != lower.shape:
        raise ValueError(f"{kind}: {len(lower)} uniform numbers expected, got {tuple(u.shape)}")
    index = lower + (u * (upper - lower)).long()
    return torch.nn.functional.pad(index, (1, 0)) if kind == "discrete_with_init" else index


def uniform(u: Tensor, keys: Tensor, shifted: Callable[[Tensor], Tensor], low: float = 0.2) -> Tensor:
    """(T, N) times: strata of [low, 1] per sample, shuffled per column by the order of ``keys``, then shifted.

    Args:
        u, keys: (T, N) uniform numbers.
        shifted: the schedule's static shift.
        low: where the strata begin before the shift; 0.2 in the release.
    """
    cut = (torch.arange(len(u), dtype=u.dtype, device=u.device)[:, None] + u) / len(u)
    return shifted((low + (1 - low) * cut).gather(0, keys.argsort(0)))


def logit_normal(u: Tensor, order: Tensor, shifted: Callable[[Tensor], Tensor], floor: float = 0.01) -> Tensor:
    """(T,) times: stratified standard normal quantiles, shuffled, through a sigmoid and the shift, at least ``floor``.

    Args:
        u: (T,) uniform numbers.
        order: (T,) a permutation of 0 .. T - 1.
        shifted: the schedule's static shift.
        floor: 0.01 in the release.
    """
    if u.ndim != 1 or u.shape != order.shape:
        raise ValueError(f"logit_normal: one number per time expected, got {tuple(u.shape)} and {tuple(order.shape)}")
    cut = (torch.arange(len(u), dtype=u.dtype, device=u.device) + u) / len(u)
    quantile = torch.special.ndtri(cut.clamp(1e-7, 1 - 1e-7))
    return shifted(quantile[order].sigmoid()).clamp_min(floor)


def subset(keys: Tensor, count: int | None) -> Tensor:
    """Random indices without repetition along the last dimension, by the order of uniform ``keys``; None for all."""
    return keys.argsort(-1)[..., :count]
