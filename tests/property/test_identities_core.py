"""Objectives that must agree with each other where their papers say so, and published defects that must not return."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffalign.likelihood import denoising_error
from diffalign.objectives import diffusion, pointwise, reference_free
from diffalign.registry import find_objective, find_shaping
from diffalign.types import LogProbs

NAN = math.nan
seeds = st.integers(0, 2**31)
betas = st.floats(0.05, 5)


def normal(seed: int, *shape: int, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lists(seed: int, b: int = 4, k: int = 2, u: int = 1, roles: tuple[str, ...] = ("reference",)) -> LogProbs:
    """Random log-probs (B, K, U) of every role; the policy takes gradient."""
    drawn = normal(seed, 1 + len(roles), b, k, u)
    by_role = {role: drawn[1 + i] for i, role in enumerate(roles)}
    return LogProbs({"policy": drawn[0].requires_grad_(), **by_role}, torch.ones(b, k, u, dtype=torch.float64))


def rewards(seed: int, b: int = 4, k: int = 2) -> dict[str, Tensor]:
    """Distinct rewards (B, K) in random order."""
    order = torch.rand(b, k, generator=torch.Generator().manual_seed(seed)).argsort(1)
    return {"reward": order.double() / k}


def value(name: str, lp: LogProbs, labels: dict[str, Tensor], **params: Any) -> tuple[Tensor, Tensor]:
    """The loss as training reduces it, and its gradient in the policy's log-probs."""
    total = torch.stack([part.reduce() for part in find_objective(name)(lp, labels, **params)]).sum()
    (gradient,) = torch.autograd.grad(total, lp.by_role["policy"])
    return total.detach(), gradient


def same(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], factor: float = 1.0) -> None:
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, factor * b, rtol=1e-10, atol=1e-12)


# --- one loss under several names ---------------------------------------------------------------------------------


@given(seeds, betas)
def test_links_and_robust_contain_dpo_and_ipo(seed, beta):
    lp, labels = lists(seed, u=3), rewards(seed)
    dpo = value("sigmoid", lp, labels, beta=beta)
    same(value("gpo", lp, labels, link="logistic", beta=beta), dpo)
    same(value("robust", lp, labels, beta=beta, flip_rate=0.0), dpo)
    same(value("dpop", lp, labels, beta=beta, penalty=0.0), dpo)
    same(value("gpo", lp, labels, link="hinge", beta=beta), value("hinge", lp, labels, beta=beta))
    ipo = value("ipo", lp, labels, tau=beta / 2, normalize="sum")
    same(value("gpo", lp, labels, link="squared", beta=beta), ipo, beta**2)


@given(seeds, betas)
def test_lists_of_two_are_dpo(seed, beta):
    lp, labels = lists(seed, roles=("reference", "behaviour")), rewards(seed)
    dpo = value("sigmoid", lp, labels, beta=beta)
    same(value("plackett_luce", lp, labels, beta=beta), dpo)
    same(value("plackett_luce", lp, labels, beta=beta, top=1), dpo)
    one_hot = {"reward": (labels["reward"] == labels["reward"].amax(1, keepdim=True)).double()}
    same(value("anchored", lp, one_hot, tau=1 / beta, target="given"), dpo)
    against = LogProbs({"policy": lp.by_role["policy"], "reference": lp.by_role["behaviour"]}, lp.mask)
    sharp = {"reward": 1e6 * labels["reward"]}  # whatever the SFT model says
    same(value("brain", lp, sharp, hard=True), value("sigmoid", against, labels, beta=1.0))


@given(seeds, betas)
def test_two_ranked_items_are_gain_weighted_dpo(seed, beta):
    lp, labels = lists(seed, b=1), {"reward": torch.tensor([[0.9, 0.4]], dtype=torch.float64)}
    factor = (2**0.9 - 2**0.4) * (1 / math.log(2) - 1 / math.log(3))
    assert factor / (2**0.9 - 2**0.4) == pytest.approx(0.5325, abs=1e-4)
    same(value("dcg", lp, labels, beta=beta), value("sigmoid", lp, labels, beta=beta), factor)


