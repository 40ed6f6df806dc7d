"""Samplers as plain loops over a velocity or noise prediction, written once for every family."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from diffalign import transitions
from diffalign.errors import UserError, nearest
from diffalign.likelihood import wide
from diffalign.schedule import Discrete, expand
from diffalign.transitions import Step
from diffalign.types import Condition, DiffusionFamily, SampledPath, Schedule, joined

Predict = Callable[[Tensor, Tensor], Tensor]
"""(x_t (N, ...), t scalar or (N,)) -> prediction (N, ...)."""
Transition = Callable[[Tensor, Tensor, Tensor, Tensor], Step]
"""(prediction, x_t, t, t_next) -> the Gaussian of the next state; times (N,)."""
ROUNDING = 1e-6
"""Of float32 times: the end of an interval may be a time of the grid."""


def mix(without: Tensor, with_prompt: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance ``u + g (c - u)`` (arXiv:2207.12598)."""
    return without + guidance * (with_prompt - without)


def guided(
    family: DiffusionFamily,
    net: nn.Module,
    cond: Condition,
    empty: Condition,
    guidance: float,
    interval: tuple[float, float] = (0.0, 1.0),
    *,
    detach_uncond: bool = False,
) -> Predict:
    """The network's prediction with classifier-free guidance, both branches in one forward, mixed in float32 or better.

    Args:
        cond, empty: conditions of the prompts and of the empty prompt, each leading with N.
        guidance: 1 runs the conditional branch alone.
        interval: times at which guidance acts, both ends included (arXiv:2404.07724); elsewhere it is 1. Where no row
            is within, the conditional branch runs alone.
        detach_uncond: no gradient through the branch of the empty prompt.
    """

    def alone(x: Tensor, t: Tensor) -> Tensor:
        return family.predict(net, x, t.expand(len(x)), cond)

    if guidance == 1.0:
        return alone
    both = joined([empty, cond])
    low, high = interval[0] - ROUNDING, interval[1] + ROUNDING

    def predict(x: Tensor, t: Tensor) -> Tensor:
        acts = (t >= low) & (t <= high)
        if not acts.any():
            return alone(x, t)
        t = t.expand(len(x))
        without, with_prompt = wide(family.predict(net, torch.cat([x, x]), torch.cat([t, t]), both)).chunk(2)
        mixed = mix(without.detach() if detach_uncond else without, with_prompt, guidance)
        return torch.where(expand(acts, x), family.rescale(mixed, with_prompt), with_prompt)

    return predict


@torch.no_grad()
def euler(predict: Predict, x: Tensor, grid: Tensor, *, states: list[Tensor] | None = None) -> Tensor:
    """Euler steps of the flow ODE ``dx/dt = v`` along a decreasing time grid.

    DDIM without noise and first-order DPM-Solver are this same step in the flow parametrisation.

    Args:
        x: (N, ...) noise at ``grid[0]``.
        grid: (T + 1,) times ending at 0.
        states: receives x before and after every step.

    Returns:
        (N, ...) clean latents.
    """
    _note(states, x)
    for t, following in pairwise(grid):
        x = x + (following - t) * predict(x, t)
        _note(states, x)
    return x


@torch.no_grad()
def ddim(
    predict: Predict, x: Tensor, grid: Tensor, schedule: Discrete, *, states: list[Tensor] | None = None
) -> Tensor:
    """DDIM without noise for a discrete schedule (arXiv:2010.02502); the last step goes to ``schedule.final``.

    First-order DPM-Solver and Euler steps in ``sqrt((1 - abar) / abar)`` are this same step. Every step ends at the
    level the network is asked at next, where the stock scheduler ends ``1000 // steps`` below the last: the same if
    steps divides 1000. Other arguments as in :func:`euler`.
    """
    _note(states, x)
    levels = torch.tensor(schedule.alphas_cumprod, dtype=torch.float64, device=grid.device)[schedule.native(grid)]
    levels[-1] = schedule.final
    for t, level, following in zip(grid[:-1], levels[:-1], levels[1:], strict=True):
        x = transitions.ddim(
            predict(x, t), x, level, following, noise_level=0.0, parametrisation=schedule.prediction
        ).mean
        _note(states, x)
    return x


