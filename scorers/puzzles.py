"""The exact judge of the puzzles world (short character puzzles with one right answer); a parser, no network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from diffalign.errors import UserError
from diffalign.scoring import Sample, Score, Scorer

Metric = Literal["correct", "graded"]


def build(metric: Metric = "correct") -> Scorer:
    """``correct``: the answer is exactly right, 0 or 1. ``graded``: the share of its characters that are right."""
    return _Puzzles(metric)


@dataclass(frozen=True, slots=True)
class _Puzzles:
    metric: Metric
    accepts: frozenset[str] = frozenset({"text"})

    def __call__(self, samples: Sequence[Sample]) -> list[Score]:
        return [self._score(sample) for sample in samples]

    def _score(self, sample: Sample) -> Score:
        from diffalign.worlds.puzzles.prompts import solve

        try:
            _, answer = solve(sample.prompt)
        except ValueError as error:
            raise UserError(str(error)) from None
        given = sample.text or ""
        if given == answer:
            return Score(1.0)
        same = sum(a == b for a, b in zip(given, answer, strict=False)) / max(len(given), len(answer))
        return Score(same if self.metric == "graded" else 0.0, detail={"reason": f"the answer is {answer}"})
