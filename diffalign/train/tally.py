"""Network evaluations, counted where they happen: what methods are compared by."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffalign.types import Condition


class Cost(NamedTuple):
    """What a run takes at the least: its smallest whole, a round of an online run, else a step."""

    evaluations: float
    """Of the network, by all processes, sampling included: forward 1, backward 2, per sample."""
    updates: int
    """Of the optimiser."""


class Tally:
    """Counts the rows that go through ``family.predict``: 1 for a forward pass, 2 more if it is differentiated.

    Classifier-free guidance runs two rows per sample. A forward that checkpointing repeats is not counted again.

    Args:
        family: a diffusion family; its ``predict`` is wrapped.
    """

    def __init__(self, family: Any) -> None:
        self.count = 0
        self._predict = family.predict
        family.predict = self._counted

    def _counted(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        found = self._predict(net, x_t, t, cond)
        self.count += len(x_t) * (3 if torch.is_grad_enabled() and found.requires_grad else 1)
        return found

    def take(self) -> int:
        """The count since the last call."""
        count, self.count = self.count, 0
        return count
