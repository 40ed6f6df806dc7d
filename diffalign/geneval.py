"""GenEval's scoring rules over detected objects (arXiv:2310.11513; ``evaluate_images.py``, ``summary_scores.py``).

The rules know nothing of the detector: the shapes world's exact judge and a neural detector feed the same function.
``metadata`` is GenEval's: ``{"tag", "include": [{"class", "count", "color"?, "position"?: [relation, index]}],
"exclude"?: [{"class", "count"}], "prompt"}``.

Two readings of ``count``: at least that many, of which the most confident are judged (the benchmark), or with
``exact`` that many and no more, all judged (what reinforcement learning is often rewarded with).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "computer mouse", "tv remote", "computer keyboard", "cell phone", "microwave", "oven", "toaster",
    "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
"""COCO's 80 classes in COCO's order; a mouse, a remote and a keyboard have fuller names."""
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9  # a detection counts above it; the second is for prompts tagged "counting"
MAX_OBJECTS = 16  # detections of a class that are looked at
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


AnyFound = TypeVar("AnyFound", bound=Found)


def overlap(a: Found, b: Found) -> float:
    """Intersection over union of two boxes, a pixel wider and higher than their corners say, as in the release."""

    def area(x1: float, y1: float, x2: float, y2: float) -> float:
        return max(x2 - x1 + 1, 0) * max(y2 - y1 + 1, 0)

    low, high = map(max, a.box[:2], b.box[:2]), map(min, a.box[2:], b.box[2:])
    shared = area(*low, *high)
    union = area(*a.box) + area(*b.box) - shared
    return shared / union if union else 0.0


def keep(
    found: Sequence[AnyFound], *, threshold: float, max_objects: int = MAX_OBJECTS, max_overlap: float = 1.0
) -> list[AnyFound]:
    """The detections that count: per class the best ``max_objects`` above ``threshold``, best first.

    Below 1 ``max_overlap`` also drops an object that overlaps a better one of its class by that much or more.
    """
    kept: list[AnyFound] = []
    for label in dict.fromkeys(f.label for f in found):
        sure = (f for f in found if f.label == label and f.score > threshold)
        mine: list[AnyFound] = []
        for f in sorted(sure, key=lambda f: -f.score)[:max_objects]:
            if max_overlap == 1 or all(overlap(f, better) < max_overlap for better in mine):
                mine.append(f)
        kept += mine
    return kept


@dataclass(frozen=True, slots=True)
class _Met:
    """What an ``include`` clause comes to: its objects if it holds, a complaint if not, and how far its terms hold."""

    objects: list[Found] | None
    reason: str
    terms: list[float]


def _asked(clause: Mapping[str, Any], found: Sequence[Found], exact: bool) -> list[int]:
    """Which objects a clause is about: those of its class, best first, and no more than ``count`` unless exact."""
    mine = [i for i, f in enumerate(found) if f.label == clause["class"]]
    return sorted(mine, key=lambda i: -found[i].score)[: None if exact else clause["count"]]


def _include(clause: Mapping[str, Any], found: Sequence[Found], earlier: Sequence[_Met], exact: bool) -> _Met:
    name, count = clause["class"], clause["count"]
    objects = [found[i] for i in _asked(clause, found, exact)]
    n, more = len(objects), [key for key in ("color", "position") if key in clause]
    if n != count:
        close = max(0.0, 1 - abs(count - n) / count)
        return _Met(None, f"expected {name}{'==' if exact else '>='}{count}, found {n}", [close, *(0.0 for _ in more)])
    terms = [1.0]
    if "color" in clause:
        colors = [str(f.color) for f in objects]
        right = colors.count(clause["color"])
        terms.append(right / count)
        if right < count:
            order = sorted(set(colors), key=lambda c: (COLORS.index(c) if c in COLORS else len(COLORS), c))
            tally = ", ".join(f"{colors.count(c)} {c}" for c in order)
            reason = f"expected {clause['color']} {name}>={count}, found {right} {clause['color']}; and {tally}"
            return _Met(None, reason, terms + [0.0] * ("position" in clause))
    if "position" in clause:
        relation, index = clause["position"]
        reason = _misplaced(name, relation, objects, earlier[index].objects)
        if reason:
            return _Met(None, reason, [*terms, 0.0])
        terms.append(1.0)
    return _Met(objects, "", terms)


def _misplaced(name: str, relation: str, objects: Sequence[Found], targets: Sequence[Found] | None) -> str:
    """The first complaint about where objects stand, or nothing."""
    if targets is None:
        return f"no target for {name} to be {relation}"
    for a in objects:
        for b in targets:
            true = relations(a, b)
            if relation not in true:
                return f"expected {name} {relation} target, found {' and '.join(sorted(true))} target"
    return ""


def _clauses(metadata: Mapping[str, Any], found: Sequence[Found], exact: bool) -> list[_Met]:
    met: list[_Met] = []
    for clause in metadata.get("include", []):
        met.append(_include(clause, found, met, exact))
    return met


def _excluded(metadata: Mapping[str, Any], found: Sequence[Found]) -> Iterator[tuple[Mapping[str, Any], int]]:
    """The ``exclude`` clauses and how many objects of their class there are."""
    for clause in metadata.get("exclude", []):
        yield clause, sum(f.label == clause["class"] for f in found)


def to_color(metadata: Mapping[str, Any], found: Sequence[Found], *, exact: bool = False) -> list[int]:
    """Which objects the verdict depends on the colour of: indices into ``found``, none twice."""
    indices: list[int] = []
    for clause in metadata.get("include", []):
        asked = _asked(clause, found, exact)
        if "color" in clause and len(asked) == clause["count"]:
            indices += asked
    return list(dict.fromkeys(indices))


def check(metadata: Mapping[str, Any], found: Sequence[Found], *, exact: bool = False) -> tuple[bool, str]:
    """GenEval's binary verdict on one image and the reasons against it, a line each (empty when correct).

    Without ``exact`` a ``count`` is a lower bound in ``include``; the exact number of a counting prompt is enforced by
    ``exclude``.
    """
    reasons = [met.reason for met in _clauses(metadata, found, exact) if met.reason]
    for clause, n in _excluded(metadata, found):
        if n >= clause["count"]:
            reasons.append(f"expected {clause['class']}<{clause['count']}, found {n}")
    return not reasons, "\n".join(reasons)


def graded(metadata: Mapping[str, Any], found: Sequence[Found]) -> float:
    """Partial credit in [0, 1] under exact counts: the mean of the terms of all ``include`` clauses.

    A clause has a term for its count, ``max(0, 1 - |count - found| / count)``, one for its colour (the share of right
    objects) and one for its position (0 or 1), the last two 0 where the count is wrong. flow_grpo's reward is the same
    but for three things: it appends a 1 for the position even after the 0 of a failed one, it leaves the terms of a
    colour or position out in some failures, and its count term can be negative. An ``exclude`` clause has a term of
    its own (0 or 1) only if no ``include`` clause counts its class.
    """
    terms = [term for met in _clauses(metadata, found, exact=True) for term in met.terms]
    counted = {clause["class"] for clause in metadata.get("include", [])}
    terms += [float(n < clause["count"]) for clause, n in _excluded(metadata, found) if clause["class"] not in counted]
    return math.fsum(terms) / len(terms)


def complaint(metadata: Mapping[str, Any], classes: Collection[str], colors: Collection[str]) -> str | None:
    """What keeps the rules from reading a prompt's metadata, if anything; colours and classes are the detector's."""
    if not isinstance(metadata.get("tag"), str):
        return "`tag` must be a text such as counting"
    clauses = metadata.get("include")
    if not isinstance(clauses, list) or not clauses:
        return "`include` must be a list of clauses"
    excluded = metadata.get("exclude", [])
    if not isinstance(excluded, list):
        return "`exclude` must be a list of clauses"
    for key, clause, index in [
        *(("include", clause, i) for i, clause in enumerate(clauses)),
        *(("exclude", clause, i) for i, clause in enumerate(excluded)),
    ]:
        wrong = wrong_clause(clause, index, classes, colors)
        if wrong:
            return f"{key}.{index}: {wrong}"
    return None


def wrong_clause(clause: Any, index: int, classes: Collection[str], colors: Collection[str]) -> str | None:
    """What keeps the rules from reading one clause, if anything; ``index`` is its place in its list."""
    if not isinstance(clause, Mapping) or clause.get("class") not in classes:
        return f"`class` must be one of {', '.join(classes)}"
    count = clause.get("count")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        return "`count` must be a positive integer"
    if "color" in clause and clause["color"] not in colors:
        return f"`color` must be one of {', '.join(colors)}"
    if "position" in clause:
        position = clause["position"]
        pair = isinstance(position, Sequence) and len(position) == 2
        if not pair or position[0] not in RELATIONS or position[1] not in range(index):
            return f"`position` must be one of {', '.join(RELATIONS)} and the index of an earlier clause"
    return None
