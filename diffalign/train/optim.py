"""The optimiser and the learning rate that a config names."""

from __future__ import annotations

import math
from typing import Any

import torch

from diffalign import config as cfg
from diffalign.errors import UserError
from diffalign.networks import find_optimizer


def make_optimizer(parameters: list[torch.nn.Parameter], optim: cfg.OptimConfig) -> torch.optim.Optimizer:
    """An optimiser by name, any case."""
    kind: Any = find_optimizer(optim.name)
    try:
        return kind(parameters, lr=optim.lr, **optim.params)
    except (TypeError, ValueError) as error:
        raise UserError(f"optim.params do not fit {optim.name}: {error}") from None


def make_scheduler(
    optimizer: torch.optim.Optimizer, steps: int, warmup: int, decay: str
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up, then constant, or linear or cosine decay to zero at ``steps``."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, steps - warmup))
        return {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}[decay]

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
