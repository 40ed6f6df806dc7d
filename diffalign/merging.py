"""Arithmetic on weights between rounds of training, on one tensor or on dictionaries of tensors by name.

Weights only, never optimiser state. For adapters, merge or extrapolate the delta they stand for, or both factors alike;
tensors that are not of floating point (counters) are taken over from the first argument.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

Tensors = TypeVar("Tensors", Tensor, dict[str, Tensor])


def nesterov(current: Tensors, previous: Tensors, momentum: float = 0.3) -> Tensors:
    """Accelerated preference optimisation (arXiv:2410.06293): ``current + momentum (current - previous)``.

    Args:
        current: what a round of training ended with; the next round samples from, starts at and refers to the result.
        previous: what the round before ended with (not its extrapolation); the start in the first round.
        momentum: 0.3 in the paper.
    """
    return _each(lambda now, before: now + momentum * (now - before), current, previous)


def soft_reference(policy: Tensors, reference: Tensors, alpha: float = 0.6) -> Tensors:
    """The next reference ``alpha policy + (1 - alpha) reference`` (TR-DPO); TRL takes 0.6 every 512 steps."""
    return _each(lambda new, old: alpha * new + (1 - alpha) * old, policy, reference)


def merge(base: Tensors, deltas: Sequence[Tensors], weights: Sequence[float]) -> Tensors:
    """COFS-DPO (arXiv:2406.05534): ``base + sum_i weight_i delta_i``, for adapters of several domains."""
    if len(deltas) != len(weights):
        raise ValueError(f"{len(deltas)} deltas but {len(weights)} weights")
    return _each(lambda start, *moves: start + sum(w * m for w, m in zip(weights, moves, strict=True)), base, *deltas)


def _each(combine: Callable[..., Tensor], first: Any, *others: Any) -> Any:
    """A combination of tensors, in float32 or better, or of what dictionaries hold under each of their names."""
    if isinstance(first, Tensor):
        if not first.is_floating_point():
            return first.clone()
        dtype = torch.promote_types(first.dtype, torch.float32)
        return combine(*(tensor.detach().to(dtype) for tensor in (first, *others))).to(first.dtype)
    if any(set(other) != set(first) for other in others):
        raise ValueError("dictionaries of different names cannot be combined")
    return {name: _each(combine, value, *(other[name] for other in others)) for name, value in first.items()}
