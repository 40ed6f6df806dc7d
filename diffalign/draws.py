"""How (t, noise, x_t, target) are drawn. A draw is one value, handed to every role: nobody can forget to share it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from diffalign import timesteps
from diffalign.errors import UserError
from diffalign.estimate import flatten_condition
from diffalign.randomness import Generator, device_of, rand, randn
from diffalign.registry import check_parameters
from diffalign.schedule import Discrete, Rectified, expand
from diffalign.types import Batch, DiffusionFamily, Draw, Family, SampledPath, Schedule, Weights

Times = Literal["discrete", "discrete_wo_init", "discrete_with_init", "uniform", "logit_normal", "permuted"]


def _noise(shape: tuple[int, ...], generator: Generator, share: bool) -> Tensor:
    """Standard normal (B, K, ...), the same for all K candidates of a record if shared."""
    b, k, *rest = shape
    return randn((b, 1 if share else k, *rest), generator).expand(b, k, *rest)


def forward(
    family: DiffusionFamily,
    weights: Weights,
    batch: Batch,
    generator: Generator,
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
        generator: the only source of randomness, one for the batch or one per record, as in every draw.
        share_t, share_noise: one draw per record (Diffusion-DPO), else one per candidate.
        density: keyword arguments of the schedule's ``sample_t``, for example ``{"mean": 0.5}``.
    """
    b, k = batch.x0.shape[:2]
    schedule = family.schedule
    check_parameters(schedule.sample_t, density or {}, "draw.density")
    t = schedule.sample_t((b, 1 if share_t else k), generator, **(density or {})).expand(b, k)
    noise = _noise(tuple(batch.x0.shape), generator, share_noise)
    return Draw(t, schedule.add_noise(batch.x0, noise, t), schedule.target(batch.x0, noise, t))


def inversion(
    family: DiffusionFamily,
    weights: Weights,
    batch: Batch,
    generator: Generator,
    *,
    steps: int = 9,
    released: bool = False,
    density: Mapping[str, Any] | None = None,
) -> Draw:
    """ReNoise inversion (SmPO, arXiv:2506.02698): every latent is carried up to t by the policy instead of noise.

    One t per record; candidates have their own x_t and target. See :func:`invert`.

    Args:
        family: gives the schedule and the network's prediction, without guidance.
        weights: the policy runs without gradient.
        batch: ``x0`` (B, K, ...).
        generator: draws t, the only randomness.
        steps: levels of the full grid from data to noise; 9 in the paper, 5 (SD1.5) or 10 (SDXL) in the release.
        released: the grid of the release, which stops short of t.
        density: keyword arguments of the schedule's ``sample_t``.
    """
    b, k = batch.x0.shape[:2]
    check_parameters(family.schedule.sample_t, density or {}, "draw.density")
    t = family.schedule.sample_t((b, 1), generator, **(density or {})).expand(b, k)
    return invert(family, weights, batch, t, steps, released)


@torch.no_grad()
def invert(
    family: DiffusionFamily, weights: Weights, batch: Batch, t: Tensor, steps: int, released: bool = False
) -> Draw:
    """Carry ``x0`` up to times ``t`` (B, K) along the policy's deterministic trajectory.

    Each step asks the network at the level it goes to, steps, asks again there, and steps with the mean of both. The
    grid is uniform in time and its last step ends at t. As ``released`` the grid is that of diffusers' inverse DDIM
    scheduler (leading spacing, offset 1) and ends at its last level below t, while the target is computed for t: it is
    not of unit variance, and at the first levels the "noisy" latent is the clean one.

    The release inverts in train mode with half-precision levels, and for a batch uses the time of its first row.

    Returns:
        A draw whose target is that of the noise which leads from x0 to x_t; policy and reference share it.
    """
    b, k = batch.x0.shape[:2]
    schedule, cond, x = family.schedule, flatten_condition(batch.cond, k), batch.x0

    def predict(x: Tensor, level: Tensor) -> Tensor:
        found = family.predict(net, x.flatten(0, 1), level.flatten(0, 1), cond)
        return found.unflatten(0, (b, k)).to(batch.x0.dtype)

    with weights.use("policy") as net:
        for below, level in _levels(schedule, t, steps, released):
            moves = below < level
            if moves.any():
                first = predict(x, level)
                second = predict(_carried(schedule, x, first, below, level), level)
                carried = _carried(schedule, x, (first + second) / 2, below, level)
                x = torch.where(moves.reshape(*moves.shape, *[1] * (x.ndim - 2)), carried, x)
    signal, sigma = _coefficients(schedule.add_noise, t, x)
    return Draw(t, x, schedule.target(batch.x0, (x - signal * batch.x0) / sigma, t))