@torch.no_grad()
def dpm2(predict: Predict, x: Tensor, grid: Tensor, *, states: list[Tensor] | None = None) -> Tensor:
    """Second-order multistep DPM-Solver on the clean estimate; first and last step of first order.

    The solver of DiffusionNFT's rollouts (arXiv:2211.01095, midpoint form; arXiv:2509.16117, release). Arguments as in
    :func:`euler`.
    """
    _note(states, x)
    levels = grid.double()
    log_snr = torch.log1p(-levels) - levels.log()
    before: Tensor | None = None
    last = len(grid) - 2
    for index, (t, s, s_next) in enumerate(zip(grid[:-1], levels[:-1], levels[1:], strict=True)):
        clean = x - s * predict(x, t)
        mixed = clean
        if before is not None and index < last:
            h, h_before = log_snr[index + 1] - log_snr[index], log_snr[index] - log_snr[index - 1]
            mixed = clean + 0.5 * (h / h_before) * (clean - before)
        x, before = s_next / s * x + (1 - s_next / s) * mixed, clean
        _note(states, x)
    return x


@torch.no_grad()
def sa_solver(
    predict: Predict,
    x: Tensor,
    grid: Tensor,
    *,
    tau: float = 0.0,
    interval: tuple[float, float] = (0.3, 0.9),
    predictor_order: int = 2,
    corrector_order: int = 2,
    noise: Iterator[Tensor] | None = None,
    states: list[Tensor] | None = None,
) -> Tensor:
    """SA-Solver on the clean estimate, predict-evaluate-correct, one network call per step (arXiv:2309.05019).

    As in AWM's rollouts: orders rise from 1 at the start and fall towards the end, the first step is not corrected, the
    last returns the last clean estimate without a network call, and second-order steps carry the O(h^3) term for few
    steps. At least ``max(predictor_order, corrector_order - 1)`` steps.

    Args:
        x: (N, ...) noise at ``grid[0]``.
        grid: (T + 1,) times that begin below 1 and end at 0; see :func:`sa_grid`.
        tau: how stochastic, at times within ``interval``; 0 is an ODE solver. 0.4 for AWM's GenEval and OCR runs.
        interval: where tau acts.
        predictor_order, corrector_order: 1 to 4; corrector order 0 predicts only.
        noise: one standard normal (N, ...) per step but the last; needed when tau is not 0.
        states: receives x before and after every step.
    """
    times, steps = grid.tolist(), len(grid) - 1
    warm = max(predictor_order, corrector_order - 1)
    if times[0] >= 1 or steps < warm:
        raise UserError(f"SA-Solver needs times below 1 and at least {warm} steps, got {times[0]} and {steps}")
    _note(states, x)
    found = [(times[0], x - times[0] * predict(x, grid[0]))]
    for step in range(1, steps):
        ends = (times[step - 1], times[step])
        strength = tau if interval[0] <= times[step] <= interval[1] else 0.0
        shock = None if noise is None else next(noise)
        order = min(predictor_order, step, steps - step + 1)
        predicted = _adams(x, ends, found[: -order - 1 : -1], strength, shock)
        found.append((times[step], predicted - times[step] * predict(predicted, grid[step])))
        order = min(corrector_order, step + 1, steps - step + 2)
        corrects = corrector_order > 0 and not (step == 1 and warm > 1)
        x = _adams(x, ends, found[: -order - 1 : -1], strength, shock) if corrects else predicted
        _note(states, x)
    _note(states, found[-1][1])
    return found[-1][1]


