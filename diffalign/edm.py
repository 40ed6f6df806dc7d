"""AWM's ablation: denoising score matching against a clean and against a noisy target (arXiv:2509.25050, edm/).

Both have the same minimiser; the noisy target has the larger variance, which slows training. The denoiser works in the
EDM parametrisation ``x = y + sigma n`` (arXiv:2206.00364). Losses come per element; the release sums over elements and
divides by the batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from diffalign.schedule import expand


class Matching(NamedTuple):
    """What a denoiser is asked: its input, the target of its output, and the weight of the squared error."""

    x: Tensor
    """(B, ...) noisy input."""
    target: Tensor
    """(B, ...)."""
    weight: Tensor
    """(B, 1, ...)."""

    def loss(self, denoised: Tensor) -> Tensor:
        """(B, ...) weighted squared error per element."""
        return self.weight * (denoised - self.target).square()


def _weight(sigma: Tensor, sigma_data: float) -> Tensor:
    return (sigma.square() + sigma_data**2) / (sigma * sigma_data).square()


def karras_grid(steps: int = 40, low: float = 0.002, high: float = 80.0, rho: float = 7.0) -> Tensor:
    """(steps + 1,) decreasing noise levels in float64, ending at 0 (arXiv:2206.00364 eq. 5)."""
    ramp = torch.arange(steps, dtype=torch.float64) / (steps - 1)
    levels = (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    return torch.cat([levels, levels.new_zeros(1)])


def level_below(sigma: Tensor, grid: Tensor) -> Tensor:
    """(B,) the grid entry after the first one that is at most ``sigma``."""
    first = (sigma[:, None] >= grid.to(sigma)).int().argmax(1)
    return grid.to(sigma)[(first + 1).clamp_max(len(grid) - 1)]


def clean(y: Tensor, sigma: Tensor, noise: Tensor, *, sigma_data: float = 0.5) -> Matching:
    """Denoise ``y + sigma n`` to y, with EDM's weight.

    Args:
        y, noise: (B, ...) data and standard normal noise.
        sigma: (B,) noise levels; log-normal with mean -1.2 and deviation 1.2 in the release.
        sigma_data: the data's standard deviation.
    """
    s = expand(sigma, y)
    return Matching(y + s * noise, y, _weight(s, sigma_data))


def noisy(y: Tensor, sigma: Tensor, below: Tensor, noise: Tensor, more: Tensor, *, sigma_data: float = 0.5) -> Matching:
    """Match the score given the less noisy state ``y + sigma_s n`` instead of y.

    With ``r^2 = sigma^2 - sigma_s^2`` and ``x = y + sigma_s n + r n'`` the target is ``x - sigma^2 n' / r``, and EDM's
    weight is divided by ``sigma_data^2 + sigma^2 sigma_s^2 / r^2``, the target's variance. The release writes 0.25 for
    ``sigma_data^2``.

    Args:
        y, noise, more: (B, ...) data and two standard normal draws.
        sigma, below: (B,) noise level and a lower one.
        sigma_data: the data's standard deviation.
    """
    s, low = expand(sigma, y), expand(below, y)
    rest = s.square() - low.square()
    x = y + low * noise + rest.sqrt() * more
    variance = sigma_data**2 + (s * low).square() / rest
    return Matching(x, x - s.square() / rest.sqrt() * more, _weight(s, sigma_data) / variance)