@given(seeds, betas, st.floats(0.1, 20))
def test_a_certain_smoothed_label_is_dpo_at_its_scale(seed, beta, gamma):
    lp, labels = lists(seed), rewards(seed)
    sure = {"reward": (labels["reward"] == labels["reward"].amax(1, keepdim=True)).double()}
    same(
        value("smoothed", lp, sure, beta=beta, gamma=gamma, kind="probability"),
        value("sigmoid", lp, labels, beta=beta * gamma),
    )


@given(seeds, betas)
def test_equal_labels_make_dense_the_dpo_of_the_mean_frame(seed, beta):
    lp, labels = lists(seed, u=5), rewards(seed)
    dpo = value("sigmoid", lp, labels, beta=beta / 5)
    same(value("dense", lp, labels, beta=beta), dpo)
    frames = {"reward": labels["reward"][..., None].expand(-1, -1, 5)}
    same(value("dense", lp, frames, beta=beta), dpo)
    video = {**frames, "segment": torch.zeros(4, 2, 5)}
    for reduction in ("segment_sum", "per_segment"):  # one segment, the whole video
        same(value("dense", lp, video, beta=beta, segment_reduction=reduction), dpo)


@given(seeds, st.floats(0.1, 3), st.floats(0, 2))
def test_asft_collapses_to_likelihood_and_unlikelihood(seed, weight, imitation):
    lp, labels = lists(seed, u=3), rewards(seed)
    with torch.no_grad():
        lp.by_role["policy"].copy_(-lp.by_role["policy"].abs() - 0.05)
    mean = lp.mean()
    better = (labels["reward"] == labels["reward"].amax(1, keepdim=True)).double()
    closed = -(imitation + weight) * mean * better - weight * torch.log1p(-mean.exp()) * (1 - better)
    total = closed.sum() / 4
    (gradient,) = torch.autograd.grad(total, lp.by_role["policy"])
    same(value("asft", lp, labels, odds_weight=weight, sft_weight=imitation), (total.detach(), gradient))


@given(seeds, betas)
def test_tpo_of_a_repeated_winner_is_contrastive(seed, beta):
    lp, labels = lists(seed, u=3, roles=()), rewards(seed)
    plain = value("contrastive", lp, labels, beta=beta, sft_weight=0.0)
    three = LogProbs({"policy": torch.cat([lp.by_role["policy"], normal(seed, 4, 1, 3)], 1)}, torch.ones(4, 3, 3))
    labels = {"reward": torch.cat([labels["reward"], torch.full((4, 1), 9.0)], 1)}
    parts = find_objective("tpo")(three, labels, beta=beta)
    assert parts[0].reduce().item() == pytest.approx(plain[0].item(), rel=1e-10)
    assert parts[1].reduce().item() == pytest.approx(-three.by_role["policy"][:, 2].mean().item(), rel=1e-10)


@given(seeds, st.floats(10, 2000))
def test_condition_has_the_gradient_of_dpo_without_its_factor(seed, beta):
    """Where the hinge is active; the weight of a pair is the slope of the logistic loss."""
    lp, labels = lists(seed), rewards(seed)
    lp = LogProbs(lp.by_role, lp.mask, scale=0.5, extra={"t": torch.full((4, 2, 1), 0.5)})
    _, dpo = value("sigmoid", lp, labels, beta=beta)
    _, plain = value("condition", lp, labels, beta=beta, margin=1e6, smoothing=0.0)
    torch.testing.assert_close(plain, dpo / (beta * 0.5), rtol=1e-9, atol=1e-12)


