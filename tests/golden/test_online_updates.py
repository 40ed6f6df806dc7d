"""Whole updates of the online methods against their formulas.

Rewards become credit, the row of the catalogue runs in several micro-batches, an optimiser steps. What the policy's
numbers should be afterwards is derived here from the papers and releases, with nothing of the package but the draws.
Plain descent, for the most part: the first step of AdamW shows no more of a gradient than its sign.
"""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from diffalign import credit
from diffalign.methods import resolve
from diffalign.samplers import guided, rollout
from diffalign.schedule import Discrete, Rectified
from diffalign.transitions import ddim, flow_sde
from diffalign.types import Batch, Draw, SampledPath

from .toy import (
    F64,
    AdamW,
    Family,
    Net,
    Roles,
    Values,
    assert_same_change,
    descent,
    gradient,
    normal,
    predicted,
    recorded,
    train,
)

SIGMAS = [1, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0]
"""SD3.5's grid of 10 steps."""


def mixed(values: Values, x: Tensor, t: Tensor, tilt: Tensor, guidance: float, *, frozen: bool = False) -> Tensor:
    """Classifier-free guidance from two predictions."""
    without = predicted(values, x, t, 0 * tilt)
    return (1 - guidance) * (without.detach() if frozen else without) + guidance * predicted(values, x, t, tilt)


def density(mean: Tensor, std: Tensor, reached: Tensor) -> Tensor:
    """(B, K, T) mean log-density of a normal distribution over the elements of a latent."""
    std = std[..., None, None]
    each = -((reached - mean) ** 2) / (2 * std**2) - std.log() - math.log(math.sqrt(2 * math.pi))
    return each.mean((-2, -1))


def sampled(family: Family, net: Net, tilt: Tensor, k: int, steps: int, kind: Any, guidance: float) -> SampledPath:
    """The guided trajectories of K candidates per prompt that begin in the same noise."""
    b = len(tilt)
    rows = {"tilt": tilt[:, None].expand(b, k).flatten()}
    predict = guided(family, net, rows, family.unconditional(rows), guidance)
    start = normal(b, 1, 2, 2, seed=20).expand(b, k, 2, 2).flatten(0, 1)
    with torch.no_grad():
        _, path = rollout(predict, start, family.schedule.grid(steps), kind, iter(normal(steps, b * k, 2, 2, seed=21)))
    return SampledPath(*(value.unflatten(0, (b, k)) for value in (path.t, path.x, path.prediction)))


def rows(batch: Batch, *sizes: int) -> list[Batch]:
    """A batch cut into micro-batches of so many records."""
    ends = torch.tensor(sizes).cumsum(0).tolist()
    assert ends[-1] == len(batch.x0)
    return [batch.rows(slice(end - size, end)) for end, size in zip(ends, sizes, strict=True)]


def standardised(rewards: Tensor) -> Tensor:
    """(B, K) ``(r - mean of its prompt) / (standard deviation of the round + 1e-4)``."""
    flat = rewards.flatten().tolist()
    mean = sum(flat) / len(flat)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in flat) / len(flat))
    return torch.stack([(row - sum(row.tolist()) / len(row)) / (deviation + 1e-4) for row in rewards])


def advantages(rewards: Tensor) -> Tensor:
    """The same from the package."""
    groups = [f"prompt {b}" for b in range(len(rewards)) for _ in rewards[b]]
    return credit.standardised(rewards.flatten(), groups, spread="all").reshape(rewards.shape)


# --- D3PO -----------------------------------------------------------------------------------------------------------

REWARDS = [[[0.7, 0.2], [0.1, 0.2]], [[0.3, 0.1], [0.4, 0.9]], [[1.0, 0.0], [0.0, 1.0]], [[0.5, 0.5], [0.5, 0.5]]]
"""Two rewards of two images: the first dominates, the second does, neither, equal."""


def d3po_loss(
    values: Values, reference: Values, path: SampledPath, tilt: Tensor, counted: Any
) -> tuple[Tensor, Tensor]:
    """The mean over pairs and their steps, and which ratios left the band."""
    table = torch.tensor(Discrete.scaled_linear().alphas_cumprod, dtype=F64)
    x, reached, prompt = path.x[:, :, :-1], path.x[:, :, 1:], tilt[:, None, None].expand(-1, 2, path.x.shape[2] - 1)
    ab, after = (table[(999 * t.double()).round().long()] for t in (path.t[:, :, :-1], path.t[:, :, 1:]))
    std = ((1 - after) / (1 - ab) * (1 - ab / after)).sqrt()

    def log_density(numbers: Values) -> Tensor:
        noise = mixed(numbers, x, path.t[:, :, :-1], prompt, 5.0)
        signal, sigma, onward = ((level.sqrt())[..., None, None] for level in (ab, 1 - ab, after))
        away = (1 - after - std**2).sqrt()[..., None, None]
        return density(onward * (x - sigma * noise) / signal + away * noise, std, reached)

    ratio = (log_density(values) - log_density(reference)).exp()
    kept = ratio.clamp(0.9, 1.1)
    terms = []
    for b, (one, other) in enumerate(REWARDS):
        first = all(a >= c for a, c in zip(one, other, strict=True)) and one != other
        second = all(a <= c for a, c in zip(one, other, strict=True)) and one != other
        preference = float(first) - float(second)
        if b in counted:
            inside = 0.1 * (preference * kept[b, 0].log() - preference * kept[b, 1].log())
            terms.append(-(1 / (1 + (-inside).exp())).log())
    return torch.stack(terms).mean(), (ratio - kept).detach() != 0


