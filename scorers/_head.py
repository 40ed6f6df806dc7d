"""The linear stack on an embedding that the aesthetic predictor and ImageReward end in."""

from __future__ import annotations

from torch import nn

WIDTHS = (1024, 128, 64, 16, 1)


def linear_stack(width: int) -> nn.Sequential:
    """``width`` -> 1024 -> 128 -> 64 -> 16 -> 1 without anything between, under the published names.

    Training put dropouts between the layers: hence the numbers 0, 2, 4, 6, 7.
    """
    stack = nn.Sequential()
    for name, (before, after) in zip("02467", zip((width, *WIDTHS[:-1]), WIDTHS, strict=True), strict=True):
        stack.add_module(name, nn.Linear(before, after))
    return stack