@given(seeds, betas)
def test_images_and_texts_share_one_door(seed, beta):
    """The same errors as predictions, and as summed log-probs spread over tokens with garbage behind them."""
    target, policy, reference = normal(seed, 3, 4, 2, 3, 2, 2).unbind()
    errors = {"policy": denoising_error(policy, target), "reference": denoising_error(reference, target)}
    images = LogProbs({r: (-0.5 * e).requires_grad_(r == "policy") for r, e in errors.items()}, torch.ones(4, 2, 1))
    share = torch.tensor([0.25, 0.75], dtype=torch.float64)
    tokens = {r: torch.cat([-0.5 * e * share, torch.full_like(e, NAN)], 2) for r, e in errors.items()}
    tokens["policy"].requires_grad_()
    texts = LogProbs(tokens, torch.tensor([1.0, 1.0, 0.0]).expand(4, 2, 3))
    labels = {**rewards(seed), "desirable": rewards(seed)["reward"] * 2}
    for name, params in (
        ("sigmoid", {"beta": beta}),
        ("ipo", {"tau": beta, "normalize": "sum"}),
        ("kto", {"beta": beta}),
    ):
        first, gradient = value(name, images, labels, **params)
        second, spread = value(name, texts, labels, **params)
        torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(gradient.expand(-1, -1, 2), spread[..., :2], rtol=1e-10, atol=1e-13)
        assert not spread[..., 2].any()


@given(seeds, betas, st.integers(0, 3))
def test_padding_a_list_changes_nothing(seed, beta, extra):
    lp, labels = lists(seed, k=3), rewards(seed, k=3)
    more = {r: torch.cat([v.detach(), normal(seed + 1, 4, extra, 1)], 1) for r, v in lp.by_role.items()}
    more["policy"].requires_grad_()
    present = (torch.arange(3 + extra) < 3).double().expand(4, -1)
    padded = LogProbs(more, torch.ones(4, 3 + extra, 1), present=present)
    filled = {"reward": torch.cat([labels["reward"], torch.zeros(4, extra)], 1)}
    for name, params in (
        ("dcg", {"beta": beta}), ("dcg", {"beta": beta, "rank_by": "model"}), ("plackett_luce", {"beta": beta}),
        ("anchored", {}), ("anchored", {"target": "raw"}), ("slic_hf", {}), ("sft", {}), ("likelihood_floor", {}),
    ):  # fmt: skip
        short, long = value(name, lp, labels, **params), value(name, padded, filled, **params)
        same(short, (long[0], long[1][:, :3]))
        assert not long[1][:, 3:].any()


# --- legal but rare -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("desirable", [[1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.5, 0.0]])
def test_kto_takes_one_class_alone_and_leaves_out_what_has_no_verdict(desirable):
    lp = lists(1, b=3, k=1)
    labels = {"desirable": torch.tensor(desirable)[:, None]}
    (loss,) = find_objective("kto")(lp, labels, beta=0.7)
    ratio = lp.ratio()[:, 0].detach()
    point = ratio.mean().clamp_min(0)
    sides = [2 * d - 1 for d in desirable]
    expected = [float(torch.sigmoid(-0.7 * s * (r - point))) for s, r in zip(sides, ratio, strict=True) if s]
    assert loss.weight[:, 0].tolist() == [float(d != 0.5) for d in desirable]
    assert loss.reduce().item() == pytest.approx(sum(expected) / len(expected), rel=1e-12)


def test_the_reference_point_of_kto_is_that_of_all_ranks_and_has_no_gradient():
    lp = lists(2, b=3, k=1)
    elsewhere = LogProbs(
        lp.by_role, lp.mask, world_mean=lambda x: (x.mean() + 9) / 2 if x.any() and x.min() < 1 else x.mean()
    )
    assert float(pointwise.reference_point(elsewhere)) == pytest.approx(
        max(0.0, (float(lp.ratio().detach().mean()) + 9) / 2)
    )
    assert not pointwise.reference_point(lp).requires_grad
    given = replace(lp, extra={"mismatched": torch.tensor([[1.0], [2.0], [6.0]], dtype=torch.float64)})
    assert float(pointwise.reference_point(given)) == 3.0