@pytest.mark.parametrize("keep_ties", [True, False])
def test_d3po_is_a_clipped_dpo_of_every_common_step(keep_ties):
    """Guidance 5 in both branches, a frozen reference that is not the sampler, vector rewards with ties."""
    schedule = Discrete.scaled_linear()
    family, table = Family(schedule), torch.tensor(schedule.alphas_cumprod, dtype=F64)
    roles = Roles({"policy": Net(1, 0.02), "reference": Net(1)})

    def kind(v: Tensor, x: Tensor, t: Tensor, after: Tensor) -> Any:
        return ddim(v, x, table[schedule.native(t)], table[schedule.native(after)])

    tilt = normal(4, seed=5)
    path = sampled(family, roles.nets["policy"], tilt, 2, 6, kind, 5.0)
    assert torch.equal(path.x[:, 0, 0], path.x[:, 1, 0])
    assert not torch.isclose(path.x[:, 0, 1], path.x[:, 1, 1]).any()
    preference = credit.pareto_preference(torch.tensor(REWARDS, dtype=F64))
    blind = SampledPath(path.t, path.x, torch.full_like(path.prediction, torch.nan))  # the sampler's own are not read
    batch = Batch(path.x[:, :, -1], {"tilt": tilt[:, None]}, {"reward": preference}, path=blind)
    options = {"draw": {"count": None}, "estimate": {"guidance": 5.0}, "objective": {"keep_ties": keep_ties}}
    method = resolve("d3po", **options)
    optimizer = torch.optim.SGD(roles.trainable(), lr=0.1)
    (found,) = train(method, family, roles, optimizer, [rows(batch, 1, 2, 1)], None)
    policy, reference = roles.start["policy"], roles.start["reference"]
    counted = range(4) if keep_ties else range(2)
    assert 0 < d3po_loss(policy, reference, path, tilt, counted)[1][:2].double().mean() < 1
    grads = gradient(lambda values: d3po_loss(values, reference, path, tilt, counted)[0], policy, None)
    assert_same_change(found, descent(policy, grads, 0.1), policy)


# --- Flow-GRPO ------------------------------------------------------------------------------------------------------


def grpo_loss(
    values: Values, old: Values, reference: Values, path: SampledPath, tilt: Tensor, gain: Tensor, frozen: bool
) -> tuple[Tensor, Tensor]:
    """Policy loss plus 0.04 KL over all steps but the last, and where the clip took the gradient away."""
    steps, k = path.x.shape[2] - 2, path.x.shape[1]
    x, reached, t = path.x[:, :, :steps], path.x[:, :, 1 : steps + 1], path.t[:, :, :steps].double()
    d, second = t - path.t[:, :, 1 : steps + 1].double(), path.t[0, 0, 1].double()
    g = 0.7 * (t / (1 - torch.where(t == 1, second, t))).sqrt()
    prompt = tilt[:, None, None].expand(-1, k, steps)

    def mean_of(numbers: Values) -> Tensor:
        v = mixed(numbers, x, path.t[:, :, :steps], prompt, 4.5, frozen=frozen)
        s, length, rate = (level[..., None, None] for level in (t, d, g))
        return x - length * v - length * rate**2 / (2 * s) * (x + (1 - s) * v)

    mu, mu_old, mu_reference = (mean_of(numbers) for numbers in (values, old, reference))
    log_density = partial(density, std=g * d.sqrt(), reached=reached)
    ratio, gain = (log_density(mu) - log_density(mu_old)).exp(), gain.clamp(-5, 5)[..., None]
    clipped = ((gain > 0) & (ratio > 1 + 1e-4)) | ((gain < 0) & (ratio < 1 - 1e-4))
    policy = torch.where(clipped, -gain * ratio.detach().clamp(1 - 1e-4, 1 + 1e-4), -gain * ratio)
    kl = ((mu - mu_reference) ** 2).mean((-2, -1)) / (2 * g**2)
    return policy.mean() + 0.04 * kl.mean(), clipped