def _adams(
    x: Tensor, ends: tuple[float, float], nodes: Sequence[tuple[float, Tensor]], tau: float, shock: Tensor | None
) -> Tensor:
    """One stochastic Adams step between two times, given times and clean estimates (newest first).

    In log-SNR u before the end, the weights are those of ``c int_0^h exp(-c u) p(u) du`` for the polynomial p through
    the nodes, ``c = 1 + tau^2``: they reproduce its moments.
    """
    start, end = ends
    c, at_end = 1 + tau**2, _log_snr(end)
    h = at_end - _log_snr(start)
    moments = [-math.expm1(-c * h)]
    for k in range(1, len(nodes)):
        moments.append(k / c * moments[-1] - h**k * math.exp(-c * h))
    u = torch.tensor([at_end - _log_snr(time) for time, _ in nodes], dtype=torch.float64)
    powers = u ** torch.arange(len(nodes))[:, None]
    weights = torch.linalg.solve(powers, torch.tensor(moments, dtype=torch.float64)).tolist()
    if len(nodes) == 2:
        few = c * (h**2 / 2 - (h * c + math.expm1(-c * h)) / c**2) / float(u[1] - u[0])
        weights = [weights[0] + few, weights[1] - few]
    drift = torch.stack([weight * clean for weight, (_, clean) in zip(weights, nodes, strict=True)]).sum(0)
    out = math.exp(-(tau**2) * h) * end / start * x + (1 - end) * drift
    if not tau:
        return out
    if shock is None:
        raise ValueError("SA-Solver with tau above 0 needs noise")
    return out + end * math.sqrt(-math.expm1(-2 * tau**2 * h)) * shock


def _log_snr(t: float) -> float:
    return math.log1p(-t) - math.log(t)


def sa_grid(grid: Tensor) -> Tensor:
    """AWM's edits of a flow grid for SA-Solver: start at 0.999, last time above 0 half of the one before."""
    out = grid.clone()
    out[0] = out[0].clamp_max(0.999)
    if len(out) > 2:
        out[-2] = out[-3] / 2
    return out


def sa_ode(predict: Predict, x: Tensor, grid: Tensor) -> Tensor:
    """:func:`sa_solver` without noise on the edited grid, as AWM's PickScore runs sample."""
    return sa_solver(predict, x, sa_grid(grid))


def _note(states: list[Tensor] | None, x: Tensor) -> None:
    if states is not None:
        states.append(x)


@torch.no_grad()
def rollout(
    predict: Predict,
    x: Tensor,
    grid: Tensor,
    transition: Transition,
    noise: Iterator[Tensor],
    window: tuple[int, int] | None = None,
    still: Transition | None = None,
) -> tuple[Tensor, SampledPath]:
    """A stochastic trajectory with everything that training on its transitions needs.

    Args:
        x: (N, ...) noise at ``grid[0]``.
        grid: (T + 1,) decreasing times.
        transition: ``(prediction, x_t, t, t_next) -> Step``, for a flow one of ``transitions.FLOW_STEPS``.
        noise: one standard normal (N, ...) per step that takes some.
        window: first and last + 1 of the steps to take so and to keep; the others follow ``still`` without noise
            (Flow-GRPO-Fast). None for all.
        still: the step of noise level 0.

    Returns:
        The sample, and a path that leads with N in place of (B, K).
    """
    first, end = window or (0, len(grid) - 1)
    states, predictions = [x], []
    for index, (t, following) in enumerate(pairwise(grid)):
        prediction, ends = predict(x, t), (t.expand(len(x)), following.expand(len(x)))
        if first <= index < end:
            x = transition(prediction, x, *ends).sample(next(noise))
            predictions.append(prediction)
            states.append(x)
            continue
        assert still is not None
        x = still(prediction, x, *ends).mean
        if index < first:
            states = [x]
    t = grid[first : end + 1].expand(len(x), -1)
    return x, SampledPath(t, torch.stack(states, 1), torch.stack(predictions, 1))


SAMPLERS: dict[str, Callable[[Predict, Tensor, Tensor], Tensor]] = {
    "euler": euler,
    "ddim": euler,  # the same step in the flow parametrisation
    "dpm1": euler,
    "dpm2": dpm2,
    "sa_solver": sa_ode,
}
"""For flows; of these, the names of the first-order step are also those of :func:`ddim`."""


def find_sampler(name: str, schedule: Schedule) -> Callable[[Predict, Tensor, Tensor], Tensor]:
    """A sampler by name, for a schedule.

    Raises:
        UserError: unknown, or made for flows and the schedule is discrete.
    """
    if name not in SAMPLERS:
        raise UserError(f"sampling.sampler: unknown {name!r}{nearest(name, SAMPLERS)}")
    if not isinstance(schedule, Discrete):
        return SAMPLERS[name]
    if SAMPLERS[name] is not euler:
        raise UserError(f"sampling.sampler: {name!r} is for flow models; this model's schedule is discrete: use ddim")
    return partial(ddim, schedule=schedule)