def test_separate_means_do_not_depend_on_the_shares_of_a_batch():
    lp, doubled = lists(3, b=2, k=1), lists(3, b=2, k=1)
    labels = {"desirable": torch.tensor([[1.0], [0.0]])}
    again = {role: torch.cat([v, v[1:]]) for role, v in doubled.by_role.items()}
    more = LogProbs(again, torch.ones(3, 1, 1))
    for name, params in (("ddo", {"alpha": 3.0, "beta": 0.1}), ("pmpo", {"alpha": 0.3})):
        parts = find_objective(name)(lp, labels, **params)
        longer = find_objective(name)(more, {"desirable": torch.tensor([[1.0], [0.0], [0.0]])}, **params)
        for a, b in zip(parts, longer, strict=True):
            assert a.reduce().item() == pytest.approx(b.reduce().item(), rel=1e-12)


def test_ties_within_a_list_compete_with_others_alone():
    lp = lists(4, b=1, k=3)
    labels = {"reward": torch.tensor([[0.5, 1.0, 0.5]])}
    score = 0.4 * lp.ratio()[0]
    (loss,) = find_objective("plackett_luce")(lp, labels, beta=0.4)
    assert loss.value[0].item() == pytest.approx((score.logsumexp(0) - score[1]).item(), rel=1e-12)


