"""One stochastic sampling step as a Gaussian: from a prediction to mean, standard deviation and log-prob.

The log-prob is a **mean** over the elements of a latent, never a sum, as in every released trainer; clip ranges of 1e-4
and less only make sense so. Noise levels are computed in float64, latents in float32 or better (bfloat16 overflows in
the means). Shapes: ``x_t`` and predictions (lead..., ...), levels (lead...), usually (B, K) or (B, K, U).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffalign.errors import UserError
from diffalign.likelihood import wide
from diffalign.schedule import expand

Parametrisation = Literal["epsilon", "v_prediction", "sample"]


@dataclass(frozen=True, slots=True)
class Step:
    """``x_prev ~ N(mean, std^2)``."""

    mean: Tensor
    """Like x_t, carrying the prediction's gradient."""
    std: Tensor
    """(lead...) of the noise that the step adds."""
    diffusion: Tensor
    """(lead...) g: the noise per square root of time; the standard deviation itself where there is no such rate."""
    normalised: bool = True
    """False leaves scale and constants out of the log-prob (coefficient-preserving steps)."""

    def sample(self, noise: Tensor) -> Tensor:
        """The next state from standard normal noise."""
        return self.mean + _like(self.std, self.mean) * noise

    def log_prob(self, x_prev: Tensor) -> Tensor:
        """(lead...) mean log-density of a state that was reached; no gradient through it.

        Raises:
            UserError: a step without noise has no density (noise level 0, or both ends at the same level).
        """
        error = _mean_square(x_prev.detach().to(self.mean.dtype) - self.mean, self.std.ndim)
        if not self.normalised:
            return -error
        if not bool((self.std > 0).all()):
            raise UserError("a transition without noise has no log-prob: raise the noise level or leave the step out")
        return -error / (2 * self.std.square()) - self.std.log() - 0.5 * math.log(2 * math.pi)

    def gap(self, other: Step) -> Tensor:
        """(lead...) mean squared difference of two means."""
        return _mean_square(self.mean - other.mean, self.std.ndim)


def _mean_square(difference: Tensor, lead: int) -> Tensor:
    return difference.square().flatten(lead).mean(-1) if difference.ndim > lead else difference.square()


def _like(level: Tensor, x: Tensor) -> Tensor:
    return expand(level, x).to(x.dtype)


def clean_and_noise(
    prediction: Tensor, x_t: Tensor, alpha_bar: Tensor, parametrisation: Parametrisation
) -> tuple[Tensor, Tensor]:
    """The clean latent and the noise that a prediction implies at a signal power ``alpha_bar`` (lead...)."""
    signal, sigma = _like(alpha_bar.double().sqrt(), x_t), _like((1 - alpha_bar.double()).sqrt(), x_t)
    if parametrisation == "epsilon":
        return (x_t - sigma * prediction) / signal, prediction
    if parametrisation == "sample":
        return prediction, (x_t - signal * prediction) / sigma
    return signal * x_t - sigma * prediction, signal * prediction + sigma * x_t


def ddim(
    prediction: Tensor,
    x_t: Tensor,
    level: Tensor,
    following: Tensor,
    *,
    noise_level: float = 1.0,
    parametrisation: Parametrisation = "epsilon",
) -> Step:
    """DDIM with ``s = eta sqrt((1 - ab') / (1 - ab) (1 - ab / ab'))`` (arXiv:2010.02502 eq. 12, 16).

    Args:
        level, following: cumulative signal power ``ab`` before and ``ab'`` after the step. The last step of the
            released samplers goes to ``ab_0``, never to 1.
        noise_level: eta; 1 in DDPO and D3PO.
        parametrisation: what the network predicts. The clean latent is not clipped.
    """
    ab, ab_next = level.double(), following.double()
    std = noise_level * ((1 - ab_next) / (1 - ab) * (1 - ab / ab_next)).sqrt()
    x = wide(x_t)
    clean, noise = clean_and_noise(prediction.to(x.dtype), x, level, parametrisation)
    mean = _like(ab_next.sqrt(), x) * clean + _like((1 - ab_next - std.square()).sqrt(), x) * noise
    return Step(mean, std.to(x.dtype), std.to(x.dtype))


def flow_sde(
    prediction: Tensor,
    x_t: Tensor,
    level: Tensor,
    following: Tensor,
    *,
    noise_level: float = 0.7,
    second: float | None = None,
) -> Step:
    """Reverse SDE of a rectified flow with ``g = a sqrt(s / (1 - s))`` (Flow-GRPO, arXiv:2505.05470).

    Args:
        level, following: ``s`` before and ``s'`` after the step, 1 = noise.
        noise_level: a; 0.7 for SD3.5.
        second: the level that stands in for s in ``1 - s`` where s is exactly 1: the second one of the sampling grid,
            which is s' whenever a trajectory is stored whole.
    """
    s, s_next = level.double(), following.double()
    stand_in = s_next if second is None else torch.full_like(s, second)
    return _reverse_sde(prediction, x_t, s, s_next, noise_level * (s / (1 - torch.where(s == 1, stand_in, s))).sqrt())


def dance(prediction: Tensor, x_t: Tensor, level: Tensor, following: Tensor, *, noise_level: float = 0.3) -> Step:
    """The same reverse SDE with constant ``g = eta`` (DanceGRPO, arXiv:2505.07818); eta 0.3 for FLUX."""
    s, s_next = level.double(), following.double()
    return _reverse_sde(prediction, x_t, s, s_next, torch.full_like(s, noise_level))


def _reverse_sde(prediction: Tensor, x_t: Tensor, s: Tensor, s_next: Tensor, g: Tensor) -> Step:
    """``mean = x - d v - d g^2 / (2 s) (x + (1 - s) v)``, ``std = g sqrt(d)``, with ``d = s - s'``."""
    x, d = wide(x_t), s - s_next
    v = prediction.to(x.dtype)
    pull = _like(d * g.square() / (2 * s), x)
    mean = x - _like(d, x) * v - pull * (x + _like(1 - s, x) * v)
    return Step(mean, (g * d.sqrt()).to(x.dtype), g.to(x.dtype))


def cps(prediction: Tensor, x_t: Tensor, level: Tensor, following: Tensor, *, noise_level: float = 0.8) -> Step:
    """Coefficient-preserving step: ``std = s' sin(a pi / 2)``, log-prob without scale (arXiv:2509.05952).

    Its noise does not shrink with the step, so that samples do not converge to the data's spread as steps are added;
    the last step (s' = 0) is deterministic. ``noise_level`` a is 0.8 in the released fast configurations.
    """
    s, s_next = level.double(), following.double()
    std = s_next * math.sin(noise_level * math.pi / 2)
    x = wide(x_t)
    v = prediction.to(x.dtype)
    clean, noise = x - _like(s, x) * v, x + _like(1 - s, x) * v
    mean = _like(1 - s_next, x) * clean + _like((s_next.square() - std.square()).sqrt(), x) * noise
    return Step(mean, std.to(x.dtype), std.to(x.dtype), normalised=False)


FLOW_STEPS: dict[str, Callable[..., Step]] = {"flow_sde": flow_sde, "dance": dance, "cps": cps}
"""The steps of a rectified flow by name; a discrete schedule has :func:`ddim`."""
