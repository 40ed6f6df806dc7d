"""GenEval's scoring rules over detected objects (arXiv:2310.11513; ``evaluate_images.py``, ``summary_scores.py``).

The rules know nothing of the detector: the shapes world's exact judge and a neural detector feed the same function.
``metadata`` is GenEval's: ``{"tag", "include": [{"class", "count", "color"?, "position"?: [relation, index]}],
"exclude"?: [{"class", "count"}], "prompt"}``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

POSITION_SHRINK = 0.1  # each axis of an offset loses this share of the two box sizes
POSITION_COSINE = 0.5  # a relation holds within 60 degrees of its axis


@dataclass(frozen=True, slots=True)
class Found:
    """One detected object. ``box`` is (x1, y1, x2, y2) in pixels, y pointing down."""

    label: str
    score: float
    box: tuple[float, float, float, float]
    color: str | None = None

    @property
    def center(self) -> tuple[float, float]:
        x1, y1, x2, y2 = self.box
        return (x1 + x2) / 2, (y1 + y2) / 2

    @property
    def size(self) -> tuple[float, float]:
        x1, y1, x2, y2 = self.box
        return x2 - x1, y2 - y1


def relations(a: Found, b: Found) -> set[str]:
    """The relations in which ``a`` stands to ``b``; none when the shrunk offset vanishes.

    The shrunk offset is divided by the norm of the unshrunk one, as in the released code.
    """
    offset = [p - q for p, q in zip(a.center, b.center, strict=True)]
    sizes = [p + q for p, q in zip(a.size, b.size, strict=True)]
    shrunk = [math.copysign(max(abs(o) - POSITION_SHRINK * s, 0.0), o) for o, s in zip(offset, sizes, strict=True)]
    if max(abs(s) for s in shrunk) < 1e-3:
        return set()
    norm = math.hypot(*offset)
    dx, dy = (s / norm for s in shrunk)
    holds = {
        "left of": dx < -POSITION_COSINE,
        "right of": dx > POSITION_COSINE,
        "above": dy < -POSITION_COSINE,
        "below": dy > POSITION_COSINE,
    }
    return {name for name, yes in holds.items() if yes}


def _check_include(
    clause: Mapping[str, Any], found: Sequence[Found], earlier: Sequence[Sequence[Found] | None]
) -> tuple[list[Found] | None, str]:
    """The objects that satisfy a clause and no complaint, or None and the first complaint."""
    name, count = clause["class"], clause["count"]
    best = sorted((f for f in found if f.label == name), key=lambda f: -f.score)[:count]
    if len(best) < count:
        return None, f"expected {name}>={count}, found {len(best)}"
    color = clause.get("color")
    if color is not None and any(f.color != color for f in best):
        seen = ", ".join(str(f.color) for f in best)
        return None, f"expected {color} {name}>={count}, found colours {seen}"
    if "position" in clause:
        relation, index = clause["position"]
        targets = earlier[index]
        if targets is None:
            return None, f"no target for {name} to be {relation}"
        for a in best:
            for b in targets:
                if relation not in relations(a, b):
                    return None, f"expected {name} {relation} target, found {sorted(relations(a, b))}"
    return best, ""


def check(metadata: Mapping[str, Any], found: Sequence[Found]) -> tuple[bool, str]:
    """GenEval's binary verdict on one image and the reasons against it (empty when correct).

    ``count`` is a lower bound in ``include``; the exact number of a counting prompt is enforced by ``exclude``.
    """
    reasons: list[str] = []
    groups: list[Sequence[Found] | None] = []
    for clause in metadata.get("include", []):
        group, reason = _check_include(clause, found, groups)
        groups.append(group)
        if reason:
            reasons.append(reason)
    for clause in metadata.get("exclude", []):
        n = sum(f.label == clause["class"] for f in found)
        if n >= clause["count"]:
            reasons.append(f"expected {clause['class']}<{clause['count']}, found {n}")
    return not reasons, "; ".join(reasons)
