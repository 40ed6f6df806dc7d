"""How long a text is: a control against rewards that like length, or a target to hit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from diffalign.errors import UserError
from diffalign.scoring import Sample, Score, Scorer

Unit = Literal["words", "characters"]


def build(unit: Unit = "words", target: int | None = None) -> Scorer:
    """Number of words or characters of a text; with ``target`` minus the distance to it."""
    if target is not None and target < 0:
        raise UserError(f"target {target}: must not be negative")
    return _Length(unit, target)


@dataclass(frozen=True, slots=True)
class _Length:
    unit: Unit
    target: int | None
    accepts: frozenset[str] = frozenset({"text"})

    def __call__(self, samples: Sequence[Sample]) -> list[Score]:
        return [Score(self._score(sample.text or "")) for sample in samples]

    def _score(self, text: str) -> float:
        length = len(text.split()) if self.unit == "words" else len(text)
        return float(length if self.target is None else -abs(length - self.target))
