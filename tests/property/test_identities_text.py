"""Text and self-play objectives that must coincide with each other, or with a hand-made gradient."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from diffalign.choices import best_worst, curriculum
from diffalign.errors import UserError
from diffalign.likelihood import geometric_mixture, token_kl
from diffalign.objectives.shaping import divergence_score
from diffalign.registry import find_objective, find_shaping
from diffalign.types import LogProbs

SEEDS = st.integers(0, 10_000)
ROLES = ("policy", "reference", "prev", "guide", "history.0")


def case(seed: int, b: int = 4, k: int = 2, u: int = 5) -> tuple[LogProbs, dict[str, torch.Tensor]]:
    """Log-probs of every role with ragged masks (one completion empty), and labels that prefer either candidate."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    lengths = torch.randint(1, u + 1, (b, k), generator=generator)
    lengths[0, 0] = 0
    by_role = {role: 3 * draw(b, k, u) for role in ROLES}
    by_role["policy"].requires_grad_()
    mask = (torch.arange(u) < lengths[..., None]).double()
    return LogProbs(by_role, mask, extra={"values": draw(b, k, u)}), {"reward": draw(b, k)}


def winner(labels) -> torch.Tensor:
    """1 for the better candidate of a pair, 0 for the other."""
    return (labels["reward"] > labels["reward"].flip(1)).double()


def outcome(name: str, lp: LogProbs, labels, through: tuple | None = None, **params) -> tuple:
    """The value of the only part after a shaping, and the gradient of its reduction in the policy's log-probs."""
    seen = lp if through is None else shaped(through[0], lp, labels, **through[1])
    (loss,) = find_objective(name)(seen, labels, **params)
    (gradient,) = torch.autograd.grad(loss.reduce(), lp.by_role["policy"])
    return loss.value.detach(), gradient


def shaped(name: str, lp: LogProbs, labels, **params) -> LogProbs:
    return find_shaping(name)(lp, labels, **params)


def same(first, second, rtol: float = 1e-10) -> None:
    torch.testing.assert_close(first[0], second[0], rtol=rtol, atol=1e-12)
    torch.testing.assert_close(first[1], second[1], rtol=rtol, atol=1e-12)


def differ(first, second) -> None:
    assert (first[1] - second[1]).abs().max() > 1e-4


# --- DPO ----------------------------------------------------------------------------------------------------------


@given(SEEDS)
def test_length_desensitised_at_alpha_one_is_dpo(seed):
    lp, labels = case(seed)
    dpo = outcome("sigmoid", lp, labels, beta=0.3)
    same(outcome("sigmoid", lp, labels, ("length_desensitised", {"alpha": 1.0}), beta=0.3), dpo)


def test_length_desensitised_at_alpha_zero_truncates_at_the_shorter():
    lp, labels = case(3)
    mask = torch.tensor([[[1, 1, 0, 1, 1], [1, 1, 0, 0, 0]]]).double()  # with a hole: the third counted is the fourth
    lp = replace(lp, by_role={role: v[:1] for role, v in lp.by_role.items()}, mask=mask)
    short = shaped("length_desensitised", lp, labels, alpha=0.0)
    kept = torch.tensor([[[1, 1, 0, 0, 0], [1, 1, 0, 0, 0]]]).double()
    for role in ("policy", "reference"):
        torch.testing.assert_close(short.by_role[role], torch.where(kept > 0, lp.by_role[role], 0.0))


@given(SEEDS)
def test_token_guided_without_strength_or_by_the_reference_is_dpo(seed):
    lp, labels = case(seed)
    dpo = outcome("sigmoid", lp, labels, beta=0.3)
    same(outcome("sigmoid", lp, labels, ("token_guided", {"alpha": 0.0, "beta": 0.3}), beta=0.3), dpo)
    flat = replace(lp, by_role={**lp.by_role, "guide": lp.by_role["reference"]})
    same(outcome("sigmoid", flat, labels, ("token_guided", {"alpha": 0.5, "beta": 0.3}), beta=0.3), dpo)
    differ(outcome("sigmoid", lp, labels, ("token_guided", {"alpha": 0.5, "beta": 0.3}), beta=0.3), dpo)


@given(SEEDS, st.floats(-3, 3))
def test_token_guided_by_a_constant_rescales_each_side(seed, constant):
    lp, labels = case(seed)
    flat = replace(lp, by_role={**lp.by_role, "guide": lp.by_role["reference"] + constant})
    side = 2 * winner(labels) - 1
    guided = shaped("token_guided", flat, labels, alpha=0.5, beta=0.3).ratio()
    torch.testing.assert_close(guided, (1 + 0.5 * 0.3 * constant * side) * lp.ratio(), rtol=1e-10, atol=1e-12)


