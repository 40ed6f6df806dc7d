"""Conditions of different lengths."""

import torch

from diffalign.types import joined


def test_conditions_are_joined_and_what_is_shorter_ends_in_zeros():
    def condition(n, length):
        return {
            "states": torch.full((n, length, 2), float(length)),
            "mask": torch.ones(n, length, dtype=torch.bool),
            "pooled": torch.full((n, 3), float(length)),
        }

    out = joined([condition(1, 2), condition(2, 4), condition(1, 0)])
    assert out["mask"].dtype == torch.bool
    assert out["mask"].sum(1).tolist() == [2, 4, 4, 0]
    assert out["states"].shape == (4, 4, 2)
    assert torch.equal(out["states"][..., 1], torch.tensor([2.0, 4.0, 4.0, 0.0])[:, None] * out["mask"])
    assert out["pooled"][:, 0].tolist() == [2.0, 4.0, 4.0, 0.0]
    one = condition(2, 3)
    assert all(torch.equal(value, one[name]) for name, value in joined([one]).items())
