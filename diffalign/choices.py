"""Which candidates of a record are trained on against each other. Pure functions of the rewards of one record."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import combinations
from typing import NamedTuple

from diffalign.rewards import Reward, level

Pair = tuple[int, int]


class Choice(NamedTuple):
    """What a rule makes of one record."""

    groups: list[tuple[int, ...]]
    """Candidate indices of every training record, best first."""
    tied: list[tuple[int, ...]]
    """What would have been training records, but the rewards differ by no more than the margin."""
    vetoed: int = 0
    """Pairs dropped because the better one is too bad on some label."""


def best_worst(rewards: Sequence[Reward], margin: float, veto: Collection[Pair] = ()) -> Choice:
    """One pair per record, the widest that is not vetoed; the first of equals."""
    levels = [level(reward) for reward in rewards]
    best, worst = levels.index(max(levels)), levels.index(min(levels))
    if levels[best] - levels[worst] <= margin:
        others = [i for i in range(len(levels)) if i != best]
        return Choice([], [(best, worst if worst != best else others[0])])
    allowed = all_pairs(rewards, margin, veto=veto)
    return Choice(allowed.groups[:1], [], 0 if allowed.groups else 1) if veto else Choice([(best, worst)], [])


def all_pairs(
    rewards: Sequence[Reward], margin: float, per_prompt: int | None = None, veto: Collection[Pair] = ()
) -> Choice:
    """Every pair whose rewards differ by more than the margin, widest first, at most ``per_prompt``."""
    levels = [level(reward) for reward in rewards]
    pairs = [(i, j) if levels[i] > levels[j] else (j, i) for i, j in combinations(range(len(levels)), 2)]
    apart = [(i, j) for i, j in pairs if levels[i] - levels[j] > margin]
    kept = sorted((p for p in apart if p not in veto), key=lambda pair: levels[pair[1]] - levels[pair[0]])
    tied = [pair for pair in pairs if pair not in set(apart)]
    return Choice(list(kept[:per_prompt]), list(tied), len(apart) - len(kept))


def ranked(rewards: Sequence[Reward], margin: float, top: int | None = None) -> Choice:
    """The ``top`` best candidates, best first; a tie when even the first and the last of them are."""
    levels = [level(reward) for reward in rewards]
    order = tuple(sorted(range(len(levels)), key=lambda index: -levels[index])[:top])
    if levels[order[0]] - levels[order[-1]] <= margin:
        return Choice([], [order])
    return Choice([order], [])


def unpaired(rewards: Sequence[Reward], margin: float, threshold: float) -> Choice:
    """Every candidate on its own; those within the margin of the threshold are ties."""
    near = [abs(level(reward) - threshold) <= margin for reward in rewards]
    each = [(i,) for i in range(len(rewards))]
    return Choice(
        [one for one, tie in zip(each, near, strict=True) if not tie],
        [one for one, tie in zip(each, near, strict=True) if tie],
    )


def curriculum(rewards: Sequence[Reward], stages: int) -> list[Pair | None]:
    """A record's pair at each stage: the best candidate against the others, easy (widest gap) first (Curry-DPO).

    Candidates that tie with the best make no pair; stages beyond the pairs there are get None. Equal gaps keep their
    order. Each stage starts from, and refers to, the model of the one before (arXiv:2403.07230).
    """
    levels = [level(reward) for reward in rewards]
    best = levels.index(max(levels))
    others = sorted((i for i, own in enumerate(levels) if own < levels[best]), key=levels.__getitem__)[:stages]
    return [*((best, other) for other in others), *[None] * (stages - len(others))]


def segments(rewards: Sequence[Sequence[float]], margin: float, decided: float) -> Choice:
    """Every pair in which more than the share ``decided`` of the segments differ by more than the margin (DenseDPO)."""
    groups, tied = [], []
    for i, j in combinations(range(len(rewards)), 2):
        apart = [abs(a - b) > margin for a, b in zip(rewards[i], rewards[j], strict=True)]
        (groups if sum(apart) > decided * len(apart) else tied).append((i, j))
    return Choice(groups, tied)


def segment_verdicts(a: Sequence[float], b: Sequence[float], margin: float) -> tuple[list[float], list[float]]:
    """1 for the better of two clips in every segment, 0 for the other; both 0 where they tie."""
    return (
        [float(x - y > margin) for x, y in zip(a, b, strict=True)],
        [float(y - x > margin) for x, y in zip(a, b, strict=True)],
    )
