"""What the adapters share: reading a case, placing its inputs in LogProbs, running a registered objective on them."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from diffalign.registry import find_objective, find_shaping
from diffalign.types import Labels, LogProbs, Loss

ADAPTERS: dict[str, Callable[["Given", "Given"], dict[str, Any]]] = {}
OBJECTIVES_OF: dict[str, tuple[str, ...]] = {}
"""Method -> the objectives (and shapings) whose numbers its file pins."""
REQUIRED: dict[str, tuple[str, ...]] = {}
"""Method -> expectations without which a case proves nothing."""

_ABSENT = object()


class Given:
    """Parameters or inputs of a case. Whatever the adapter never asked for is left in ``unread``, which is an error."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = dict(values)
        self.unread = set(values)

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def __call__(self, name: str, default: Any = _ABSENT, *, among: tuple[Any, ...] | None = None) -> Any:
        """A value by name; ``among`` lists the values the adapter implements."""
        assert name in self._values or default is not _ABSENT, f"the case lacks {name!r}"
        self.unread.discard(name)
        value = self._values.get(name, default)
        assert among is None or value in among, f"{name}: unknown value {value!r}"
        return value

    def tensor(self, name: str) -> Tensor:
        """An input in float64."""
        return torch.tensor(self(name), dtype=torch.float64)

    def pair(self, name: str, sides: tuple[str, str]) -> Tensor:
        """``name_<side>`` of both sides as (B, 2, ...), or ``name`` itself where both share it."""
        if name in self:
            return self.tensor(name)[:, None].expand(-1, 2, *[-1] * (self.tensor(name).ndim - 1))
        return torch.stack([self.tensor(f"{name}_{side}") for side in sides], 1)


def adapter(*objectives: str, requires: tuple[str, ...] = ("loss", "grad_model_pred")) -> Callable:
    """Register an adapter under its function's name, with the objectives it goes through."""

    def register(fn: Callable[[Given, Given], dict[str, Any]]) -> Callable[[Given, Given], dict[str, Any]]:
        ADAPTERS[fn.__name__] = fn
        OBJECTIVES_OF[fn.__name__] = objectives
        REQUIRED[fn.__name__] = requires
        return fn

    return register


def split(name: str, values: Tensor, sides: tuple[str, str]) -> dict[str, Tensor]:
    """(B, 2, ...) -> ``name_<side>`` each (B, ...)."""
    return {f"{name}_{side}": values[:, index] for index, side in enumerate(sides)}


def run(objective: str, lp: LogProbs, labels: Labels, **params: Any) -> tuple[Loss, ...]:
    """The parts that a registered objective returns."""
    return find_objective(objective)(lp, labels, **params)


def shaped(name: str, lp: LogProbs, labels: Labels, **params: Any) -> LogProbs:
    """Log-probs through a registered shaping."""
    return find_shaping(name)(lp, labels, **params)


def total(*losses: Loss) -> Tensor:
    """The sum of separately averaged parts, as the training step reduces them."""
    return torch.stack([loss.reduce() for loss in losses]).sum()
