"""What every registered objective promises, whatever the log-probs, labels and parameters."""

import math
from typing import Literal, get_args, get_origin

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffalign.registry import OBJECTIVES, keyword_parameters

from .registry_cases import ALL, cases, evaluate, example

PAIRS = [name for name in ALL if OBJECTIVES[name].k == 2 and "reward" in OBJECTIVES[name].labels]
BATCHWISE = {"kto", "distilled"}
"""Read a statistic of the whole batch, so that records see each other by design."""
TIES_COUNT = {
    "distilled": "it regresses on reward differences, of which 0 is one",
    "smoothed": "as released, a tie has ln 2 and no gradient",
}
SHIFTED = [n for n in PAIRS if OBJECTIVES[n].roles == ("reference",) and n not in ("condition", "dpop")]
"""Condition PO's hinge is on the raw error; DPOP has a kink at a ratio of 0, which rounding crosses."""
NOT_ALWAYS_DOWNHILL = {
    "apo_down": "lowers both candidates",
    "condition": "label smoothing",
    "discopop": "not monotone near 0",
    "distilled": "regresses on a gap that may be smaller",
    "error_ratio": "the released sign is inverted",
    "gpo": "the squared link has its minimum at 1",
    "ipo": "regresses on a gap that may be smaller",
    "inpo": "regresses on a gap that may be smaller",
    "nca_pair": "holds the better one down once its own ratio is past ln 2 / beta",
    "mnpo": "regresses on a gap that may be smaller",
    "modpo": "other rewards may outweigh the pair",
    "simpo": "hinges beyond the margin",
    "visit_smoothed": "label smoothing",
}
QUICK = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def agree(first: Tensor, second: Tensor, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(first, second, rtol=tolerance, atol=1e-12)


@pytest.mark.parametrize("name", ALL)
@QUICK
@given(st.data())
def test_the_order_of_candidates_means_nothing(name, data):
    case = data.draw(cases(name))
    case.params.pop("rank_by", None)  # equal ratios tie, and ranks of ties go by position
    if name in ("plackett_luce", "dcg"):
        distinct = [data.draw(st.permutations(range(case.mask.shape[1]))) for _ in case.mask]
        case = case.changed(labels={"reward": torch.tensor(distinct, dtype=torch.float64)})
    order = torch.tensor(data.draw(st.permutations(range(case.mask.shape[1]))))
    found, other = evaluate(case), evaluate(case.candidates(lambda value: value[:, order]))
    agree(found.sums, other.sums)
    for key, gradient in found.gradients.items():
        agree(gradient[:, order], other.gradients[key])


@pytest.mark.parametrize("name", [n for n in ALL if n not in BATCHWISE])
@QUICK
@given(st.data())
def test_any_cut_of_the_batch_adds_up(name, data):
    """The sums of values and weights, over micro-steps and ranks, are those of the whole batch."""
    case = data.draw(cases(name))
    assume(case.params.get("bias") != "batch")  # the released form, a statistic of the micro-batch
    whole = evaluate(case).sums
    rows = [evaluate(case.candidates(lambda value, i=i: value[i : i + 1])).sums for i in range(len(case.mask))]
    agree(torch.stack(rows).sum(0), whole)


@pytest.mark.parametrize("name", SHIFTED)
@QUICK
@given(st.data())
def test_only_the_ratio_to_the_reference_counts(name, data):
    """A constant added to a candidate's log-prob under both networks changes nothing."""
    case = data.draw(cases(name))
    assume("normalize" not in case.params and case.params.get("sft_weight", 0) == 0)
    shift = torch.tensor(data.draw(st.lists(st.floats(-5, 5), min_size=2, max_size=2)), dtype=torch.float64)
    first = case.mask * (torch.arange(case.mask.shape[2]) == 0)  # on one unit: the others may be masked
    moved = {role: value + first * shift[:, None] for role, value in case.by_role.items()}
    found, other = evaluate(case), evaluate(case.changed(by_role=moved))
    torch.testing.assert_close(found.sums, other.sums, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(found.gradients["policy"], other.gradients["policy"], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@QUICK
@given(st.data())
def test_finite_at_margins_of_sixty_and_more(name, dtype, data):
    case = data.draw(cases(name, bound=60.0))
    found = evaluate(case.to(torch.bfloat16).to(dtype))  # as a network in bfloat16 gives them, upcast
    for loss in found.losses:
        assert loss.value.dtype == dtype
        assert loss.value.shape == loss.weight.shape
        assert loss.value.isfinite().all()
        assert (loss.weight >= 0).all()
        assert not loss.weight.requires_grad
    assert found.total.isfinite()
    assert all(gradient.isfinite().all() for gradient in found.gradients.values())


@pytest.mark.parametrize("name", [n for n in PAIRS if n not in TIES_COUNT])
@QUICK
@given(st.data())
def test_ties_alone_give_exactly_nothing(name, data):
    case = data.draw(cases(name))
    assume(not case.params.get("keep_ties"))
    tied = case.labels["reward"][:, :1].expand_as(case.labels["reward"])
    found = evaluate(case.changed(labels={**case.labels, "reward": tied}))
    assert found.total.item() == 0.0
    assert not any(gradient.any() for gradient in found.gradients.values())


@pytest.mark.parametrize("name", ALL)
@QUICK
@given(st.data(), st.sampled_from([1e3, -1e3, math.nan, math.inf, -math.inf]))
def test_a_padding_unit_changes_nothing(name, data, garbage):
    case = data.draw(cases(name))
    longer = case.units(lambda value: torch.cat([value, torch.full_like(value[..., :1], garbage)], -1))
    longer = longer.changed(mask=torch.cat([case.mask, torch.zeros_like(case.mask[..., :1])], -1))
    found, other = evaluate(case), evaluate(longer)
    agree(found.sums, other.sums)
    for key, gradient in found.gradients.items():
        agree(gradient, other.gradients[key][..., :-1])
        assert not other.gradients[key][..., -1].any()
        assert not gradient[case.mask == 0].any()


@pytest.mark.parametrize("name", ALL)
@QUICK
@given(st.data())
def test_an_empty_completion_is_finite_and_its_units_get_no_gradient(name, data):
    case = data.draw(cases(name))
    mask = case.mask.clone()
    mask[0, data.draw(st.integers(0, mask.shape[1] - 1))] = 0.0
    found = evaluate(case.changed(mask=mask).units(lambda value: torch.where(mask > 0, value, math.nan)))
    assert found.total.isfinite()
    assert all(g.isfinite().all() and not g[mask == 0].any() for g in found.gradients.values())


@pytest.mark.parametrize("name", [n for n in ALL if OBJECTIVES[n].k is None])
@QUICK
@given(st.data())
def test_a_padding_candidate_changes_nothing(name, data):
    case = data.draw(cases(name))
    noise = data.draw(st.floats(0.1, 1.0))

    def longer(value: Tensor) -> Tensor:
        return torch.cat([value, torch.full_like(value[:, :1], noise)], 1)

    present = torch.ones_like(case.mask[..., 0])
    padded = case.candidates(longer).changed(present=torch.cat([present, torch.zeros_like(present[:, :1])], 1))
    found, other = evaluate(case), evaluate(padded)
    agree(found.sums, other.sums)
    for key, gradient in found.gradients.items():
        agree(gradient, other.gradients[key][:, :-1])
        assert not other.gradients[key][:, -1].any()


@pytest.mark.parametrize("name", PAIRS)
@QUICK
@given(st.data())
def test_a_pair_with_a_padding_candidate_does_not_count(name, data):
    case = data.draw(cases(name))
    present = torch.ones_like(case.mask[..., 0])
    present[0, data.draw(st.integers(0, 1))] = 0.0
    found = evaluate(case.changed(present=present))
    assert not any(gradient[0].any() for gradient in found.gradients.values())


@pytest.mark.parametrize("name", [name for name in PAIRS if name not in NOT_ALWAYS_DOWNHILL])
@QUICK
@given(st.data())
def test_a_step_downhill_prefers_the_better_candidate(name, data):
    """Near policy = reference, the gradient does not lower the better candidate of a pair against the worse one."""
    case = data.draw(cases(name, bound=0.1))
    params = {key: value for key, value in case.params.items() if key not in ("label_smoothing", "smoothing")}
    found = evaluate(case.changed(params=params))
    counted = found.losses[0].weight > 0
    assume(counted.ndim == 1 and bool(counted.any()))
    per_candidate = (found.gradients["policy"] * case.mask).sum(-1) / case.mask.sum(-1)
    reward = case.labels["reward"]
    best, worst = reward.argmax(1, keepdim=True), reward.argmin(1, keepdim=True)
    push = per_candidate.gather(1, best) - per_candidate.gather(1, worst)
    assert (push[counted] <= 1e-12).all()


@pytest.mark.parametrize("name", [name for name in ALL if OBJECTIVES[name].differences])
@QUICK
@given(st.data(), st.floats(-5, 5))
def test_those_that_say_so_read_differences_alone(name, data, shift):
    """A constant added to the policy's log-prob of both candidates changes nothing: f-divergences need that."""
    case = data.draw(cases(name)).units(lambda value: value[..., :1])
    case = case.changed(mask=case.mask[..., :1])
    lifted = {**case.by_role, "policy": case.by_role["policy"] + shift}
    torch.testing.assert_close(evaluate(case).sums, evaluate(case.changed(by_role=lifted)).sums, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", ALL)
def test_something_learns(name):
    """On a plain case the value and the gradient are there, and no part is without weight."""
    found = evaluate(example(name))
    assert found.total.isfinite()
    assert all(loss.weight.sum() > 0 for loss in found.losses)
    assert any(gradient.any() for gradient in found.gradients.values())
    assert all(loss.value.dtype == torch.float64 for loss in found.losses)


@pytest.mark.parametrize("name", [n for n in ALL if OBJECTIVES[n].identity is not None])
def test_the_identity_is_the_value_at_policy_equals_reference(name):
    objective, case = OBJECTIVES[name], example(name)
    same = case.changed(by_role=dict.fromkeys(case.by_role, case.by_role["policy"]))
    found = evaluate(same)
    values = found.losses[0].value
    assert values.flatten().tolist() == pytest.approx([objective.identity] * values.numel(), rel=1e-12, abs=1e-12)
    moved = evaluate(case).losses[0].value  # and nowhere else, or the check at step 0 would be blind
    assert (moved - objective.identity).abs().max() > 1e-4


@pytest.mark.parametrize("name", ALL)
def test_every_choice_runs(name):
    """All values of all named options."""
    schema = keyword_parameters(OBJECTIVES[name].fn)
    for key, parameter in schema.items():
        options = get_args(parameter.annotation) if get_origin(parameter.annotation) is Literal else ()
        for option in (*options, *((True, False) if parameter.annotation is bool else ())):
            more = {"max_length": 4} if "max_length" in schema else {}
            assert evaluate(example(name, **more, **{key: option})).total.isfinite()
