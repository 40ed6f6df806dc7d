"""How (t, noise, x_t, target) are drawn. A draw is one value, handed to every role: nobody can forget to share it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffalign.registry import check_parameters
from diffalign.types import Batch, DiffusionFamily, Draw, Weights


def _shared(shape: tuple[int, ...], k: int, generator: torch.Generator, share: bool) -> Tensor:
    """Standard normal (B, K, ...), the same for all K candidates of a record if shared."""
    b, rest = shape[0], shape[2:]
    drawn = torch.randn((b, 1 if share else k, *rest), generator=generator, device=generator.device)
    return drawn.expand(b, k, *rest)


def forward(
    family: DiffusionFamily,
    weights: Weights,
    batch: Batch,
    generator: torch.Generator,
    *,
    share_t: bool = True,
    share_noise: bool = True,
    density: Mapping[str, Any] | None = None,
) -> Draw:
    """Forward noising: t from the schedule's density, Gaussian noise, both shared by the candidates of a record.

    Args:
        family: gives the schedule.
        weights: unused; draws that run a network (inversion) need it.
        batch: ``x0`` (B, K, ...).
        generator: the only source of randomness.
        share_t, share_noise: one draw per record (Diffusion-DPO), else one per candidate.
        density: keyword arguments of the schedule's ``sample_t``, for example ``{"mean": 0.5}``.
    """
    b, k = batch.x0.shape[:2]
    schedule = family.schedule
    check_parameters(schedule.sample_t, density or {}, "draw.density")
    t = schedule.sample_t((b, 1 if share_t else k), generator, **(density or {})).expand(b, k)
    noise = _shared(tuple(batch.x0.shape), k, generator, share_noise)
    return Draw(t, schedule.add_noise(batch.x0, noise, t), schedule.target(batch.x0, noise, t))
