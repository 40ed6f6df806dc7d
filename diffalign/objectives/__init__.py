"""Pure losses on log-probabilities; importing the package registers every one of them."""

from diffalign.objectives import (
    diffusion,
    game,
    matching,
    pair,
    pair_variants,
    pointwise,
    policy_gradient,
    ranked,
    reference_free,
    rewarded,
    shaping,
    values,
)

__all__ = [
    "diffusion",
    "game",
    "matching",
    "pair",
    "pair_variants",
    "pointwise",
    "policy_gradient",
    "ranked",
    "reference_free",
    "rewarded",
    "shaping",
    "values",
]
