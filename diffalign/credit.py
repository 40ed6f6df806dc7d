"""From rewards to what objectives read: advantages, pairs, preferences. Pure; rewards are those of all processes.

A group is all samples of one prompt in one round: G groups of S samples, NaN where a sample has no reward. Where
groups may differ in size, ``groups`` names each sample's group instead. Standard deviations use ``n - ddof``; a group
of one has standard deviation 0.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor

Spread = Literal["group", "all", "none"]
Mode = Literal["all", "positive_only", "negative_only", "one_only", "binary"]
Combine = Literal["sum", "normalised"]
Pairs = Literal["best_worst", "all"]

ALIKE = 1e-6
"""Share of the largest reward up to which rewards are equal."""


def _indices(groups: Sequence[Hashable]) -> tuple[list[int], int]:
    names = {name: index for index, name in enumerate(dict.fromkeys(groups))}
    return [names[name] for name in groups], len(names)


def _deviation(centred: Tensor, ddof: int) -> Tensor:
    return (centred.square().sum(0) / max(len(centred) - ddof, 1)).sqrt()


def standardised(
    rewards: Tensor, groups: Sequence[Hashable], *, spread: Spread = "group", ddof: int = 0, eps: float = 1e-4
) -> Tensor:
    """``(r - mean of the group) / (standard deviation + eps)``.

    ==========================================  ======  ====  =====
    used by                                     spread  ddof  eps
    ==========================================  ======  ====  =====
    Flow-GRPO, AWM, DiffusionNFT                all     0     1e-4
    GRPO-Guard, video configurations            group   0     1e-4
    DanceGRPO                                   group   1     1e-8
    GRPO for text (TRL)                         group   1     1e-4
    one group for all: DDPO without tracker     group   0     1e-8
    ==========================================  ======  ====  =====

    Args:
        rewards: (N,) or (N, M) for M rewards, each standardised alone.
        groups: N names.
        spread: standard deviation of the group, of all rewards of the round, or none (the difference alone).
        ddof: 0 population, 1 sample standard deviation.
        eps: added to the standard deviation; a constant group gets 0.
    """
    where, count = _indices(groups)
    index = torch.tensor(where, device=rewards.device)
    shape = (count, *rewards.shape[1:])
    size = torch.bincount(index, minlength=count).reshape(-1, *[1] * (rewards.ndim - 1)).to(rewards.dtype)
    mean = rewards.new_zeros(shape).index_add(0, index, rewards) / size
    centred = rewards - mean[index]
    if spread == "none":
        return centred
    if spread == "all":
        return centred / (_deviation(rewards - rewards.mean(0), ddof) + eps)
    squares = rewards.new_zeros(shape).index_add(0, index, centred.square())
    return centred / ((squares / (size - ddof).clamp_min(1)).sqrt()[index] + eps)


@dataclass
class Buffered:
    """A prompt is standardised by its last rewards once there are enough: DDPO's tracker (arXiv:2305.13301, release).

    Args:
        buffer_size, min_count: how many rewards of a prompt are kept, and needed before its own statistics count; until
            then those of the call do. 16 / 16, for the small prompt sets 32 / 16.
        ddof, eps: of the standard deviation; 0 and 1e-6 in the release.
        history: the rewards kept, by prompt.
    """

    buffer_size: int = 32
    min_count: int = 16
    ddof: int = 0
    eps: float = 1e-6
    history: dict[Hashable, deque[float]] = field(default_factory=dict)

    def restore(self, history: Mapping[Hashable, Sequence[float]]) -> None:
        """Continue from the rewards that were kept."""
        self.history = {name: deque(kept, maxlen=self.buffer_size) for name, kept in history.items()}

    def update(self, groups: Sequence[Hashable], rewards: Tensor) -> Tensor:
        """(N,) advantages; a prompt's history already holds the rewards of this call."""
        where, _ = _indices(groups)
        out = torch.empty_like(rewards)
        for position, name in enumerate(dict.fromkeys(groups)):
            rows = torch.tensor([row for row, index in enumerate(where) if index == position], device=rewards.device)
            kept = self.history.setdefault(name, deque(maxlen=self.buffer_size))
            kept.extend(rewards[rows].tolist())
            known = rewards if len(kept) < self.min_count else rewards.new_tensor(list(kept))
            out[rows] = (rewards[rows] - known.mean()) / (_deviation(known - known.mean(), self.ddof) + self.eps)
        return out


