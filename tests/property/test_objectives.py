"""What every registered objective promises, whatever the log-probs, labels and parameters."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

import diffalign.objectives  # noqa: F401 - fills the registry
from diffalign.registry import OBJECTIVES, Objective, keyword_parameters
from diffalign.types import LogProbs, Loss

RANGES = {"beta": st.floats(0.01, 10), "label_smoothing": st.floats(0, 0.5)}
"""What to draw for a parameter, by name. A new objective adds the names that are new."""

ALL = sorted(OBJECTIVES)
BY_REFERENCE = [name for name in ALL if OBJECTIVES[name].roles == ("reference",)]
RANKED = [name for name in ALL if "reward" in OBJECTIVES[name].labels and OBJECTIVES[name].k != 1]


def parameters(objective: Objective) -> st.SearchStrategy[dict[str, Any]]:
    """Required ones always, optional ones sometimes."""
    names = keyword_parameters(objective.fn)
    needed = {n: RANGES[n] for n, p in names.items() if p.default is p.empty}
    return st.fixed_dictionaries(needed, optional={n: RANGES[n] for n in names if n not in needed})


@st.composite
def cases(draw, name: str, bound: float = 5.0):
    """An objective with log-probs (B, K, U) in float64, a mask that may end early, labels and parameters."""
    objective = OBJECTIVES[name]
    b, k, u = draw(st.integers(1, 3)), objective.k or draw(st.integers(2, 4)), draw(st.integers(1, 3))
    number = st.floats(-bound, bound)

    def tensor(values: st.SearchStrategy[float], *shape: int) -> Tensor:
        count = torch.Size(shape).numel()
        flat = draw(st.lists(values, min_size=count, max_size=count))
        return torch.tensor(flat, dtype=torch.float64).reshape(shape)

    lengths = tensor(st.integers(1, u), b, k)
    mask = (torch.arange(u) < lengths[..., None]).double()
    by_role = {role: tensor(number, b, k, u) for role in ("policy", *objective.roles)}
    labels = {label: tensor(st.sampled_from([0.0, 0.5, 1.0]), b, k) for label in objective.labels}  # ties are common
    return objective, by_role, mask, labels, draw(parameters(objective))


def evaluate(
    objective: Objective, by_role: Mapping[str, Tensor], mask: Tensor, labels: Mapping[str, Tensor], params: dict
) -> tuple[Loss, Tensor, Tensor]:
    """The loss, its reduction, and the gradient of that in the policy's log-probs."""
    policy = by_role["policy"].detach().clone().requires_grad_()
    loss = objective(LogProbs({**by_role, "policy": policy}, mask), labels, **params)
    total = loss.reduce()
    (gradient,) = torch.autograd.grad(total, policy)
    return loss, total.detach(), gradient


def agree(first: Tensor, second: Tensor) -> None:
    torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ALL)
@given(st.data())
def test_the_order_of_candidates_means_nothing(name, data):
    objective, by_role, mask, labels, params = data.draw(cases(name))
    order = torch.tensor(data.draw(st.permutations(range(mask.shape[1]))))

    def permuted(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key: value[:, order] for key, value in values.items()}

    loss, total, gradient = evaluate(objective, by_role, mask, labels, params)
    other, other_total, other_gradient = evaluate(
        objective, permuted(by_role), mask[:, order], permuted(labels), params
    )
    assert torch.equal(loss.weight, other.weight)
    agree(loss.weight * loss.value, other.weight * other.value)
    agree(total, other_total)
    agree(gradient[:, order], other_gradient)


@pytest.mark.parametrize("name", RANKED)
@given(st.data())
def test_records_do_not_see_each_other(name, data):
    objective, by_role, mask, labels, params = data.draw(cases(name))
    whole, _, _ = evaluate(objective, by_role, mask, labels, params)
    for row in range(len(mask)):

        def pick(values: Mapping[str, Tensor], row: int = row) -> dict[str, Tensor]:
            return {key: value[row : row + 1] for key, value in values.items()}

        alone, _, _ = evaluate(objective, pick(by_role), mask[row : row + 1], pick(labels), params)
        agree(alone.value[0], whole.value[row])
        assert alone.weight[0] == whole.weight[row]


