"""How slowly a second set of weights follows the policy: decays as functions of the number of optimiser updates.

``role <- decay * role + (1 - decay) * policy``. The count is of **updates**: a released trainer steps its average once
per micro-batch, so that accumulation changes the average (arXiv:2505.05470, flow_grpo/ema.py); here it cannot.
"""

from __future__ import annotations


def linear_decay(updates: int, rate: float = 0.001, cap: float = 0.3, start: int = 0) -> float:
    """``min(cap, rate * (updates - start))``, 0 (a copy) until ``start``.

    The defaults are AWM's anchor (arXiv:2509.25050, release). DiffusionNFT's old policy (arXiv:2509.16117, release) has
    rate and cap 0.001 and 0.5 for GenEval and human-preference rewards, 0.0075 and 0.999 from update 75 on for OCR.
    """
    return min(cap, rate * max(updates - start, 0))


def average_decay(updates: int, limit: float = 0.9) -> float:
    """``min(limit, (1 + n) / (10 + n))``: the average for evaluation, warming up with the updates n.

    ``limit`` is 0.9 in Flow-GRPO and DiffusionNFT, 0.99 in AWM.
    """
    return min(limit, (1 + updates) / (10 + updates))


def is_due(updates: int, interval: int) -> bool:
    """Whether the average for evaluation moves after update ``updates`` (counted from 0); every 8th in Flow-GRPO."""
    return (updates + 1) % interval == 0