def _levels(schedule: Schedule, t: Tensor, steps: int, released: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """(B, K) times that each step goes from and to; equal where a row has arrived."""
    if not released:
        for step in range(steps):
            yield t.clamp_max(step / steps), t.clamp_max((step + 1) / steps)
        return
    if not isinstance(schedule, Discrete):
        raise UserError("draw.released: the grid of the release is made for a discrete schedule (SD1.5, SDXL)")
    stride = schedule.steps // steps
    for index in range(1, stride * steps + 1, stride):
        below, level = schedule.unit(torch.tensor([max(index - stride, 0), index], device=t.device))
        yield below.expand_as(t), torch.where(level < t, level, below)


def _coefficients(make: Callable[[Tensor, Tensor, Tensor], Tensor], t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """What a schedule's ``add_noise`` or ``target`` multiplies data and noise with, shaped to broadcast."""
    one = torch.ones(*t.shape, *[1] * (like.ndim - t.ndim), dtype=like.dtype, device=like.device)
    return make(one, 0 * one, t), make(0 * one, one, t)


def _carried(schedule: Schedule, x: Tensor, prediction: Tensor, below: Tensor, level: Tensor) -> Tensor:
    """A deterministic DDIM step from time ``below`` to time ``level`` with one prediction, of any parametrisation."""
    signal, sigma = _coefficients(schedule.add_noise, below, x)
    of_data, of_noise = _coefficients(schedule.target, below, x)
    determinant = signal * of_noise - sigma * of_data
    x0 = (of_noise * x - sigma * prediction) / determinant
    noise = (signal * prediction - of_data * x) / determinant
    return schedule.add_noise(x0, noise, level)


def none(family: Family, weights: Weights, batch: Batch, generator: Generator) -> None:
    """Nothing to draw: text has no noise level."""


def repeated(
    family: DiffusionFamily,
    weights: Weights,
    batch: Batch,
    generator: Generator,
    *,
    count: int = 6,
    kind: Times = "discrete_wo_init",
    steps: int = 14,
    fraction: float = 0.9,
    time_shift: float = 3.0,
) -> Draw:
    """Forward noising of every candidate at several times of a sampling grid, with fresh noise for each: AWM, NFT.

    Args:
        family: gives the schedule.
        weights: unused.
        batch: ``x0`` (B, K, ...).
        generator: the only source of randomness.
        count: T, times per candidate.
        kind: one time per stratum (AWM, see ``timesteps``), for all but ``uniform`` shared by the candidates of a
            record (by a micro-batch in the release), or a random ``permuted`` choice of grid times without repetition
            for each candidate (DiffusionNFT).
        steps: of the grid.
        fraction: the part of the grid, from the noisy end, that discrete strata are cut from; 0.9 in AWM.
        time_shift: of the kinds ``uniform`` and ``logit_normal``, which use no grid; 3 in AWM.

    Returns:
        A draw with ``t`` (B, K, T): times are units.
    """
    b, k = batch.x0.shape[:2]
    if kind in ("uniform", "logit_normal"):
        t = _continuous(kind, (b, k, count), Rectified(shift=time_shift), generator)
    else:
        if kind == "permuted":
            index = timesteps.subset(rand((b, k, steps), generator), count)
        else:
            u = rand((b, 1, count - (kind == "discrete_with_init")), generator)
            index = timesteps.discrete(kind, count, int(steps * fraction), u).expand(b, k, count)
        t = family.schedule.grid(steps)[:-1].to(device_of(generator))[index]
    x0 = batch.x0[:, :, None].expand(-1, -1, count, *batch.x0.shape[2:])
    noise = randn(x0.shape, generator)
    return Draw(t, family.schedule.add_noise(x0, noise, t), family.schedule.target(x0, noise, t))


def _continuous(kind: str, shape: tuple[int, int, int], line: Rectified, generator: Generator) -> Tensor:
    b, _, count = shape
    if kind == "uniform":
        u, keys = (rand(shape, generator).flatten(0, 1).T for _ in range(2))
        return timesteps.uniform(u, keys, line.shifted).T.reshape(shape)
    u, keys = (rand((b, count), generator) for _ in range(2))
    rows = [timesteps.logit_normal(row, key.argsort(), line.shifted) for row, key in zip(u, keys, strict=True)]
    return torch.stack(rows)[:, None].expand(shape)


def _path(batch: Batch) -> SampledPath:
    if batch.path is None:
        raise UserError("this draw reads sampling trajectories, which offline data do not have")
    return batch.path


def _at(values: Tensor, index: Tensor) -> Tensor:
    """Entries (B, K, S, ...) of (B, K, T, ...) at indices (B, K, S)."""
    return values.gather(2, expand(index, values).expand(-1, -1, -1, *values.shape[3:]))


def transition(
    family: DiffusionFamily,
    weights: Weights,
    batch: Batch,
    generator: Generator,
    *,
    count: int | None = 1,
    fraction: float = 1.0,
    share: bool = True,
) -> Draw:
    """Random steps of the stored trajectories: state, next state, and the prediction that the sampler used as target.

    Args:
        family: unused.
        weights: unused.
        batch: with ``path``.
        generator: the only source of randomness.
        count: steps per candidate, without repetition; None for all.
        fraction: of the trajectory from its noisy end, ``int(steps * fraction)``; Flow-GRPO's 0.99 drops the last step.
        share: the candidates of a record take the same steps (D3PO); False chooses for each (DDPO).
    """
    path = _path(batch)
    b, k, steps = path.prediction.shape[:3]
    usable = int(steps * fraction)
    if usable == 0:
        raise UserError(f"draw.fraction: {fraction} of a trajectory of {steps} steps leaves none to train on")
    keys = rand((b, 1 if share else k, usable), generator)
    index = timesteps.subset(keys, count).expand(b, k, -1).to(path.t.device)
    now, following = (_at(path.t, index + shift) for shift in (0, 1))
    return Draw(now, _at(path.x, index), _at(path.prediction, index), following, _at(path.x, index + 1))


def replay(family: DiffusionFamily, weights: Weights, batch: Batch, generator: Generator) -> Draw:
    """Diffusion-DRO (arXiv:2510.18353): the expert is noised afresh, the policy's sample is read from its trajectory.

    The candidate with the higher reward is the expert. Both are at the time of one random stored step of the other's
    path; the target of that step is the prediction the sampler itself made there.

    Args:
        family: gives the schedule.
        weights: unused.
        batch: pairs with ``path``, in which only the entries of the worse candidate are read.
        generator: the only source of randomness.
    """
    path = _path(batch)
    b, k, steps = path.prediction.shape[:3]
    reward = batch.labels.get("reward")
    if reward is None or reward.shape != (b, k):
        raise UserError("draw 'replay' reads the label 'reward', one number per candidate")
    sampled = reward.argmin(1)
    index = (rand((b, 1, 1), generator) * steps).long().to(path.t.device).expand(b, k, 1)
    t = _at(path.t, index)[:, :, 0].gather(1, sampled[:, None]).expand(b, k)
    noise = randn(batch.x0.shape, generator)
    expert = expand(reward == reward.amax(1, keepdim=True), noise)
    x_t = torch.where(expert, family.schedule.add_noise(batch.x0, noise, t), _at(path.x, index)[:, :, 0])
    target = torch.where(expert, family.schedule.target(batch.x0, noise, t), _at(path.prediction, index)[:, :, 0])
    return Draw(t, x_t, target)
