"""Samplers as plain loops over a velocity or noise prediction, written once for every family."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from diffalign.types import Condition, DiffusionFamily

Predict = Callable[[Tensor, Tensor], Tensor]
"""(x_t (N, ...), t scalar) -> prediction (N, ...)."""


def guided(family: DiffusionFamily, net: nn.Module, cond: Condition, empty: Condition, guidance: float) -> Predict:
    """The network's prediction with classifier-free guidance (arXiv:2207.12598), both branches in one forward.

    Args:
        cond, empty: conditions of the prompts and of the empty prompt, each leading with N.
        guidance: 1 runs the conditional branch alone.
    """
    if guidance == 1.0:
        return lambda x, t: family.predict(net, x, t.expand(len(x)), cond)
    both = {name: torch.cat([empty[name], value]) for name, value in cond.items()}

    def predict(x: Tensor, t: Tensor) -> Tensor:
        without, with_prompt = family.predict(net, torch.cat([x, x]), t.expand(2 * len(x)), both).chunk(2)
        return without + guidance * (with_prompt - without)

    return predict


@torch.no_grad()
def euler(predict: Predict, x: Tensor, grid: Tensor) -> Tensor:
    """Euler steps of the flow ODE ``dx/dt = v`` along a decreasing time grid.

    Args:
        x: (N, ...) noise at ``grid[0]``.
        grid: (T + 1,) times ending at 0.

    Returns:
        (N, ...) clean latents.
    """
    for t, following in pairwise(grid):
        x = x + (following - t) * predict(x, t)
    return x


SAMPLERS: dict[str, Callable[[Predict, Tensor, Tensor], Tensor]] = {"euler": euler}
