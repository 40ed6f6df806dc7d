"""From rewards to advantages and preferences. Pure; what is a group is the caller's to say, across all processes.

A group is all samples of one prompt in one round. ``groups`` names each sample's group (prompt text or id); the order
of samples means nothing. Standard deviations use ``n - ddof``; a group of one has standard deviation 0.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Spread = Literal["group", "all", "none"]
Mode = Literal["all", "positive_only", "negative_only", "one_only", "binary"]
Order = Literal["sum_then_normalize", "normalize_then_sum"]


def _indices(groups: Sequence[Hashable]) -> tuple[list[int], int]:
    names = {name: index for index, name in enumerate(dict.fromkeys(groups))}
    return [names[name] for name in groups], len(names)


def contiguous(samples: int, size: int) -> list[int]:
    """Groups of ``size`` neighbours each."""
    return [index // size for index in range(samples)]


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


def best_and_worst(rewards: Tensor, groups: Sequence[Hashable], *, break_ties: bool = False) -> Tensor:
    """(N,) +1 for the best of each group, -1 for its worst (the first of equals), 0 for the others.

    Args:
        rewards: (N,).
        groups: N names.
        break_ties: the release gives +1 to the second and -1 to the first of a constant group; the default leaves a
            constant group at 0, since nothing was preferred.
    """
    where, count = _indices(groups)
    out = torch.zeros_like(rewards)
    for position in range(count):
        rows = [row for row, index in enumerate(where) if index == position]
        values = rewards[rows]
        if values.max() > values.min():
            out[rows[int(values.argmax())]], out[rows[int(values.argmin())]] = 1, -1
        elif break_ties and len(rows) > 1:
            out[rows[1]], out[rows[0]] = 1, -1
    return out


def informative(rewards: Tensor, groups: Sequence[Hashable], tolerance: float = 1e-6) -> Tensor:
    """(N,) False for the samples of groups whose rewards are all equal, up to ``tolerance`` of the largest reward.

    The release compares advantages with exactly 0, which lets a group of equal rewards such as 0.1 survive when its
    mean is off in the last digit.
    """
    where, count = _indices(groups)
    index = torch.tensor(where, device=rewards.device)
    high = rewards.new_full((count,), -torch.inf).scatter_reduce(0, index, rewards, "amax")
    low = rewards.new_full((count,), torch.inf).scatter_reduce(0, index, rewards, "amin")
    return (high - low > tolerance * rewards.abs().amax())[index]


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


def combined(rewards: Tensor, weights: Tensor, groups: Sequence[Hashable], *, order: Order) -> Tensor:
    """(N,) one reward from several: a weighted sum of raw rewards, or of rewards standardised within their group."""
    if order == "normalize_then_sum":
        rewards = standardised(rewards, groups, ddof=1)
    return rewards @ weights.to(rewards)


def combined_advantages(
    rewards: Tensor,
    weights: Tensor,
    groups: Sequence[Hashable],
    *,
    order: Order = "sum_then_normalize",
    spread: Spread = "group",
) -> Tensor:
    """Advantages from several rewards (multi-objective GRPO, arXiv:2503.21819; orders of operation as in TRL).

    Args:
        rewards: (N, M).
        weights: (M,).
        groups: N names.
        order: ``sum_then_normalize`` standardises the weighted sum within the group; ``normalize_then_sum``
            standardises every reward within the group first and the sum over the batch after, so that no reward
            dominates by its scale. The latter always divides, whatever ``spread``.
        spread: what the weighted sum is divided by.
    """
    total = combined(rewards, weights, groups, order=order)
    if order == "normalize_then_sum":
        return standardised(total, [0] * len(total), ddof=1)
    return standardised(total, groups, spread=spread, ddof=1)


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
