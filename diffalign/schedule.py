"""Noise schedules and parametrisations behind one clock: t in [0, 1], 0 = data, 1 = noise, always float32.

============  ================================================  ========================================
type          noisy input x_t                                   target
============  ================================================  ========================================
epsilon       sqrt(abar) x0 + sqrt(1 - abar) eps                eps
v             the same                                          sqrt(abar) eps - sqrt(1 - abar) x0
flow          (1 - sigma) x0 + sigma eps                        eps - x0
============  ================================================  ========================================

Only ``native`` converts t to what a network is called with, and ``unit`` converts back; both are exact for every
integer timestep of a discrete schedule in float32 (they would not be in bfloat16).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from diffalign.randomness import Generator, rand, randn

Density = Literal["uniform", "logit_normal"]


def expand(t: Tensor, like: Tensor) -> Tensor:
    """``t`` with trailing singleton dimensions, so that it broadcasts against ``like``."""
    return t.reshape(*t.shape, *[1] * (like.ndim - t.ndim))


def _unit_times(
    shape: tuple[int, ...], generator: Generator, density: Density, mean: float, std: float, least: float = 0.0
) -> Tensor:
    """Draws from a density over [0, 1], or from its part over [least, 1]."""
    if density == "uniform":
        return least + (1 - least) * rand(shape, generator)
    if density == "logit_normal" and least > 0:
        below = torch.special.ndtr((torch.tensor(least).double().logit() - mean) / std)
        quantile = below + (1 - below) * rand(shape, generator)
        return (mean + std * torch.special.ndtri(quantile)).sigmoid().float()
    if density == "logit_normal":
        return (mean + std * randn(shape, generator)).sigmoid()
    raise ValueError(f"unknown timestep density {density!r}: choose uniform or logit_normal")


@dataclass(frozen=True, slots=True)
class Rectified:
    """Rectified flow (SD3, FLUX): sigma = t, target velocity ``eps - x0`` (arXiv:2403.03206).

    Args:
        shift: static shift of the sampling grid, ``sigma = s u / (1 + (s - 1) u)``; also applied to sampled times.
        scale: what the network's timestep is at sigma = 1.
        even: the grid is shifted from the even 1, (T - 1) / T ... 1 / T, as FLUX samples, not from SD3's.
        terminal: the time of a grid before 0; its times are stretched away from 1 to end there. None leaves them.
        least: training times are drawn from there to 1, for a network that another one follows in sampling.
    """

    shift: float = 1.0
    scale: float = 1000.0
    even: bool = False
    terminal: float | None = None
    least: float = 0.0

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t from data and noise; ``t`` has the leading dimensions of ``x0``."""
        sigma = expand(t, x0)
        return (1 - sigma) * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The velocity ``eps - x0``."""
        return noise - x0

    def denoised(self, x_t: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        """The clean latent a prediction implies."""
        return x_t - expand(t, x_t) * prediction

    def native(self, t: Tensor) -> Tensor:
        """The timestep the network is called with."""
        return t * self.scale

    def unit(self, native: Tensor) -> Tensor:
        """Inverse of :meth:`native`."""
        return native.float() / self.scale

    def shifted(self, u: Tensor) -> Tensor:
        """Apply the static shift to a uniform grid or draw."""
        return self.shift * u / (1 + (self.shift - 1) * u)

    def sample_t(
        self,
        shape: tuple[int, ...],
        generator: Generator,
        *,
        density: Density = "logit_normal",
        mean: float = 0.0,
        std: float = 1.0,
    ) -> Tensor:
        """Training times: a density over u pushed through the shift."""
        least = self.least / (self.shift - (self.shift - 1) * self.least)  # u of that time
        return self.shifted(_unit_times(shape, generator, density, mean, std, least)).clamp_min(self.least)

    def grid(self, steps: int) -> Tensor:
        """``steps + 1`` decreasing times from 1 to 0, spaced as the stock Euler scheduler does.

        The stock scheduler shifts the last sigma twice (its stored minimum is already shifted), unless the pipeline
        gives it even ones; so do we.
        """
        last = 1 / steps if self.even else float(self.shifted(torch.tensor(1.0 / self.scale)))
        times = self.shifted(torch.linspace(1.0, last, steps))
        if self.terminal is not None and steps > 1:  # the only time of one step is 1
            times = 1 - (1 - times) * (1 - self.terminal) / (1 - times[-1])
        times[0] = 1.0  # not beside it by rounding: a stochastic step from there is another one
        return torch.cat([times, torch.zeros(1)])


@dataclass(frozen=True, slots=True)
class Discrete:
    """DDPM schedule with ``N`` integer timesteps (SD1.5, SDXL); time t stands for index ``t * (N - 1)``.

    Args:
        alphas_cumprod: (N,) cumulative signal power, as a tuple so that the schedule hashes and pickles.
        prediction: what the network predicts.
        final: signal power at which sampling ends; 1 is the clean estimate, and ``alphas_cumprod[0]`` is what the stock
            samplers mean by ``set_alpha_to_one: false``.
    """

    alphas_cumprod: tuple[float, ...]
    prediction: Literal["epsilon", "v_prediction"] = "epsilon"
    final: float = 1.0

    @classmethod
    def scaled_linear(
        cls, steps: int = 1000, start: float = 0.00085, end: float = 0.012, prediction: str = "epsilon"
    ) -> Discrete:
        """The schedule of Stable Diffusion: betas linear in their square root."""
        betas = torch.linspace(math.sqrt(start), math.sqrt(end), steps, dtype=torch.float64).square()
        return cls(tuple((1 - betas).cumprod(0).tolist()), prediction)  # type: ignore[arg-type]

    @property
    def steps(self) -> int:
        """Number of integer timesteps."""
        return len(self.alphas_cumprod)

    def native(self, t: Tensor) -> Tensor:
        """The integer timestep (int64) of a time."""
        return (t * (self.steps - 1)).round().long()

    def unit(self, native: Tensor) -> Tensor:
        """The time of an integer timestep."""
        return native.float() / (self.steps - 1)

    def _levels(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        # float64 until the square root: 1 - abar_0 = 8.5e-4 would lose digits in half precision
        table = torch.tensor(self.alphas_cumprod, dtype=torch.float64, device=t.device)
        abar = expand(table[self.native(t)], like)
        return abar.sqrt().to(like.dtype), (1 - abar).sqrt().to(like.dtype)

    def grid(self, steps: int) -> Tensor:
        """``steps + 1`` decreasing times: the stock "trailing" spacing, which starts at the noisiest level, then 0."""
        indices = np.arange(self.steps, 0, -self.steps / steps)[:steps].round() - 1  # the stock rounding, to the digit
        return torch.cat([self.unit(torch.from_numpy(indices)), torch.zeros(1)])

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t from data and noise; ``t`` has the leading dimensions of ``x0``."""
        signal, sigma = self._levels(t, x0)
        return signal * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """``eps``, or ``v = sqrt(abar) eps - sqrt(1 - abar) x0``."""
        if self.prediction == "epsilon":
            return noise
        signal, sigma = self._levels(t, x0)
        return signal * noise - sigma * x0

    def denoised(self, x_t: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        """The clean latent a prediction implies."""
        signal, sigma = self._levels(t, x_t)
        if self.prediction == "epsilon":
            return (x_t - sigma * prediction) / signal
        return signal * x_t - sigma * prediction

    def sample_t(
        self,
        shape: tuple[int, ...],
        generator: Generator,
        *,
        density: Density = "uniform",
        mean: float = 0.0,
        std: float = 1.0,
        low: float = 0.0,
        high: float = 1.0,
    ) -> Tensor:
        """Training times on the integer grid, restricted to [low, high)."""
        u = low + (high - low) * _unit_times(shape, generator, density, mean, std)
        return self.unit((u * self.steps).floor().clamp(0, self.steps - 1))
