"""Credit per token: implicit rewards of a preference-trained model, dense rewards for reinforcement learning.

Tensors are (..., U) with a mask that is 1 for tokens that count; results are 0 elsewhere, whatever the inputs hold.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def token_rewards(policy: Tensor, reference: Tensor, mask: Tensor, beta: float) -> Tensor:
    """``beta (log policy - log reference)`` per token, its advantage up to potential shaping (arXiv:2404.12358)."""
    return torch.where(mask > 0, beta * (policy - reference), 0.0)


def cumulative(rewards: Tensor, mask: Tensor) -> Tensor:
    """The sum of the rewards up to and including each token."""
    return torch.where(mask > 0, torch.where(mask > 0, rewards, 0.0).cumsum(-1), 0.0)


def segment_sums(rewards: Tensor, mask: Tensor, segments: Tensor) -> Tensor:
    """(..., S): the sum of the rewards in each segment, for example a step of reasoning.

    Args:
        rewards, mask: (..., U).
        segments: (..., U) index of the segment a token is in, from 0; negative for none. S is the largest of a counted
            token plus 1.
    """
    counted = (mask > 0) & (segments >= 0)
    count = int(torch.where(counted, segments, -1).max()) + 1
    index = torch.where(counted, segments, count).long()
    sums = rewards.new_zeros(*rewards.shape[:-1], count + 1)  # one more for what belongs to none
    return sums.scatter_add(-1, index, torch.where(counted, rewards, 0.0))[..., :-1]


class DenseRewards(NamedTuple):
    """RTO's rewards (..., U) by component, and their sum over a sequence (...)."""

    total: Tensor
    dense: Tensor
    kl: Tensor
    returns: Tensor


def rto_rewards(
    policy: Tensor,
    reference: Tensor,
    dpo: Tensor,
    mask: Tensor,
    scores: Tensor,
    *,
    scale: float = 0.05,
    clip: float = 0.05,
    kl_coef: float = 0.01,
    score_clip: float = 10.0,
) -> DenseRewards:
    """RTO (arXiv:2404.18922): a DPO model's token rewards, a KL penalty, and the reward model's score at the end.

    ``clamp(scale (log dpo - log reference), -clip, clip) - kl_coef (log policy - log reference) + score of the last``.

    Args:
        policy, reference, dpo: (..., U) log-probs of the sampling policy, of the reference and of the DPO model.
        mask: (..., U).
        scores: (...) of a reward model, normalised; given to the last token that counts.
        scale: 0.05 in the release.
        clip: of the scaled DPO reward; 0.05 in the release, 0 for none.
        kl_coef: 0.01 in the release.
        score_clip: bound of the score; 10 in the release.
    """
    counted = mask > 0
    dense = token_rewards(dpo, reference, mask, scale)
    dense = dense.clamp(-clip, clip) if clip else dense
    penalty = -token_rewards(policy, reference, mask, kl_coef)
    order = counted.long().cumsum(-1)
    last = counted & (order == order[..., -1:])
    total = dense + penalty + torch.where(last, scores.clamp(-score_clip, score_clip)[..., None], 0.0)
    return DenseRewards(total, dense, penalty, total.sum(-1))


def step_advantages(before: Tensor, after: Tensor, terminal: Tensor, rewards: Tensor) -> Tensor:
    """``V(next) - V(s)``, with the outcome in place of V(next) at the end (direct advantage, arXiv:2412.18279)."""
    return torch.where(terminal > 0, rewards, after) - before
