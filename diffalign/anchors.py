"""How slowly a second set of weights follows the policy: decays as functions of the number of optimiser updates.

``role <- decay * role + (1 - decay) * policy``. The count is of **updates**: a released trainer steps its average once
per micro-batch, so that accumulation changes the average (arXiv:2505.05470, flow_grpo/ema.py); here it cannot.
"""

from __future__ import annotations


def linear_decay(updates: int, rate: float = 0.001, cap: float = 0.3, start: int = 0) -> float:
    """``min(cap, rate * (updates - start))``, 0 (a copy) until ``start``.

    The defaults are AWM's anchor (arXiv:2509.25050, release). DiffusionNFT's old policy (arXiv:2509.16117, release)
    is one of :data:`OLD_POLICY`.
    """
    return min(cap, rate * max(updates - start, 0))


OLD_POLICY: dict[int, dict[str, float]] = {
    0: {"rate": 0.0, "cap": 0.0, "start": 0},
    1: {"rate": 0.001, "cap": 0.5, "start": 0},
    2: {"rate": 0.0075, "cap": 0.999, "start": 75},
}
"""DiffusionNFT's decay types: 0 copies, 1 for GenEval and human-preference rewards, 2 for OCR."""


def old_policy_decay(updates: int, kind: int = 1) -> float:
    """DiffusionNFT's decay of the behaviour policy after so many updates."""
    row = OLD_POLICY[kind]
    return linear_decay(updates, row["rate"], row["cap"], int(row["start"]))


def average_decay(updates: int, limit: float = 0.9) -> float:
    """``min(limit, (1 + n) / (10 + n))``: the average for evaluation, warming up with the updates n.

    ``limit`` is 0.9 in Flow-GRPO and DiffusionNFT, 0.99 in AWM.
    """
    return min(limit, (1 + updates) / (10 + updates))


def is_due(updates: int, interval: int = 8) -> bool:
    """Whether the average for evaluation moves after update ``updates`` (counted from 0); every 8th in Flow-GRPO."""
    return (updates + 1) % interval == 0