@pytest.mark.parametrize(
    ("name", "params"),
    [("orpo", {}), ("asft", {"odds_weight": 1.0}), ("simpo", {}), ("slic_hf", {}), ("contrastive", {}), ("ipo", {})],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_empty_completion_is_legal(name, params, dtype):
    policy = -normal(5, 2, 2, 3).abs().to(dtype)
    policy[0, 0] = NAN
    by_role = {"policy": policy.requires_grad_(), "reference": -normal(6, 2, 2, 3).abs().to(dtype)}
    mask = torch.ones(2, 2, 3)
    mask[0, 0] = 0
    total, gradient = value(name, LogProbs(by_role, mask), {"reward": torch.tensor([[1.0, 0.0], [0.0, 1.0]])}, **params)
    assert total.isfinite()
    assert gradient.isfinite().all()
    assert not gradient[0, 0].any()
    assert gradient[1].any()


# --- published defects --------------------------------------------------------------------------------------------


PAIRS = {
    **{name: {"beta": 1.0} for name in ("sigmoid", "dpop", "dense", "condition", "dcg", "plackett_luce")},
    **{name: {} for name in ("ipo", "simpo", "mapo", "contrastive", "orpo", "error_ratio", "slic_hf", "sft")},
    "likelihood_floor": {},
    "robust": {"beta": 1.0, "flip_rate": 0.1},
    "hinge": {"beta": 1.0, "margin": 99.0},
    "gpo": {"beta": 1.0, "link": "savage"},
    "asft": {"odds_weight": 1.0},
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_tie_is_not_a_win_of_the_first_image(name):
    """diffusers' scripts train on label 0.5 as if image 0 had won."""
    lp = lists(7, b=2)
    with torch.no_grad():
        lp.by_role["policy"].copy_(-lp.by_role["policy"].abs())
    lp = LogProbs(lp.by_role, lp.mask, extra={"t": torch.ones(2, 2, 1)})
    tied = {"reward": torch.tensor([[0.5, 0.5], [1.0, 0.0]])}
    total, gradient = value(name, lp, tied, **PAIRS[name])
    alone = LogProbs({r: v[1:] for r, v in lp.by_role.items()}, lp.mask[1:], extra={"t": lp.extra["t"][1:]})
    parts = find_objective(name)(alone, {"reward": tied["reward"][1:]}, **PAIRS[name])
    share = 0.5 if name == "dcg" else 1.0  # a mean over all prompts: the tie is in it with loss 0
    assert total.item() == pytest.approx(share * sum(part.reduce().item() for part in parts), rel=1e-12)
    assert not gradient[0].any()
    assert gradient[1].any()


def test_a_soft_label_belongs_to_its_own_pair():
    """SmPO's release applies the probability of row 0 to the whole batch; a tie there would stop all training."""
    lp, labels = lists(8, b=3), {"reward": torch.tensor([[0.2, 0.2], [0.25, 0.15], [0.12, 0.24]])}
    (loss,) = find_objective("smoothed")(lp, labels, beta=1.0)
    for row in range(3):
        alone = LogProbs({r: v[row : row + 1] for r, v in lp.by_role.items()}, lp.mask[:1])
        (single,) = find_objective("smoothed")(alone, {"reward": labels["reward"][row : row + 1]}, beta=1.0)
        assert loss.value[row].item() == pytest.approx(single.value.item(), rel=1e-12)
    _, gradient = value("smoothed", lp, labels, beta=1.0)
    assert loss.value[0].item() == pytest.approx(math.log(2), rel=1e-12)
    assert not gradient[0].any()
    assert gradient[1:].any((1, 2)).all()
    certainty = diffusion.lead(labels["reward"].double(), *diffusion.PICKSCORE)
    assert certainty[1].item() == pytest.approx(
        2 / (1 + math.exp(-0.1 / (0.28201571106910706 - 0.11543526500463486))) - 1
    )


def test_errors_of_a_video_are_means_over_its_frames_too():
    """Salesforce's script reduces over C, H, W alone, which leaves the frames of a video in the batch."""
    prediction, target = normal(9, 2, 3, 2, 4, 5, 6, 6).unbind()
    error = denoising_error(prediction, target)
    assert error.shape == (3, 2, 1)
    assert error[1, 0, 0].item() == pytest.approx((prediction - target)[1, 0].square().mean().item(), rel=1e-12)
    frames = LogProbs({"policy": -denoising_error(prediction, target, (-3,))}, torch.ones(3, 2, 5))
    torch.testing.assert_close(diffusion.errors(frames), error[..., 0], rtol=1e-12, atol=0)


def test_a_larger_error_on_the_winner_is_never_rewarded():
    """The sign of diffusers' ORPO script is inverted; ours is reachable by name alone."""
    lp, labels = lists(10, b=1), {"reward": torch.tensor([[1.0, 0.0]])}
    with torch.no_grad():
        lp.by_role["policy"].copy_(torch.tensor([[[-0.3], [-0.4]]], dtype=torch.float64))
    fixed, gradient = value("error_ratio", lp, labels)
    published, other = value("error_ratio", lp, labels, sign="as_published")
    assert fixed.item() == pytest.approx(0.3 + 0.1 * math.log1p(math.exp(-0.1)), rel=1e-12)
    assert published.item() == pytest.approx(0.3 + 0.1 * math.log1p(math.exp(0.1)), rel=1e-12)
    assert gradient[0, 0] < other[0, 0] < 0  # raising the winner's log-prob pays more
    assert gradient[0, 1] > 0 > other[0, 1]


@pytest.mark.parametrize("x", [0.0, 1e-300, 1e-15, 4e-6, 1e-3, 0.0999, 0.1001, 2.0, 50.0, 800.0])
def test_the_link_of_mapo_is_exact(x):
    """The release computes ``exp(x) - 1``: 0/0 at 0, and a gradient off by 1e-4 at an error of 4e-6."""
    point = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    found = reference_free.amplified(point)
    (slope,) = torch.autograd.grad(found, point)
    if x < 1e-2:
        expected, steep = 1 - x / 2 + x * x / 12, -0.5 + x / 6
    else:
        expected = x * math.exp(-x) / -math.expm1(-x)
        steep = expected / x - expected / -math.expm1(-x)
    assert found.item() == pytest.approx(expected, rel=1e-12, abs=1e-300)
    assert slope.item() == pytest.approx(steep, rel=1e-10, abs=1e-300)


@pytest.mark.parametrize("x", [-1e-12, -1e-5, -0.5, -0.7, -5.0, -60.0, -800.0])
def test_log_odds_are_exact(x):
    point = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    found = reference_free.log_odds(point)
    (slope,) = torch.autograd.grad(found, point)
    complement = math.log(-math.expm1(x)) if x > -1 else math.log1p(-math.exp(x))
    assert found.item() == pytest.approx(x - complement, rel=1e-12)
    assert slope.item() == pytest.approx(-1 / math.expm1(x), rel=1e-10, abs=0)


def test_rows_at_time_zero_do_not_count():
    lp, labels = lists(11, b=2), rewards(11, b=2)
    noisy = LogProbs(lp.by_role, lp.mask, extra={"t": torch.tensor([[[0.0], [0.0]], [[0.3], [0.3]]])})
    (loss,) = find_objective("condition")(noisy, labels, beta=1.0)
    assert loss.weight.tolist() == [0.0, 1.0]


def test_imitation_is_of_the_winner_and_counts_its_tokens():
    policy = torch.tensor([[[-1.0, -3.0, NAN], [-9.0, -9.0, -9.0]], [[-9.0, NAN, NAN], [-5.0, -5.0, -5.0]]])
    mask = torch.tensor([[[1.0, 1, 0], [1, 1, 1]], [[1, 0, 0], [1, 1, 1]]])
    lp, labels = LogProbs({"policy": policy}, mask), {"reward": torch.tensor([[1.0, 0.0], [0.0, 1.0]])}
    for reduction, expected in (("token", 19 / 5), ("sequence", 7 / 2), ("sum", 19 / 2)):
        (loss,) = find_objective("sft")(lp, labels, reduction=reduction)
        assert loss.reduce().item() == pytest.approx(expected)
    (everything,) = find_objective("sft_all")(lp, {})
    assert everything.reduce().item() == pytest.approx((4 + 27 + 9 + 15) / 9)
    for name, params in (("simpo", {"sft_weight": 0.5}), ("contrastive", {"sft_weight": 0.5})):
        extra = find_objective(name)(lp, labels, **params)[1]
        assert extra.reduce().item() == pytest.approx(0.5 * 19 / 5)


# --- winner guard -----------------------------------------------------------------------------------------------------


def test_a_guard_stops_losers_only_where_their_winner_fell():
    """Values stay; a pair whose winner is below the reference pushes its loser no further, the other pair does."""
    policy = torch.tensor([[[-2.0], [-1.0]], [[-1.0], [-2.0]]], dtype=torch.float64, requires_grad=True)
    reference = torch.full((2, 2, 1), -1.5, dtype=torch.float64)
    lp = LogProbs({"policy": policy, "reference": reference}, torch.ones(2, 2, 1, dtype=torch.float64))
    labels = {"reward": torch.tensor([[1.0, 0.0], [1.0, 0.0]])}
    plain = find_objective("sigmoid")(lp, labels, beta=0.7)[0]
    guarded = find_objective("sigmoid")(find_shaping("winner_guard")(lp, labels), labels, beta=0.7)[0]
    assert torch.equal(plain.value, guarded.value)
    (free,) = torch.autograd.grad(plain.value.sum(), policy)
    (held,) = torch.autograd.grad(guarded.value.sum(), policy)
    assert held[0, 1] == 0
    assert free[0, 1] > 0
    assert torch.equal(held[0, 0], free[0, 0])
    assert torch.equal(held[1], free[1])
    lax = find_shaping("winner_guard")(lp, labels, tolerance=0.5)
    (loose,) = torch.autograd.grad(find_objective("sigmoid")(lax, labels, beta=0.7)[0].value.sum(), policy)
    assert torch.equal(loose, free)