@pytest.mark.parametrize("adam", [False, True])
@pytest.mark.parametrize("detach_uncond", [False, True])
def test_flow_grpo_s_two_updates_of_a_round(detach_uncond, adam):
    """The first is on policy, the second is not and is clipped; guidance 4.5, a group of equal rewards left out."""
    family = Family(Rectified(shift=3.0))
    torch.testing.assert_close(family.schedule.grid(10), torch.tensor(SIGMAS), rtol=0, atol=6e-5)
    roles = Roles({"policy": Net(2, 0.05), "reference": Net(2)})
    tilt, rewards = normal(5, seed=6), normal(5, 4, seed=7).sigmoid()
    rewards[2] = 0.1
    path = sampled(family, roles.nets["policy"], tilt, 4, 10, flow_sde, 4.5)
    gain = advantages(rewards)
    kept = ~credit.alike(rewards)
    assert kept.tolist() == [True, True, False, True, True]
    tilt, gain, path = tilt[kept], gain[kept], SampledPath(path.t[kept], path.x[kept], path.prediction[kept])
    batch = Batch(path.x[:, :, -1], {"tilt": tilt[:, None]}, {"advantage": gain}, path=path)
    method = resolve("flow-grpo", draw={"count": None}, estimate={"guidance": 4.5, "detach_uncond": detach_uncond})
    plain: Any = torch.optim.SGD(roles.trainable(), lr=1e-2)
    optimizer = torch.optim.AdamW(roles.trainable(), lr=3e-4, weight_decay=1e-4) if adam else plain
    step, clip = (AdamW(3e-4, 1e-4), 0.05) if adam else (partial(descent, lr=1e-2), None)
    parts = rows(batch, 1, 1, 1, 1)
    found = train(method, family, roles, optimizer, [parts[:2], parts[2:]], clip)
    old, reference = roles.start["policy"], roles.start["reference"]
    values, gain = old, standardised(rewards)[kept]
    for number, half in enumerate((slice(0, 2), slice(2, 4))):
        stored = SampledPath(path.t[half], path.x[half], path.prediction[half])
        loss = partial(
            grpo_loss, old=old, reference=reference, path=stored, tilt=tilt[half], gain=gain[half],
            frozen=detach_uncond,
        )  # fmt: skip
        share = loss(values)[1].double().mean()
        assert share == 0 if number == 0 else 0.1 < share < 0.9
        expected = step(values, gradient(lambda v, of=loss: of(v)[0], values, clip))
        assert_same_change(found[number], expected, values)
        values = expected


# --- methods that need the final sample alone ---------------------------------------------------------------------


def round_of(count: int) -> tuple[Batch, Tensor]:
    """Samples of 16 per prompt with one reward far above the others, so that its advantage is clipped at 5."""
    rewards = normal(count, 16, seed=8).sigmoid()
    rewards[1, 3] = 3.0
    gain = advantages(rewards)
    assert (gain > 5).sum() == 1
    assert gain.abs().median() > 0.2
    x0, tilt = normal(count, 16, 2, 2, seed=9), normal(count, 1, seed=10)
    return Batch(x0, {"tilt": tilt}, {"advantage": gain}), standardised(rewards)


