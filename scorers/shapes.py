"""The exact judge of the shapes world (32x32 images of GenEval-style prompts); no network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from diffalign.errors import UserError
from diffalign.geneval import wrong_clause
from diffalign.scoring import Sample, Score, Scorer

Metric = Literal["correct", "strict", "graded"]


def build(metric: Metric = "graded") -> Scorer:
    """``correct``: GenEval's rule, 0 or 1. ``strict``: correct and nothing more. ``graded``: partial credit in [0, 1].

    Samples need GenEval's metadata as ``meta``; an image that is not correct has the reason in its ``detail``.
    """
    return _Shapes(metric)


@dataclass(frozen=True, slots=True)
class _Shapes:
    metric: Metric
    accepts: frozenset[str] = frozenset({"image"})

    def __call__(self, samples: Sequence[Sample]) -> list[Score]:
        import numpy as np
        import torch

        from diffalign.worlds.shapes.judge import judge

        for sample in samples:
            _check(sample)
        pixels = np.stack([np.asarray(sample.image, dtype=np.float32) for sample in samples]) / 255
        verdicts = judge(torch.from_numpy(pixels).permute(0, 3, 1, 2), [dict(sample.meta) for sample in samples])
        return [
            Score(float(getattr(verdict, self.metric)), detail={} if verdict.correct else {"reason": verdict.reason})
            for verdict in verdicts
        ]


def _check(sample: Sample) -> None:
    from diffalign.worlds.shapes.prompts import COLORS, SHAPES
    from diffalign.worlds.shapes.render import SIZE

    if sample.image is None or sample.image.size != (SIZE, SIZE):
        size = sample.image and "x".join(map(str, sample.image.size))
        raise UserError(f"prompt {sample.prompt!r}: the shapes judge reads {SIZE}x{SIZE} images, got {size}")
    clauses = sample.meta.get("include")
    if not isinstance(clauses, list) or not clauses:
        raise UserError(f"prompt {sample.prompt!r}: its record's meta has no GenEval `include`, which the judge reads")
    for index, clause in enumerate(clauses):
        wrong = wrong_clause(clause, index, SHAPES, tuple(COLORS))
        if wrong:
            raise UserError(f"prompt {sample.prompt!r}: meta.include.{index}: {wrong}")
    if len(clauses) > 2 or (len(clauses) == 2 and any(clause["count"] != 1 for clause in clauses)):
        raise UserError(f"prompt {sample.prompt!r}: meta.include: the judge reads one clause, or two of count 1")