@pytest.mark.parametrize("name", BY_REFERENCE)
@given(st.data())
def test_only_the_ratio_to_the_reference_counts(name, data):
    """A constant added to a candidate's log-prob under both networks changes nothing, nor does one per record."""
    objective, by_role, mask, labels, params = data.draw(cases(name))
    shift = torch.tensor(data.draw(st.lists(st.floats(-5, 5), min_size=mask.shape[1], max_size=mask.shape[1])))
    first = mask * (torch.arange(mask.shape[2]) == 0)  # on one unit: the others may be masked
    moved = {role: value + first * shift[:, None] for role, value in by_role.items()}
    loss, _, gradient = evaluate(objective, by_role, mask, labels, params)
    other, _, other_gradient = evaluate(objective, moved, mask, labels, params)
    torch.testing.assert_close(loss.value, other.value, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradient, other_gradient, rtol=1e-9, atol=1e-9)
    common = {**by_role, "policy": by_role["policy"] + first * shift[0]}
    lifted, _, _ = evaluate(objective, common, mask, labels, params)
    if objective.k == 2:
        torch.testing.assert_close(loss.value, lifted.value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(st.data())
def test_finite_at_margins_of_sixty_and_more(name, dtype, data):
    objective, by_role, mask, labels, params = data.draw(cases(name, bound=60.0))
    by_role = {role: value.to(dtype) for role, value in by_role.items()}
    loss, total, gradient = evaluate(objective, by_role, mask.to(dtype), labels, params)
    assert loss.value.dtype == dtype
    assert loss.value.isfinite().all()
    assert total.isfinite()
    assert gradient.isfinite().all()
    assert (loss.weight >= 0).all()


@pytest.mark.parametrize("name", RANKED)
@given(st.data())
def test_ties_alone_give_exactly_nothing(name, data):
    objective, by_role, mask, labels, params = data.draw(cases(name))
    tied = {**labels, "reward": labels["reward"][:, :1].expand_as(labels["reward"])}
    _, total, gradient = evaluate(objective, by_role, mask, tied, params)
    assert total.item() == 0.0
    assert not gradient.any()


@pytest.mark.parametrize("name", ALL)
@given(st.data(), st.floats(-1e3, 1e3))
def test_a_padding_unit_changes_nothing(name, data, garbage):
    objective, by_role, mask, labels, params = data.draw(cases(name))
    padded = {role: torch.cat([v, torch.full_like(v[..., :1], garbage)], -1) for role, v in by_role.items()}
    longer = torch.cat([mask, torch.zeros_like(mask[..., :1])], -1)
    loss, _, gradient = evaluate(objective, by_role, mask, labels, params)
    other, _, other_gradient = evaluate(objective, padded, longer, labels, params)
    agree(loss.value, other.value)
    assert torch.equal(loss.weight, other.weight)
    agree(gradient, other_gradient[..., :-1])
    assert not other_gradient[..., -1].any()
    assert not gradient[mask == 0].any()


@pytest.mark.parametrize("name", RANKED)
@given(st.data())
def test_a_step_downhill_prefers_the_better_candidate(name, data):
    """Near policy = reference, the gradient raises the best candidate of a record against the worst."""
    objective, by_role, mask, labels, params = data.draw(cases(name, bound=0.1))
    params.pop("label_smoothing", None)  # which pulls large margins back
    loss, _, gradient = evaluate(objective, by_role, mask, labels, params)
    counted = loss.weight > 0
    assume(bool(counted.any()))
    per_candidate = (gradient * mask).sum(-1) / mask.sum(-1)
    best, worst = labels["reward"].argmax(1, keepdim=True), labels["reward"].argmin(1, keepdim=True)
    push = per_candidate.gather(1, best) - per_candidate.gather(1, worst)
    assert (push[counted] < 0).all()