def whole(kept: list[Draw], batch: Batch, times: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Times, noise, noisy latents and prompts of all micro-batches, each with T times per sample and fresh noise."""
    t, x_t, target = (torch.cat([getattr(draw, name) for draw in kept]) for name in ("t", "x_t", "target"))
    assert t.shape == (*batch.x0.shape[:2], times)
    x0 = batch.x0[:, :, None]
    noise = target + x0
    assert len(noise.flatten().unique()) == noise.numel()
    assert abs(float(noise.std()) - 1) < 0.1
    level = t.double()[..., None, None]
    torch.testing.assert_close(x_t, (1 - level) * x0 + level * noise, rtol=0, atol=1e-6)  # times are in float32
    return t, noise, x_t, batch.cond["tilt"][..., None].expand(t.shape)


def in_strata(t: Tensor, bounds: list[int]) -> bool:
    """Whether time k of every record is one of the grid's from entry ``bounds[k]`` on, before the next, for all K."""
    grid = Rectified(shift=3.0).grid(14)
    index = (t[..., None] == grid).double().argmax(-1)
    assert torch.equal(grid[index], t)
    low, high = torch.tensor(bounds[:-1]), torch.tensor(bounds[1:])
    return bool(((index >= low) & (index < high)).all()) and torch.equal(t, t[:, :1].expand_as(t))


def test_awm_as_in_the_paper():
    """Uniform weight, four times per sample, unscaled advantages, one penalty."""
    family, roles = Family(Rectified(shift=3.0)), Roles({"policy": Net(3, 0.3), "reference": Net(3)})
    batch, gain = round_of(6)
    method, kept = recorded(resolve("awm"))
    optimizer = torch.optim.SGD(roles.trainable(), lr=0.1)
    (found,) = train(method, family, roles, optimizer, [rows(batch, 2, 3, 1)], None)
    t, noise, x_t, tilt = whole(kept, batch, 4)
    assert in_strata(t, [1, 3, 6, 9, 12])
    start = roles.start["policy"]

    def loss(values: Values) -> Tensor:
        v = predicted(values, x_t, t, tilt)
        error = ((v - (noise - batch.x0[:, :, None])) ** 2).mean((-2, -1))
        drift = ((v - predicted(roles.start["reference"], x_t, t, tilt)) ** 2).mean()
        return (gain.clamp(-5, 5)[..., None] * error).mean() + 0.4 * drift  # the gradient at rho = 1

    assert_same_change(found, descent(start, gradient(loss, start, None), 0.1), start)


def test_awm_as_released():
    """ghuber of power 1/4 times t, six times per sample, advantages over 5, penalties to the base and the average."""
    family = Family(Rectified(shift=3.0))
    roles = Roles({"policy": Net(3, 0.3), "reference": Net(3), "average": Net(3, 0.25)})
    batch, gain = round_of(5)
    method, kept = recorded(resolve("awm-released"))
    optimizer = torch.optim.SGD(roles.trainable(), lr=0.1)
    (found,) = train(method, family, roles, optimizer, [rows(batch, 1, 4)], None)
    t, noise, x_t, tilt = whole(kept, batch, 6)
    assert in_strata(t, [1, 2, 4, 6, 8, 10, 12])
    start, scaled = roles.start["policy"], gain.clamp(-5, 5)[..., None] / 5

    def loss(values: Values) -> Tensor:
        v = predicted(values, x_t, t, tilt)
        error = ((v - (noise - batch.x0[:, :, None])) ** 2).mean((-2, -1))
        slope = t.double() * (error.detach() + 1e-10) ** (0.25 - 1)  # of t / p ((E + 1e-10)^p - 1e-10^p)
        to_base, to_average = (
            ((v - predicted(roles.start[role], x_t, t, tilt)) ** 2).mean() for role in ("reference", "average")
        )
        return (scaled * slope * error).mean() + 0.003 * to_base + 1.0 * to_average

    assert_same_change(found, descent(start, gradient(loss, start, None), 0.1), start)


@pytest.mark.parametrize("mix", [1.0, 0.1])
def test_diffusion_nft_has_two_branches_around_an_older_policy(mix):
    """Nine of ten times per sample, in an order of its own; the normalisers carry no gradient."""
    family = Family(Rectified(shift=3.0))
    roles = Roles({"policy": Net(4, 0.3), "behaviour": Net(4, 0.2), "reference": Net(4)})
    batch, gain = round_of(6)
    method, kept = recorded(resolve("diffusion-nft", estimate={"mix": mix}))
    optimizer = torch.optim.SGD(roles.trainable(), lr=0.1)
    (found,) = train(method, family, roles, optimizer, [rows(batch, 2, 4)], None)
    t, noise, x_t, tilt = whole(kept, batch, 9)
    index = (t[..., None].double() - torch.tensor(SIGMAS[:-1], dtype=F64)).abs().argmin(-1)
    torch.testing.assert_close(t, torch.tensor(SIGMAS)[index], rtol=0, atol=6e-5)
    assert all(len(row.unique()) == 9 for row in index.flatten(0, 1))
    assert len(index.flatten(0, 1).unique(dim=0)) > 90
    start, level, x0 = roles.start["policy"], t.double()[..., None, None], batch.x0[:, :, None]
    exact = (1 - level) * x0 + level * noise
    r = (gain.clamp(-5, 5) / 10 + 0.5).clamp(0, 1)[..., None]

    def loss(values: Values) -> Tensor:
        v, v_old, v_ref = (
            predicted(numbers, x_t, t, tilt) for numbers in (values, roles.start["behaviour"], roles.start["reference"])
        )
        branches = []
        for branch in (mix * v + (1 - mix) * v_old, (1 + mix) * v_old - mix * v):
            off = exact - level * branch - x0
            size = off.detach().abs().mean((-2, -1)).clamp_min(1e-5)
            branches.append((off**2).mean((-2, -1)) / size)
        positive, negative = branches
        return (5 * (r * positive + (1 - r) * negative) / mix).mean() + 1e-4 * ((v - v_ref) ** 2).mean()

    assert_same_change(found, descent(start, gradient(loss, start, None), 0.1), start)
