"""How far annotators agree: raw agreement, Krippendorff's alpha, and the items they answer differently."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from statistics import fmean, median
from typing import Any, NamedTuple

from diffalign.label.answers import Answers, Line
from diffalign.label.plan import SKIP, TIE, Item, Task

Unit = Mapping[str, Hashable]
"""Annotator -> verdict on one thing."""


class PairAgreement(NamedTuple):
    """Two annotators: the share of the verdicts both gave that are the same."""

    first: str
    second: str
    share: float
    units: int


class Habit(NamedTuple):
    """How one annotator answers. Shares are of verdicts between two sides, or of choices of the best."""

    annotator: str
    answers: int
    skips: int
    ties: float | None
    left: float | None
    """Of the verdicts that are no ties, how many are for what was shown first; .5 of a pair is no bias."""
    seconds: float | None


def units(task: Task, given: Mapping[str, Line]) -> Iterator[dict[str, Hashable]]:
    """The verdicts on one item: one unit, one per segment, or one per two candidates of a ranking. Skips are left out.

    A verdict is the index of a candidate, or "tie".
    """
    answers = {name: line.answer for name, line in given.items() if line.answer != SKIP}
    if not answers:
        return
    if task == "segments":
        for segment in range(len(next(iter(answers.values())))):
            yield {name: answer[segment] for name, answer in answers.items()}
    elif task == "rank":
        places = {name: _places(answer) for name, answer in answers.items()}
        for i, j in combinations(sorted(next(iter(places.values()))), 2):
            yield {name: TIE if p[i] == p[j] else i if p[i] < p[j] else j for name, p in places.items()}
    else:
        yield answers


def _places(groups: Sequence[Sequence[int]]) -> dict[int, int]:
    return {candidate: place for place, group in enumerate(groups) for candidate in group}


def raw(found: Iterable[Unit]) -> tuple[float | None, int]:
    """The share of equal verdicts among all pairs of verdicts on a unit, and how many pairs there are."""
    same = total = 0
    for unit in found:
        for a, b in combinations(unit.values(), 2):
            total += 1
            same += a == b
    return (same / total if total else None), total


def alpha(found: Iterable[Unit]) -> float | None:
    """Krippendorff's alpha for nominal verdicts and any number of annotators, units without all of them included.

    1 - D_o / D_e: with n_uc verdicts c on unit u, m_u of them in all (units with one are left out) and n over all
    units, D_o = 1/n sum_u 1/(m_u - 1) sum_{c != k} n_uc n_uk and D_e = 1/(n (n - 1)) sum_{c != k} n_c n_k.
    1 is perfect agreement, 0 is chance. None where it is not defined: nothing to compare, or one verdict only.
    Source: K. Krippendorff, Computing Krippendorff's alpha-reliability (2011).
    """
    observed = 0.0
    totals: Counter[Hashable] = Counter()
    for unit in found:
        counts, m = Counter(unit.values()), len(unit)
        if m >= 2:
            observed += (m * m - sum(n * n for n in counts.values())) / (m - 1)
            totals.update(counts)
    n = totals.total()
    expected = n * n - sum(count * count for count in totals.values())
    return 1 - observed * (n - 1) / expected if expected else None


def pairwise(found: Sequence[Unit]) -> list[PairAgreement]:
    """Every two annotators who judged the same thing."""
    verdicts: defaultdict[tuple[str, str], list[bool]] = defaultdict(list)
    for unit in found:
        for a, b in combinations(sorted(unit), 2):
            verdicts[a, b].append(unit[a] == unit[b])
    return [PairAgreement(a, b, fmean(same), len(same)) for (a, b), same in sorted(verdicts.items())]


def habits(task: Task, items: Mapping[str, Item], answers: Answers) -> list[Habit]:
    """One row per annotator."""
    given: defaultdict[str, list[Line]] = defaultdict(list)
    for name in items:
        for annotator, line in answers.by_item.get(name, {}).items():
            given[annotator].append(line)
    return [_habit(task, name, lines) for name, lines in sorted(given.items())]


def _habit(task: Task, annotator: str, lines: Sequence[Line]) -> Habit:
    told = [line for line in lines if line.answer != SKIP]
    verdicts = [(v, line.shown) for line in told if task != "rank" for v in _flat(line.answer)]
    sided = [v == shown[0] for v, shown in verdicts if v != TIE]
    times = [line.seconds for line in told if line.seconds is not None]
    return Habit(
        annotator,
        len(told),
        len(lines) - len(told),
        1 - len(sided) / len(verdicts) if verdicts else None,
        fmean(sided) if sided else None,
        median(times) if times else None,
    )


def _flat(answer: Any) -> list[Any]:
    return answer if isinstance(answer, list) else [answer]


class Dispute(NamedTuple):
    """An item on which annotators differ."""

    item: Item
    share: float
    """Raw agreement on it."""
    given: dict[str, Line]


def disputes(task: Task, items: Mapping[str, Item], answers: Answers) -> list[Dispute]:
    """Items with different verdicts, the most disputed first."""
    found = []
    for name, item in items.items():
        given = {who: line for who, line in answers.by_item.get(name, {}).items() if line.answer != SKIP}
        share, _ = raw(units(task, given))
        if share is not None and share < 1:
            found.append(Dispute(item, share, given))
    return sorted(found, key=lambda dispute: dispute.share)


def all_units(task: Task, items: Mapping[str, Item], answers: Answers) -> list[dict[str, Hashable]]:
    """The verdicts on every item."""
    return [unit for name in items for unit in units(task, answers.by_item.get(name, {}))]