def advantages(
    reward: Tensor,
    *,
    spread: Spread = "group",
    ddof: int = 0,
    eps: float = 1e-4,
    prompts: Sequence[Hashable] = (),
    buffered: Buffered | None = None,
) -> Tensor:
    """(G, S) advantages of a round; 0 where there is no reward.

    Args:
        reward: (G, S), NaN where there is none.
        spread, ddof, eps: see :func:`standardised`.
        prompts: G names, for ``buffered``: groups of one prompt share its history, and nothing otherwise.
        buffered: standardises by a prompt's history instead.
    """
    valid = ~reward.isnan().flatten()
    out, flat = torch.zeros_like(reward).flatten(), reward.flatten()[valid]
    rows = torch.arange(len(reward), device=reward.device).repeat_interleave(reward.shape[1])[valid].tolist()
    if buffered is None:
        out[valid] = standardised(flat, rows, spread=spread, ddof=ddof, eps=eps)
    else:
        out[valid] = buffered.update([prompts[row] for row in rows], flat)
    return out.unflatten(0, reward.shape)


def alike(reward: Tensor) -> Tensor:
    """(G,) groups whose samples (G, S) have one reward up to rounding, or less than two with any: nothing to learn.

    The release of Flow-GRPO compares advantages with exactly 0, which lets a group of equal rewards such as 0.1 through
    when its mean is off in the last digit.
    """
    low, high = reward.nan_to_num(torch.inf).amin(1), reward.nan_to_num(-torch.inf).amax(1)
    few = (~reward.isnan()).sum(1) < 2
    return (high - low <= ALIKE * reward.nan_to_num(0.0).abs().amax()) | few


def pairs(reward: Tensor, how: Pairs) -> Tensor:
    """(G, P, 2) indices of samples: all pairs, or the best and the worst of a group, the first of equals.

    A group of equal rewards prefers nothing, whichever two samples stand for it; here the second and the first, as in
    the release of Flow-GRPO's online DPO.
    """
    size = reward.shape[1]
    if how == "all":
        return torch.tensor(list(combinations(range(size), 2))).expand(len(reward), -1, 2)
    best = reward.nan_to_num(-torch.inf).argmax(1)
    worst = reward.nan_to_num(torch.inf).argmin(1)
    return torch.stack([torch.where(best == worst, (worst + 1) % size, best), worst], 1)[:, None]


def mode(advantages: Tensor, kind: Mode) -> Tensor:
    """Which part of an advantage counts: all, one sign, 1 where positive, or the sign alone (DiffusionNFT release)."""
    if kind == "positive_only":
        return advantages.clamp_min(0)
    if kind == "negative_only":
        return advantages.clamp_max(0)
    if kind == "one_only":
        return (advantages > 0).to(advantages.dtype)
    return advantages.sign() if kind == "binary" else advantages


def optimality_probability(advantages: Tensor, *, clip_max: float = 5.0, kind: Mode = "all") -> Tensor:
    """``r = clip(A / (2 M) + 1 / 2, 0, 1)`` with ``A`` first clipped at ``M`` (arXiv:2509.16117, release).

    Args:
        advantages: standardised rewards, any shape.
        clip_max: M; 5 in the release.
        kind: see :func:`mode`.
    """
    clipped = mode(advantages.clamp(-clip_max, clip_max), kind)
    return (clipped / (2 * clip_max) + 0.5).clamp(0, 1)


def total(rewards: Tensor, weights: Tensor, how: Combine) -> Tensor:
    """(G, S) one reward from several; NaN where any of them is.

    Args:
        rewards: (G, S, M).
        weights: (M,).
        how: ``sum`` of raw rewards, or of rewards each standardised within its group first, so that none dominates by
            its scale: ``normalised`` with advantages of ``spread="all", ddof=1`` is GDPO's order (multi-objective GRPO,
            arXiv:2503.21819; orders of operation as in TRL).
    """
    weights = weights.to(rewards)
    if how == "sum":
        return (rewards * weights).sum(-1)
    flat = rewards.flatten(0, 1)
    valid = ~flat.sum(-1).isnan()
    rows = torch.arange(len(rewards), device=rewards.device).repeat_interleave(rewards.shape[1])[valid].tolist()
    out = rewards.new_full((len(flat),), torch.nan)
    out[valid] = standardised(flat[valid], rows, ddof=1) @ weights
    return out.unflatten(0, rewards.shape[:2])


def pareto_preference(rewards: Tensor) -> Tensor:
    """(B, 2) +1 for the candidate that is at least as good in every reward and better in one, -1 for the other, else 0.

    Args:
        rewards: (B, 2) or (B, 2, M).
    """
    lead = (rewards[:, 0] - rewards[:, 1]).reshape(len(rewards), -1)
    least, most = lead.amin(1), lead.amax(1)
    first, second = (least >= 0) & (most > 0), (most <= 0) & (least < 0)
    sign = first.to(rewards.dtype) - second.to(rewards.dtype)
    return torch.stack([sign, -sign], 1)
