"""One reward per candidate from the labels of several scorers. Pure functions of one record. K candidates, U units."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from statistics import fmean
from typing import Any, Literal, NamedTuple

from diffalign.errors import UserError
from diffalign.records import Record

Reward = float | list[float]
"""One number, or one per unit."""
How = Literal["sum", "zscore", "wins", "ranks", "majority", "pareto"]
Columns = Mapping[str, Sequence[float]]
"""Label -> K numbers."""
Weights = Mapping[str, float]
"""Label -> weight; a negative one turns a label around: lower is better."""


class Spread(NamedTuple):
    """Mean and standard deviation of a label over a pool."""

    mean: float
    std: float


def level(reward: Reward) -> float:
    """A reward as one number: the mean over its units."""
    return fmean(reward) if isinstance(reward, list) else reward


def combine(record: Record, weights: Weights, how: How, pool: Mapping[str, Spread] | None = None) -> list[Reward]:
    """The K rewards of a record from its labels; per unit when every label is a list of the same length.

    - ``sum``: weighted sum of the raw numbers, so a scorer's scale is a weight of its own.
    - ``zscore``: weighted sum of the labels in standard deviations of the pool.
    - ``wins``: a label's weight for every candidate beaten strictly, over the total weight and K - 1: in [0, 1], and
      K / 2 in all without ties (RankDPO's ensemble, arXiv:2410.18013, with weights).
    - ``ranks``: the same with half a win for a tie, which is the weighted mean rank.
    - ``majority``: the share of the other candidates that the weighted majority of labels puts below this one.
    - ``pareto``: 1 for candidates that no other is better than on every label, falling to 0 by fronts.

    Args:
        pool: of every label, for ``zscore``.

    Raises:
        UserError: no candidate, a label is missing or does not fit the others, or a weight is unusable.
    """
    check_weights(weights)
    columns: dict[str, list[Any]] = {label: column(record, label) for label in weights}
    if how == "zscore":
        assert pool is not None
        columns = {label: [_standardised(value, pool[label]) for value in found] for label, found in columns.items()}
    lengths = {len(value) if isinstance(value, list) else None for found in columns.values() for value in found}
    if len(lengths) != 1:
        names = ", ".join(weights)
        raise UserError(f"record {record.id!r}: {names}: numbers mixed with lists, or lists of different lengths")
    units, reduce = lengths.pop(), REDUCTIONS[how]
    rewards: list[Reward] = []
    if units is None:
        rewards += reduce(columns, weights)
    else:
        by_unit = [reduce({label: [v[u] for v in c] for label, c in columns.items()}, weights) for u in range(units)]
        rewards += [list(row) for row in zip(*by_unit, strict=True)]
    if not all(math.isfinite(level(reward)) for reward in rewards):
        raise UserError(f"record {record.id!r}: the reward is not finite ({rewards}); check labels and weights")
    return rewards


def check_weights(weights: Weights) -> None:
    """Refuse weights that give every candidate the same reward, or none."""
    if not all(map(math.isfinite, weights.values())) or not any(weights.values()):
        raise UserError(f"reward weights {dict(weights)} must be finite and not all zero")


def column(record: Record, label: str) -> list[Any]:
    """One label of all candidates."""
    for index, candidate in enumerate(record.candidates):
        if label not in candidate.labels:
            known = ", ".join(sorted(candidate.labels)) or "none"
            raise UserError(f"record {record.id!r}, candidate {index}: no label {label!r}; it has: {known}")
    return [candidate.labels[label] for candidate in record.candidates]


def pool_spread(records: Iterable[Record], labels: Iterable[str]) -> dict[str, Spread]:
    """Mean and standard deviation of labels over every candidate of a pool that has them, in one pass."""
    sums = {label: [0, 0.0, 0.0] for label in labels}
    for record in records:
        for candidate in record.candidates:
            for label, found in sums.items():
                value = candidate.labels.get(label, [])
                for number in value if isinstance(value, list) else [value]:
                    found[0] += 1  # Welford's update
                    before = number - found[1]
                    found[1] += before / found[0]
                    found[2] += before * (number - found[1])
    return {label: Spread(mean, math.sqrt(square / max(n, 1))) for label, (n, mean, square) in sums.items()}


def vetoes(record: Record, weights: Weights, limits: Mapping[str, float]) -> frozenset[tuple[int, int]]:
    """The pairs (i, j) in which i must not be preferred to j: it is worse by more than the limit of some label.

    Args:
        limits: label -> largest loss that a preferred candidate may have on it.
    """
    found = set()
    for label, limit in limits.items():
        sign = math.copysign(1.0, weights.get(label, 1.0))
        values = [sign * level(value) for value in column(record, label)]
        found |= {(i, j) for i, a in enumerate(values) for j, b in enumerate(values) if b - a > limit}
    return frozenset(found)


# --- reductions ---------------------------------------------------------------------------------------------------


def _standardised(value: Reward, spread: Spread) -> Reward:
    scale = spread.std or 1.0  # a label that is the same everywhere says nothing
    return [(v - spread.mean) / scale for v in value] if isinstance(value, list) else (value - spread.mean) / scale


def _weighted_sum(columns: Columns, weights: Weights) -> list[float]:
    rows = zip(*columns.values(), strict=True)
    return [sum(w * value for w, value in zip(weights.values(), row, strict=True)) for row in rows]


def _count_wins(columns: Columns, weights: Weights, tie: float = 0.0) -> list[float]:
    k = len(next(iter(columns.values())))
    wins = [0.0] * k
    for label, values in _signed(columns, weights).items():
        for i, own in enumerate(values):
            beaten = sum(own > other for other in values) + tie * (sum(own == other for other in values) - 1)
            wins[i] += abs(weights[label]) * beaten
    total = sum(map(abs, weights.values())) * max(k - 1, 1)
    return [won / total for won in wins]


def _mean_ranks(columns: Columns, weights: Weights) -> list[float]:
    return _count_wins(columns, weights, tie=0.5)


def _majority(columns: Columns, weights: Weights) -> list[float]:
    signed = _signed(columns, weights)
    k = len(next(iter(columns.values())))
    wins = [0.0] * k
    for i, j in combinations(range(k), 2):
        votes = sum(abs(weights[label]) * ((v[i] > v[j]) - (v[i] < v[j])) for label, v in signed.items())
        for one, for_it in ((i, votes), (j, -votes)):
            wins[one] += 1.0 if for_it > 0 else 0.5 if for_it == 0 else 0.0
    return [won / max(k - 1, 1) for won in wins]


def _fronts(columns: Columns, weights: Weights) -> list[float]:
    used = [values for label, values in _signed(columns, weights).items() if weights[label]]
    points = list(zip(*used, strict=True))
    front = [-1] * len(points)
    number = 0
    while -1 in front:
        left = [i for i, own in enumerate(front) if own == -1]
        for i in [i for i in left if not any(_dominates(points[j], points[i]) for j in left)]:
            front[i] = number
        number += 1
    return [1.0 - own / max(number - 1, 1) for own in front]


def _dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    return all(x >= y for x, y in zip(a, b, strict=True)) and any(x > y for x, y in zip(a, b, strict=True))


def _signed(columns: Columns, weights: Weights) -> dict[str, list[float]]:
    """Higher is better in every column."""
    return {label: [math.copysign(1.0, weights[label]) * v for v in values] for label, values in columns.items()}


REDUCTIONS: dict[How, Callable[[Columns, Weights], list[float]]] = {
    "sum": _weighted_sum,
    "zscore": _weighted_sum,
    "wins": _count_wins,
    "ranks": _mean_ranks,
    "majority": _majority,
    "pareto": _fronts,
}
