"""Arithmetic on weights, of tensors and of dictionaries of tensors."""

import pytest
import torch

from diffalign.merging import merge, nesterov, soft_reference


def weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "a": torch.randn(2, 3, generator=generator),
        "b.bias": torch.randn(4, generator=generator, dtype=torch.bfloat16),
        "steps": torch.tensor(seed),
    }


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == second[name].dtype
        assert torch.equal(value, second[name]), name


def test_no_momentum_is_the_identity():
    now, before = weights(1), weights(2)
    equal(nesterov(now, before, 0.0), now)
    equal(nesterov(now, now, 0.3), now)


def test_momentum_goes_on_in_the_same_direction():
    moved = nesterov(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 4.0]))
    torch.testing.assert_close(moved, torch.tensor([1.3, 1.4]))
    assert nesterov(weights(1), weights(2))["steps"].item() == 1


def test_the_soft_reference_has_its_ends():
    policy, reference = weights(1), weights(2)
    equal(soft_reference(policy, reference, 1.0), policy)
    old = soft_reference(policy, reference, 0.0)
    equal({**old, "steps": reference["steps"]}, reference)
    torch.testing.assert_close(soft_reference(torch.tensor(1.0), torch.tensor(2.0)), torch.tensor(1.4))


def test_a_delta_of_weight_one_is_added_and_of_weight_zero_is_not():
    base, delta = weights(1), weights(2)
    full = merge(base, [delta], [1.0])
    torch.testing.assert_close(full["a"], base["a"] + delta["a"])
    assert full["b.bias"].dtype == torch.bfloat16
    equal(merge(base, [delta, weights(3)], [0.0, 0.0]), base)
    both = merge(torch.tensor([1.0]), [torch.tensor([10.0]), torch.tensor([100.0])], [0.5, 0.25])
    assert both.item() == pytest.approx(31.0)
    equal(merge(base, [], []), base)


def test_merging_the_whole_difference_gives_the_other_end():
    base, other = weights(1)["a"], weights(2)["a"]
    torch.testing.assert_close(merge(base, [other - base], [1.0]), other)


def test_half_precision_is_extrapolated_in_full():
    now, before = torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([0.99609375], dtype=torch.bfloat16)
    assert nesterov(now, before, 2.0).item() == 1.0078125  # both steps are of one last digit


def test_the_result_has_no_graph():
    trained = torch.ones(2, requires_grad=True)
    assert not nesterov(trained, torch.zeros(2)).requires_grad


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="1 deltas but 2 weights"):
        merge(torch.zeros(1), [torch.zeros(1)], [0.5, 0.5])
    other = weights(2)
    del other["a"]
    with pytest.raises(ValueError, match="names"):
        nesterov(weights(1), other)