@given(SEEDS)
def test_the_reverse_kl_is_dpo_and_the_alphas_lie_between(seed):
    lp, labels = case(seed)
    dpo = outcome("sigmoid", lp, labels, beta=0.3)
    same(outcome("sigmoid", lp, labels, ("f_divergence", {"divergence": "reverse_kl"}), beta=0.3), dpo)
    ratio = lp.ratio().detach()
    forward = divergence_score(ratio, "forward_kl")
    torch.testing.assert_close(divergence_score(ratio, "alpha_divergence", 1.0), forward)
    torch.testing.assert_close(divergence_score(ratio, "alpha_divergence", 0.0), ratio)
    torch.testing.assert_close(divergence_score(ratio, "alpha_divergence", 1e-7), ratio, rtol=1e-5, atol=1e-5)


@given(st.floats(0.05, 0.95), st.floats(-5, 5))
def test_the_coefficient_of_trl_is_one_minus_alpha(alpha, ratio):
    trl = 1 - alpha
    by_trl = (math.exp(ratio) ** (trl - 1) - 1) / (trl - 1)  # of u = exp(ratio)
    ours = divergence_score(torch.tensor(ratio, dtype=torch.float64), "alpha_divergence", alpha)
    assert ours.item() == pytest.approx(by_trl, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"])
def test_a_score_is_zero_with_slope_one_where_policy_is_reference(divergence):
    ratio = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    score = divergence_score(ratio, divergence)
    assert abs(score.item()) < 1e-15
    (slope,) = torch.autograd.grad(score.sum(), ratio)
    assert slope.item() == pytest.approx(0.5 if divergence == "js_divergence" else 1.0)


@given(SEEDS)
def test_modpo_for_one_objective_alone_is_dpo(seed):
    lp, labels = case(seed)
    dpo = outcome("sigmoid", lp, labels, beta=0.3)
    labels = {**labels, "others": lp.by_role["guide"][..., :1]}
    same(outcome("modpo", lp, labels, beta=0.3, w=[1.0, 0.0]), dpo)
    differ(outcome("modpo", lp, labels, beta=0.3, w=[0.5, 0.5]), dpo)
    same(outcome("modpo", lp, {**labels, "others": labels["others"][..., :0]}, beta=0.3, w=(1.0,)), dpo)


@pytest.mark.parametrize("w", [[0.0, 1.0], [-0.1, 1.1], []])
def test_modpo_refuses_weights_that_leave_the_trained_objective_out(w):
    lp, labels = case(0)
    with pytest.raises(UserError, match="positive"):
        outcome("modpo", lp, {**labels, "others": labels["reward"]}, w=w)
    with pytest.raises(UserError, match="weighs 2 other"):
        outcome("modpo", lp, {**labels, "others": labels["reward"]}, w=[0.5, 0.2, 0.3])


@given(SEEDS)
def test_flex_with_equal_betas_is_dpo_and_with_no_second_one_moves_the_winner_alone(seed):
    lp, labels = case(seed)
    same(outcome("flex", lp, labels, beta_chosen=0.3, beta_rejected=0.3), outcome("sigmoid", lp, labels, beta=0.3))
    _, gradient = outcome("flex", lp, labels, beta_chosen=0.3, beta_rejected=0.0)
    assert not (gradient.sum(-1) * (1 - winner(labels))).any()


@given(SEEDS)
def test_madpo_at_margin_tau_or_strongly_contradicted_is_dpo(seed):
    lp, labels = case(seed)
    dpo = outcome("sigmoid", lp, labels, beta=0.3)
    for margin in (2.0, -2.0, -9.0):  # c(tau) = 1; 1 at and below -tau
        score = margin * winner(labels)
        same(outcome("madpo", lp, {**labels, "score": score}, beta=0.3, tau=2.0), dpo)
    hard, _ = outcome("madpo", lp, {**labels, "score": 0.5 * winner(labels)}, beta=0.3, tau=2.0)
    easy, _ = outcome("madpo", lp, {**labels, "score": 4.0 * winner(labels)}, beta=0.3, tau=2.0)
    wrong, _ = outcome("madpo", lp, {**labels, "score": -0.5 * winner(labels)}, beta=0.3, tau=2.0)
    assert (easy < dpo[0]).all()
    assert (dpo[0] < hard).all()
    assert (wrong < dpo[0]).all()


@given(SEEDS)
def test_dno_on_hard_pairs_is_dpo(seed):
    lp, labels = case(seed)
    won = {"win_prob": 0.5 + 0.1 * winner(labels)}
    same(outcome("dno", lp, won, eta=0.3, variant="prct"), outcome("sigmoid", lp, labels, beta=0.3))
    soft, _ = outcome("dno", lp, won, eta=0.3)
    target = 1 / (1 + math.exp(-0.1))
    smoothed, _ = outcome("sigmoid", lp, labels, beta=0.3, label_smoothing=1 - target)
    torch.testing.assert_close(soft, smoothed, rtol=1e-10, atol=0)


@given(SEEDS, st.integers(1, 9), st.integers(0, 30))
def test_visits_are_the_label_smoothing_of_a_pair(seed, won, lost):
    lp, labels = case(seed)
    visits = torch.where(winner(labels) > 0, float(won), float(lost))
    flipped = min(1 - 1 / (1 + lost / won), 0.5)
    smoothed = outcome("sigmoid", lp, labels, beta=0.3, label_smoothing=flipped)
    same(outcome("visit_smoothed", lp, {**labels, "visits": visits}, beta=0.3), smoothed)


def test_only_the_ends_that_differ_count():
    lp, labels = case(1)
    ids = torch.tensor([[[5, 6, 7, 8, 9], [5, 6, 1, 8, 9]]] * 3 + [[[5, 6, 7, 8, 9]] * 2])
    mask = torch.ones_like(lp.mask)
    mask[1, 0, 2:] = mask[1, 1, 1:] = 0  # one is the beginning of the other: it differs where the shorter ends
    lp = replace(lp, mask=mask)
    ends = shaped("first_difference", lp, {**labels, "ids": ids})
    assert ends.mask[0].tolist() == [[0, 0, 1, 1, 1]] * 2
    assert ends.mask[1].tolist() == [[0, 1, 0, 0, 0], [0, 0, 0, 0, 0]]
    assert ends.exists.tolist() == [[1, 1]] * 3 + [[0, 0]]
    (loss,) = find_objective("sigmoid")(ends, labels, beta=0.3)
    assert loss.weight.tolist() == [1, 1, 1, 0]


# --- IPO ----------------------------------------------------------------------------------------------------------


@given(SEEDS, st.floats(0.05, 2))
def test_inpo_with_tau_equal_to_eta_is_ipo_on_sums(seed, eta):
    lp, labels = case(seed)
    ipo = outcome("ipo", lp, labels, tau=eta, normalize="sum")
    same(outcome("inpo", lp, labels, eta=eta, reference_weight=1.0), ipo)
    differ(outcome("inpo", lp, labels, eta=eta, reference_weight=0.5), ipo)


@given(SEEDS, st.floats(0, 1))
def test_mnpo_with_one_iterate_is_inpo(seed, share):
    lp, labels = case(seed)
    lp = replace(lp, by_role={**lp.by_role, "prev": lp.by_role["history.0"]})
    inpo = outcome("inpo", lp, labels, eta=0.1, reference_weight=share)
    for weights in ((1.0, 0.0), (0.7, 0.3), (0.0, 0.0)):
        same(outcome("mnpo", lp, labels, eta=0.1, reference_weight=share, history_weights=weights), inpo)


@given(SEEDS)
def test_mnpo_mixes_its_iterates(seed):
    lp, labels = case(seed)
    two = replace(lp, by_role={**lp.by_role, "history.1": lp.by_role["guide"]})
    mixed = 0.75 * lp.by_role["history.0"] + 0.25 * lp.by_role["guide"]
    one = replace(lp, by_role={**lp.by_role, "prev": mixed})
    same(outcome("mnpo", two, labels, eta=0.1, history_weights=(3.0, 1.0)), outcome("inpo", one, labels, eta=0.1))
    alone = outcome("mnpo", two, labels, eta=0.1, max_history=1)
    same(alone, outcome("mnpo", lp, labels, eta=0.1, history_weights=(0.2,)))
    with pytest.raises(UserError, match="fewer"):
        outcome("mnpo", two, labels, history_weights=(1.0,))


@given(SEEDS, st.floats(0.05, 2))
def test_online_ipo_with_hard_labels_is_ipo_on_sums(seed, beta):
    lp, labels = case(seed)
    ipo = outcome("ipo", lp, labels, tau=beta, normalize="sum")
    same(outcome("online_ipo", lp, {"win_prob": winner(labels)}, beta=beta, target="half"), ipo)
    mean = outcome("online_ipo", lp, {"win_prob": winner(labels)}, beta=beta, target="half", length_normalize=True)
    same(mean, outcome("ipo", lp, labels, tau=beta, normalize="mean"))


@given(SEEDS)
def test_online_ipo_against_a_third_sample_sees_the_difference_of_wins(seed):
    lp, labels = case(seed)
    win = torch.sigmoid(labels["reward"])
    against_each_other = {"win_prob": 0.5 + (win - win.flip(1))}  # so that twice its half gap is the same
    first = outcome("online_ipo", lp, {"win_prob": win}, target="vs_third")
    same(first, outcome("online_ipo", lp, against_each_other, target="half"))


@given(SEEDS)
def test_distillation_of_hard_rewards_is_a_scaled_ipo(seed):
    lp, labels = case(seed)
    value, gradient = outcome("ipo", lp, labels, tau=0.25, normalize="sum")
    reward = {"reward": 0.2 * winner(labels)}  # beta / (2 tau) apart, beta 0.1
    same(outcome("distilled", lp, reward, beta=0.1), (0.01 * value, 0.01 * gradient))


@given(SEEDS)
def test_an_ensemble_is_its_best_explained_member(seed):
    lp, labels = case(seed)
    models = torch.stack([labels["reward"], 0.1 * lp.ratio().detach(), 5 * labels["reward"]], -1)
    models[0, 0] += 0.3  # the second explains all but one pair, which another explains better
    value, _ = outcome("distilled", lp, {"reward": models}, beta=0.1)
    assert value.tolist() == pytest.approx([0.09, 0, 0, 0], abs=1e-12)


@given(SEEDS, st.floats(0.1, 0.9))
def test_sppo_variants_meet_where_their_targets_do(seed, p):
    lp, labels = case(seed)
    first = winner(labels)
    single = {"win_prob": p * first + (1 - p) * (1 - first)}
    same(outcome("sppo", lp, single, eta=3.0, variant="single"), outcome("sppo", lp, single, eta=3.0))
    hard = outcome("sppo", lp, {"win_prob": 0.4 + 0.1 * first}, eta=3.0, variant="hard")
    same(hard, outcome("sppo", lp, {"win_prob": first}, eta=3.0))
    value, gradient = outcome("sppo", lp, {"win_prob": first}, eta=3.0, reduction="sum")
    same((value / 2, gradient / 2), hard)


@given(SEEDS)
def test_nash_md_credits_a_sequence_as_a_whole(seed):
    """Of one token both forms agree; otherwise only the sequence form has the gradient of ``tau KL - win``."""
    lp, _ = case(seed, k=1)
    labels = {"win_prob": torch.full((4, 1), 0.75, dtype=torch.float64)}
    _, gradient = outcome("nash_md", lp, labels, tau=0.2)
    expected = lp.mask * (0.2 * lp.ratio()[..., None] - 0.25) / 4
    torch.testing.assert_close(gradient, expected.detach())
    one = replace(lp, mask=lp.mask * (torch.arange(5) == 0))
    token = outcome("nash_md", one, labels, tau=0.2, kl_credit="token")
    same(token, outcome("nash_md", one, labels, tau=0.2))


# --- values -------------------------------------------------------------------------------------------------------


@given(SEEDS, st.floats(-3, 3))
def test_direct_advantage_at_the_reference_imitates_by_advantage(seed, advantage):
    lp, _ = case(seed)
    lp = replace(lp, by_role={**lp.by_role, "reference": lp.by_role["policy"].detach()})
    labels = {"advantage": torch.full((4, 2), advantage, dtype=torch.float64)}
    _, gradient = outcome("direct_advantage", lp, labels, beta=0.3)
    torch.testing.assert_close(gradient, -0.3 * advantage * lp.mask / 8)


@given(SEEDS, st.floats(0.1, 5))
def test_dro_rescales_the_policy_and_leaves_the_value(seed, tau):
    lp, labels = case(seed, k=1)
    values = lp.extra["values"].requires_grad_()
    inputs = (lp.by_role["policy"], values)
    (joint,) = find_objective("dro_v")(lp, labels, tau=tau, joint=True)
    policy, value = find_objective("dro_v")(lp, labels, tau=tau)
    both = torch.autograd.grad(joint.reduce(), inputs)
    apart = torch.autograd.grad(policy.reduce() + value.reduce(), inputs)
    torch.testing.assert_close(apart[0], both[0] / tau)
    torch.testing.assert_close(apart[1], both[1])


@given(SEEDS)
def test_oreo_gives_every_token_a_gradient_of_its_own_error_alone(seed):
    """The gradient at token t is that of the Bellman error at t, not summed over all earlier states."""
    lp, labels = case(seed, k=1)
    _, policy = find_objective("oreo")(lp, labels, beta=0.1, kl_reg=0.0)
    (gradient,) = torch.autograd.grad(policy.reduce(), lp.by_role["policy"])
    l = torch.where(lp.mask > 0, lp.by_role["policy"] - lp.by_role["reference"], 0.0).detach()  # noqa: E741
    future = l.sum(-1, keepdim=True) - l.cumsum(-1) + l
    error = lp.extra["values"] - labels["reward"][..., None] + 0.1 * future
    expected = lp.mask * 2 * 0.1 * error / lp.lengths[..., None] / 4
    torch.testing.assert_close(gradient, expected)


@given(SEEDS)
def test_oreo_steps_of_one_token_are_tokens_and_one_step_is_the_response(seed):
    lp, labels = case(seed, k=1)
    tokens = find_objective("oreo")(lp, labels, kl_reg=0.0)
    every = find_objective("oreo")(lp, {**labels, "state": torch.ones_like(lp.mask)}, granularity="step", kl_reg=0.0)
    only_first = {**labels, "state": (torch.arange(5) == 0).double().expand_as(lp.mask)}
    whole = find_objective("oreo")(lp, only_first, granularity="step", kl_reg=0.0)
    response = find_objective("oreo")(lp, labels, granularity="response", kl_reg=0.0)
    for part in (0, 1):
        torch.testing.assert_close(every[part].value, tokens[part].value)
    torch.testing.assert_close(whole[1].value, response[1].value)
    torch.testing.assert_close(response[0].value, tokens[0].value)


# --- likelihoods and pairing --------------------------------------------------------------------------------------


def test_the_exact_kl_of_a_vocabulary():
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(2, 3, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    expected = F.kl_div(second.log_softmax(-1), first.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(token_kl(first, second), expected)
    assert (token_kl(first, first + 3.0).abs() < 1e-14).all()
    assert (token_kl(first, second) > 0.01).all()
    assert token_kl(first.bfloat16(), second.bfloat16()).dtype == torch.float32


def test_the_exact_kl_skips_what_both_exclude_and_is_infinite_where_only_the_second_does():
    free = torch.tensor([0.3, -0.2, 1.0])
    excluded = torch.tensor([0.3, -0.2, -torch.inf])
    policy = excluded.clone().requires_grad_()
    value = token_kl(torch.tensor([1.0, 0.0, -torch.inf]), policy)
    torch.testing.assert_close(value, token_kl(torch.tensor([1.0, 0.0]), excluded[:2]))
    (gradient,) = torch.autograd.grad(value, policy)
    assert gradient.isfinite().all()
    assert token_kl(free, excluded).item() == torch.inf


def test_the_geometric_mixture_has_its_ends_and_multiplies_probabilities():
    policy = torch.tensor([0.3, -1.0, -torch.inf, 2.0], dtype=torch.float64)
    reference = torch.tensor([-0.5, 0.7, 0.1, 0.4], dtype=torch.float64)
    torch.testing.assert_close(geometric_mixture(policy, reference, 0.0), policy.log_softmax(-1))
    torch.testing.assert_close(geometric_mixture(policy, reference, 1.0), reference.log_softmax(-1))
    product = policy.softmax(-1) ** 0.75 * reference.softmax(-1) ** 0.25
    torch.testing.assert_close(geometric_mixture(policy, reference, 0.25).exp(), product / product.sum())
    with pytest.raises(ValueError, match="weight"):
        geometric_mixture(policy, reference, 1.5)


@given(st.lists(st.integers(0, 5).map(float), min_size=2, max_size=6), st.integers(1, 5))
def test_a_curriculum_goes_from_wide_gaps_to_narrow_ones(rewards, stages):
    pairs = curriculum(rewards, stages)
    assert len(pairs) == stages
    made = [pair for pair in pairs if pair is not None]
    assert pairs == made + [None] * (stages - len(made))
    assert made[:1] == best_worst(rewards, 0.0).groups
    gaps = [rewards[best] - rewards[other] for best, other in made]
    assert gaps == sorted(gaps, reverse=True)
    assert all(gap > 0 for gap in gaps)
    assert len(made) == min(stages, sum(reward < max(rewards) for reward in rewards))
    assert len(set(made)) == len(made)
