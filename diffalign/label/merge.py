"""Answers -> one label per candidate."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from diffalign import records
from diffalign.errors import UserError
from diffalign.label.answers import Answers
from diffalign.label.plan import SKIP, TIE, Item, Plan
from diffalign.records import Record

Label = float | list[float]
UNSEEN = "not compared"
"""What the error of a candidate without a label says, so that `build` leaves it out."""


def merged(source: Path, plan: Plan, answers: Answers, label: str, counts: Counter[str]) -> Iterator[Record]:
    """The records that have answers, with the label.

    Args:
        counts: filled with ``records``, ``empty`` (records without an answer) and ``unseen`` (candidates without one
            in the others).

    Raises:
        UserError: a record has the label already.
    """
    given: defaultdict[str, list[tuple[Item, list[Any]]]] = defaultdict(list)
    for item in plan.items.values():
        lines = answers.by_item.get(item.id, {}).values()
        told = [line.answer for line in lines if line.answer != SKIP]
        if told:
            given[item.record.id].append((item, told))
    for record in records.read(source):
        if any(label in candidate.labels for candidate in record.candidates):
            raise UserError(f"record {record.id!r} has the label {label!r} already; choose another `label:`")
        if record.id not in given:
            counts["empty"] += 1
            continue
        found = labels(plan.task, given[record.id])
        counts["records"] += 1
        counts["unseen"] += len(record.candidates) - len(found)
        yield record.model_copy(
            update={
                "candidates": [
                    c.model_copy(update={"labels": {**c.labels, label: found[k]}})
                    if k in found
                    else c.model_copy(update={"errors": {**c.errors, label: UNSEEN}})
                    for k, c in enumerate(record.candidates)
                ]
            }
        )


def labels(task: str, given: Sequence[tuple[Item, Sequence[Any]]]) -> dict[int, Label]:
    """Candidate -> label, from the answers to the items of one record; candidates never compared are not there.

    - ``pair``: the share of its comparisons that a candidate won; a tie is half a win for both.
    - ``best``: the share of the annotators who chose it; who found all alike adds 1 / K to each.
    - ``rank``: the mean over annotators of the share of the others ranked below it, with half of those beside it.
    - ``segments``: per segment 1, 0 or .5 (a tie), by what more than half of the annotators said, else a tie; a
      candidate of several pairs has their mean.
    """
    found: defaultdict[int, list[Label]] = defaultdict(list)
    for item, answers in given:
        if task == "segments":
            for candidate, verdicts in _segment_wins(item, answers).items():
                found[candidate].append(verdicts)
            continue
        for answer in answers:
            for candidate, value in _values(task, item, answer).items():
                found[candidate].append(value)
    return {candidate: _mean(values) for candidate, values in found.items()}


def _mean(values: Sequence[Any]) -> Label:
    if isinstance(values[0], list):
        return [fmean(column) for column in zip(*values, strict=True)]
    return fmean(values)


def _values(task: str, item: Item, answer: Any) -> dict[int, float]:
    k = len(item.candidates)
    if task == "rank":
        value, below = {}, k
        for group in answer:
            below -= len(group)
            value |= dict.fromkeys(group, (below + (len(group) - 1) / 2) / (k - 1))
        return value
    if answer == TIE:
        return dict.fromkeys(item.candidates, 1 / k)
    return {candidate: float(candidate == answer) for candidate in item.candidates}


def _segment_wins(item: Item, answers: Sequence[Sequence[Any]]) -> dict[int, list[float]]:
    wins: dict[int, list[float]] = {candidate: [] for candidate in item.candidates}
    for verdicts in zip(*answers, strict=True):
        verdict, votes = Counter(verdicts).most_common(1)[0]
        decided = verdict != TIE and votes * 2 > len(verdicts)
        for candidate, row in wins.items():
            row.append(float(candidate == verdict) if decided else 0.5)
    return wins
