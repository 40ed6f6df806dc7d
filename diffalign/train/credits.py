"""From the rewards of a round to what objectives read: advantages, pairs, desirable or not. G groups of S samples."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from diffalign import config as cfg
from diffalign import credit
from diffalign.credit import Buffered

ALIKE = 1e-6  # of the largest reward


def total(rewards: Tensor, weights: Tensor, how: str) -> Tensor:
    """(G, S): one reward from several (G, S, M); NaN where any is."""
    if how == "sum":
        return (rewards * weights).sum(-1)
    flat, valid = rewards.flatten(0, 1), _valid(rewards.sum(-1)).flatten()
    groups = [g for g in range(len(rewards)) for _ in range(rewards.shape[1])]
    mine = [name for name, good in zip(groups, valid.tolist(), strict=True) if good]
    out = torch.full((len(flat),), torch.nan)
    if mine:
        out[valid] = credit.combined(flat[valid], weights, mine, order="normalize_then_sum")
    return out.unflatten(0, rewards.shape[:2])


def _valid(reward: Tensor) -> Tensor:
    return ~reward.isnan()


def alike(reward: Tensor) -> Tensor:
    """(G,) groups whose samples (S) have one reward up to rounding, or less than two with any: nothing to learn."""
    low, high = reward.nan_to_num(torch.inf).amin(1), reward.nan_to_num(-torch.inf).amax(1)
    return (high - low <= ALIKE * reward.nan_to_num(0.0).abs().amax()) | (_valid(reward).sum(1) < 2)


def advantages(reward: Tensor, prompts: Sequence[str], how: cfg.CreditConfig, buffered: Buffered | None) -> Tensor:
    """(G, S) of all groups of a round, of all processes; 0 where there is no reward.

    Args:
        prompts: of the groups; groups of one prompt share its statistics only where ``buffered`` keeps them.
    """
    valid = _valid(reward).flatten()
    size = reward.shape[1]
    out = torch.zeros(reward.numel())
    flat = reward.flatten()[valid]
    if buffered is not None:
        names = [prompt for prompt in prompts for _ in range(size)]
        out[valid] = buffered.update([n for n, good in zip(names, valid.tolist(), strict=True) if good], flat)
    else:
        groups = torch.arange(len(prompts)).repeat_interleave(size)[valid].tolist()
        out[valid] = credit.standardised(flat, groups, spread=how.spread, ddof=how.ddof, eps=how.eps)
    return out.unflatten(0, reward.shape)


def pairs(reward: Tensor, how: str) -> Tensor:
    """(G, P, 2) indices of samples: all pairs, or the best and the worst of a group."""
    size = reward.shape[1]
    if how == "all":
        return torch.tensor(list(combinations(range(size), 2))).expand(len(reward), -1, 2)
    best = reward.nan_to_num(-torch.inf).argmax(1)
    worst = reward.nan_to_num(torch.inf).argmin(1)
    same = best == worst  # a group of one reward has no pair; which two samples stand for it does not matter
    return torch.stack([best, torch.where(same, (best + 1) % size, worst)], 1)[:, None]
