"""Identities between online objectives, and the published defects that they must not share."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffalign import edm
from diffalign.likelihood import denoising_error
from diffalign.objectives.matching import branch_losses, branch_sizes
from diffalign.registry import find_objective, find_shaping
from diffalign.schedule import Rectified
from diffalign.transitions import dance, flow_sde
from diffalign.types import LogProbs

SHAPE = (3, 4, 5)  # B, K, U


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def total(name: str, lp: LogProbs, labels: dict[str, Tensor], **params) -> Tensor:
    return torch.stack([loss.reduce() for loss in find_objective(name)(lp, labels, **params)]).sum()


def gradient(value: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(value, leaf, retain_graph=True)[0]


def on_policy(seed: int, ragged: bool = True) -> tuple[Tensor, LogProbs, dict[str, Tensor]]:
    policy = normal(*SHAPE, seed=seed).requires_grad_()
    mask = torch.ones(SHAPE, dtype=torch.float64)
    if ragged:
        mask[0, 1, 3:], mask[2, 2] = 0, 0
    lp = LogProbs({"policy": policy, "behaviour": policy.detach()}, mask)
    return policy, lp, {"advantage": 2 * normal(*SHAPE[:2], seed=seed + 1)}


@given(st.integers(0, 10**6))
def test_on_policy_every_form_has_the_gradient_of_advantage_weighted_matching(seed):
    """The clip, one ratio per unit, one per candidate, the detached ratio, and plain ``-A log p``."""
    policy, lp, labels = on_policy(seed)
    plain = -(labels["advantage"].clamp(-5, 5) * lp.mean()).mean()
    expected = gradient(plain, policy)
    forms = {
        "clipped_policy_gradient": {},
        "sum first": {"level": "candidate"},
        "advantage_weighted": {"advantage_max": None},
    }
    for name, params in forms.items():
        objective = name if "_" in name else "clipped_policy_gradient"
        value = total(objective, lp, labels, **params)
        torch.testing.assert_close(gradient(value, policy), expected, rtol=1e-10, atol=1e-14)
    counts = lp.mask.any(-1)
    value = total("clipped_policy_gradient", lp, labels)
    assert value.item() == pytest.approx(-(labels["advantage"].clamp(-5, 5) * counts).mean().item(), abs=1e-12)


@given(st.integers(0, 10**6), st.sampled_from(["Uniform", "t", "t**2", "huber", "ghuber"]))
def test_off_policy_scores_are_clipped_like_any_log_prob(seed, weighting):
    """AWM off policy is the clipped policy gradient of matching scores; at equal policies it is AWM on policy."""
    policy = -normal(*SHAPE, seed=seed).square()
    policy.requires_grad_()
    t = torch.linspace(0.1, 0.9, SHAPE[2], dtype=torch.float64).expand(SHAPE)
    raw = LogProbs({"policy": policy, "behaviour": policy.detach()}, torch.ones(SHAPE), extra={"t": t})
    labels = {"advantage": normal(*SHAPE[:2], seed=seed + 1)}
    lp = find_shaping("matching_score")(raw, labels, weighting=weighting)
    pair = [
        gradient(total("clipped_policy_gradient", lp, labels), policy),
        gradient(total("advantage_weighted", lp, labels, advantage_max=None), policy),
    ]
    torch.testing.assert_close(*pair, rtol=1e-9, atol=1e-12)


@given(st.integers(0, 10**6))
def test_dro_is_signed_matching(seed):
    """On balanced pairs the released sum is twice the mean over samples, and AWM with advantages of +-1."""
    policy = -normal(6, 2, 1, seed=seed).square()
    policy.requires_grad_()
    lp = LogProbs({"policy": policy}, torch.ones_like(policy))
    desirable = torch.tensor([[1.0, 0.0], [0.0, 1.0]] * 3)
    per_record = total("difference", lp, {"desirable": desirable}, per="record")
    per_sample = total("difference", lp, {"desirable": desirable})
    torch.testing.assert_close(per_record, 2 * per_sample)
    errors = -policy[..., 0]
    stable, unstable = errors[desirable == 1], errors[desirable == 0]
    torch.testing.assert_close(per_record, (stable - unstable).mean())
    signs = {"advantage": 2 * desirable - 1}
    awm = total("advantage_weighted", lp, signs, advantage_max=None)
    torch.testing.assert_close(gradient(awm, policy), gradient(per_sample, policy))


def pairs(seed: int, drift: float = 0.0) -> tuple[Tensor, LogProbs]:
    reference = normal(6, 2, 3, seed=seed)
    policy = (reference + drift * normal(6, 2, 3, seed=seed + 1)).requires_grad_()
    return policy, LogProbs({"policy": policy, "reference": reference}, torch.ones_like(reference))


PREFERENCE = torch.tensor([[1.0, -1.0], [-1.0, 1.0], [0.0, 0.0]] * 2)


@given(st.integers(0, 10**6))
def test_d3po_at_the_reference_is_ln_two_with_an_antisymmetric_gradient(seed):
    policy, lp = pairs(seed)
    (loss,) = find_objective("clipped_ratio")(lp, {"reward": PREFERENCE})
    torch.testing.assert_close(loss.value, torch.full_like(loss.value, math.log(2)))
    found = gradient(loss.value.sum(), policy)  # the mean over three steps
    torch.testing.assert_close(found, (-0.05 / 3 * PREFERENCE[..., None]).expand_as(found).double())
    assert torch.equal(found[:, 0], -found[:, 1])


def test_d3po_ties_are_dropped_unless_they_are_to_scale_the_rest_down():
    policy, lp = pairs(0, drift=0.02)
    kept = total("clipped_ratio", lp, {"reward": PREFERENCE}, keep_ties=True)
    dropped = total("clipped_ratio", lp, {"reward": PREFERENCE})
    torch.testing.assert_close(kept, (2 * dropped + math.log(2)) / 3)
    ties = gradient(kept, policy)[2::3]
    assert not ties.any()


def test_d3po_a_candidate_outside_the_band_has_no_gradient():
    policy = torch.tensor([[[0.5], [0.05]]], dtype=torch.float64, requires_grad=True)
    lp = LogProbs({"policy": policy, "reference": torch.zeros(1, 2, 1, dtype=torch.float64)}, torch.ones(1, 2, 1))
    value = total("clipped_ratio", lp, {"reward": torch.tensor([[1.0, 0.0]])}, beta=2.0)
    found = gradient(value, policy).flatten()
    assert found[0] == 0
    assert found[1] > 0
    assert value.item() == pytest.approx(math.log1p(math.exp(-2 * (math.log(1.1) - 0.05))))


# --- DiffusionNFT


def branched(seed: int, mix: float, drift: float) -> tuple[Tensor, LogProbs, Tensor, Tensor, Tensor]:
    shape = (3, 2, 4, 5)
    old, x0, noise = (normal(*shape, seed=seed + k) for k in range(3))
    policy = (old + drift * normal(*shape, seed=seed + 3)).requires_grad_()
    t = torch.linspace(0.1, 1.0, 6, dtype=torch.float64).reshape(3, 2)
    target = Rectified().target(x0, noise, t)
    by_role = {"policy": -denoising_error(policy, target), "behaviour": -denoising_error(old, target)}
    sizes = {n: s[..., None] for n, s in branch_sizes(policy, old, target, mix, 2).items()}
    extra = {"t": t[..., None], "mix": torch.full((3, 2, 1), mix, dtype=torch.float64), **sizes}
    gap = {"behaviour": denoising_error(policy, old)}
    return policy, LogProbs(by_role, torch.ones(3, 2, 1), gap, extra=extra), old, target, t


@given(st.integers(0, 10**6), st.floats(0.05, 1.0))
def test_branch_losses_are_those_of_the_mixed_predictions(seed, mix):
    """From errors and their gap, without a forward of either branch."""
    policy, lp, old, target, t = branched(seed, mix, drift=0.5)
    for found, mixed in zip(
        branch_losses(lp), (mix * policy + (1 - mix) * old, (1 + mix) * old - mix * policy), strict=True
    ):
        miss = t[..., None, None] * (mixed - target)
        size = miss.abs().mean((2, 3)).clamp_min(1e-5).detach()
        expected = miss.square().mean((2, 3)) / size
        torch.testing.assert_close(found[..., 0], expected)
        torch.testing.assert_close(gradient(found.sum(), policy), gradient(expected.sum(), policy))


@given(st.integers(0, 10**6), st.floats(0.05, 1.0))
def test_nft_at_the_old_policy_has_the_gradient_of_weighted_matching(seed, mix):
    """And a value that does not depend on the advantages."""
    policy, lp, _, _, _ = branched(seed, mix, drift=0.0)
    labels = {"advantage": normal(3, 2, seed=seed + 9)}
    value = total("nft", lp, labels)
    positive, negative = branch_losses(lp)
    torch.testing.assert_close(positive, negative)
    matching = (labels["advantage"].clamp(-5, 5)[..., None] * positive).mean() / mix
    torch.testing.assert_close(gradient(value, policy), gradient(matching, policy), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(value, total("nft", lp, {"advantage": -labels["advantage"]}))


# --- transitions


def test_without_noise_the_sde_step_is_eulers():
    v, x = normal(4, 3, seed=0), normal(4, 3, seed=1)
    s, s_next = torch.tensor([0.9, 0.6, 0.3, 0.1]).double(), torch.tensor([0.8, 0.5, 0.1, 0.0]).double()
    euler = x - (s - s_next)[:, None] * v
    for level in (1e-2, 1e-4):
        off = (flow_sde(v, x, s, s_next, noise_level=level).mean - euler).abs().max()
        assert off < 10 * level**2


def test_dance_with_the_flow_sdes_diffusion_is_the_flow_sde():
    v, x = normal(1, 6, seed=0), normal(1, 6, seed=1)
    s, s_next = torch.tensor([0.7]).double(), torch.tensor([0.55]).double()
    one = flow_sde(v, x, s, s_next)
    other = dance(v, x, s, s_next, noise_level=one.diffusion.item())
    torch.testing.assert_close(one.mean, other.mean)
    torch.testing.assert_close(one.std, other.std)


# --- published defects


def guarded(bias: str, other_std: float = 0.4) -> Tensor:
    """What the second record's drift changes in the gradient of the first one's policy."""
    rows = []
    for drift in (0.0, 3.0):
        policy = normal(2, 1, 1, seed=3).requires_grad_()
        gap = torch.tensor([[[0.2]], [[drift]]], dtype=torch.float64)
        extra = {"std": torch.tensor([0.4, other_std]).double().view(2, 1, 1), "dt": torch.full((2, 1, 1), 0.1)}
        behaviour = policy.detach() - 0.1
        lp = LogProbs({"policy": policy, "behaviour": behaviour}, torch.ones(2, 1, 1), {"behaviour": gap}, extra=extra)
        labels = {"advantage": torch.tensor([[1.0], [1.0]])}
        params = {"clip_low": 0.9, "clip_high": 9.0, "bias": bias}
        rows.append(gradient(total("guarded_policy_gradient", lp, labels, **params), policy)[0])
    return rows[0] - rows[1]


def test_the_guards_bias_is_each_samples_own():
    """The release averages over an empty tuple of dimensions, that is over the micro-batch."""
    assert guarded("per_sample").item() == 0
    assert guarded("batch").abs().item() > 1e-2
    assert guarded("batch", other_std=0.3).item() == 0, "its micro-batch is of one step"


def test_the_guards_bias_centres_the_log_ratio():
    """For states sampled by the behaviour policy the mean of log rho is 0, and negative without the bias."""
    std, shift = 0.4, 0.3
    x = std * normal(20000, 1, seed=5)
    log_ratio = ((x.square() - (x - shift).square()) / (2 * std**2)).mean()
    assert log_ratio.item() == pytest.approx(-(shift**2) / (2 * std**2), abs=0.02)
    assert (log_ratio + shift**2 / (2 * std**2)).abs() < 0.02
    lp = LogProbs(
        {"policy": log_ratio.expand(1, 1, 1), "behaviour": torch.zeros(1, 1, 1)},
        torch.ones(1, 1, 1),
        {"behaviour": torch.full((1, 1, 1), shift**2, dtype=torch.float64)},
        extra={"std": torch.full((1, 1, 1), std), "dt": torch.ones(1, 1, 1)},
    )
    value = total("guarded_policy_gradient", lp, {"advantage": torch.ones(1, 1)}, clip_low=0.9, clip_high=9.0)
    assert value.item() == pytest.approx(-1, abs=0.01)


@pytest.mark.parametrize("name", ["clipped_policy_gradient", "guarded_policy_gradient", "advantage_weighted", "nft"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_at_far_apart_policies(name, dtype):
    policy = torch.tensor([-200.0, -60.0, 60.0, 200.0], dtype=dtype)[:, None, None].requires_grad_()
    ones = torch.ones(4, 1, 1, dtype=dtype)
    lp = LogProbs(
        {"policy": policy, "behaviour": -policy.detach()},
        ones,
        {"behaviour": 4 * ones},
        extra={"std": ones, "dt": ones, "t": ones, "mix": ones, "positive": ones, "negative": ones},
    )
    for sign in (-1.0, 1.0):
        value = total(name, lp, {"advantage": sign * torch.ones(4, 1)})
        assert value.dtype == dtype
        assert value.isfinite()
        assert gradient(value, policy).isfinite().all()


def test_units_that_do_not_count_may_hold_anything():
    for name in ("clipped_policy_gradient", "k3_kl", "gaussian_kl", "velocity_kl", "advantage_weighted", "nft"):
        found = []
        for garbage in (0.0, math.nan, math.inf):
            policy = normal(2, 2, 3, seed=1)
            policy[..., 2] = garbage
            policy.requires_grad_()
            mask = torch.tensor([1.0, 1.0, 0.0]).expand(2, 2, 3)
            other = torch.where(mask > 0, normal(2, 2, 3, seed=2), garbage)
            extra = dict.fromkeys(("std", "dt", "diffusion", "t", "mix", "positive", "negative"), other.abs())
            gaps = dict.fromkeys(("behaviour", "reference"), other.square() * policy)
            lp = LogProbs({"policy": policy, "behaviour": other, "reference": other}, mask, gaps, extra=extra)
            value = total(name, lp, {"advantage": normal(2, 2, seed=4)})
            found.append(torch.cat([value[None], gradient(value, policy)[..., :2].flatten()]))
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])
        assert found[0].isfinite().all()


def test_a_noisy_target_is_right_on_average_and_has_the_variance_it_is_divided_by():
    """For Gaussian data the best denoiser is linear: regressing either target on the input finds it."""
    n, sigma, below = 400_000, torch.tensor([0.8]), torch.tensor([0.5])
    y, noise, more = (normal(1, n, seed=seed) for seed in range(3))
    y = 0.5 * y
    noisy = edm.noisy(y, sigma.double(), below.double(), noise, more)
    clean = edm.clean(y, sigma.double(), noise)
    best = 0.25 / (0.25 + 0.64)
    for asked in (clean, noisy):
        slope = (asked.x * asked.target).mean() / asked.x.square().mean()
        assert slope.item() == pytest.approx(best, abs=0.01)
    ratio = (clean.weight / noisy.weight).item()
    assert noisy.target.var().item() == pytest.approx(ratio, rel=0.02)
    assert ratio > 2 * clean.target.var().item()
