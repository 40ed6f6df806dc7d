"""What is asked: items of a records file, the order in which an annotator meets them, and who is shown on which side.

All of it follows from the records, the seed and the annotator's name, so a server that is started again asks on.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

from diffalign import records
from diffalign.errors import UserError
from diffalign.files import require_complete
from diffalign.records import Record, media_kind, media_path

Task = Literal["pair", "best", "rank", "segments"]
TYPES = {
    **{".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"},
    **{".gif": "image/gif", ".bmp": "image/bmp", ".avif": "image/avif"},
    **{".mp4": "video/mp4", ".mov": "video/mp4", ".webm": "video/webm"},
}
"""The files that a browser shows, and as what they are served. No SVG: it can hold scripts."""
TIE, SKIP = "tie", "skip"


class Item(NamedTuple):
    """One question about candidates of a record."""

    id: str
    record: Record
    candidates: tuple[int, ...]
    """Indices in the record, ascending."""
    segments: int | None = None
    """How many segments of the clips are asked about."""


@dataclass
class Plan:
    """All items of a job, and the files that may be seen."""

    task: Task
    seed: int
    segment_seconds: float
    items: dict[str, Item] = field(default_factory=dict)
    media: dict[str, Path] = field(default_factory=dict)
    """Opaque name -> file: what is not in here is not served."""
    _names: dict[str, str] = field(default_factory=dict)
    _orders: dict[str, list[str]] = field(default_factory=dict)

    def order(self, annotator: str) -> list[str]:
        """The ids of all items, shuffled for this annotator."""
        if annotator not in self._orders:
            ids = list(self.items)
            random.Random(f"{self.seed}|order|{annotator}").shuffle(ids)
            self._orders[annotator] = ids
        return self._orders[annotator]

    def shown(self, annotator: str, item: Item) -> list[int]:
        """The candidates of an item from left to right, as this annotator sees them."""
        sides = list(item.candidates)
        random.Random(f"{self.seed}|sides|{annotator}|{item.id}").shuffle(sides)
        return sides

    def name(self, relative: str) -> str:
        """The opaque name of a media file: a file name that tells the model would bias."""
        return self._names[relative]

    def admit(self, root: Path, relative: str, where: str) -> None:
        """Let a media file be seen.

        Raises:
            UserError: it is not there, is outside the folder of the records, or no browser shows it.
        """
        if relative in self._names:
            return
        path = media_path(root, relative)
        if path.suffix.lower() not in TYPES:
            raise UserError(f"{where}: a browser does not show {relative!r}; it shows {', '.join(TYPES)}")
        if not path.is_file():
            raise UserError(f"{where}: {path}: no such file")
        name = hashlib.sha256(f"{self.seed}|{relative}".encode()).hexdigest()[:24]
        self._names[relative] = name
        self.media[name] = path


def make(source: Path, task: Task, *, seed: int, pairs: int, limit: int | None, segment_seconds: float) -> Plan:
    """The plan for a records file; files are checked here, so that nothing is missing in the middle of the work.

    Args:
        pairs: of candidates asked about per record, where there are more than two candidates.

    Raises:
        UserError: a record cannot be shown, or no record has two candidates.
    """
    plan = Plan(task, seed, segment_seconds)
    found = 0
    for record in records.read(source):
        found += 1
        if limit is None or found <= limit:
            _add(plan, record, source.parent, pairs)
    require_complete(source, found)
    if not plan.items:
        raise UserError(f"{source}: no record has two candidates to compare")
    return plan


def _add(plan: Plan, record: Record, root: Path, pairs: int) -> None:
    if len(record.candidates) < 2:
        return
    for index, candidate in enumerate(record.candidates):
        where = f"record {record.id!r}, candidate {index}"
        if candidate.sample is not None:
            plan.admit(root, candidate.sample, where)
        if plan.task == "segments" and (candidate.sample is None or media_kind(candidate.sample) != "video"):
            raise UserError(f"{where}: `task: segments` compares clips; choose another task")
    if record.condition is not None:
        plan.admit(root, record.condition, f"record {record.id!r}, condition")
    if plan.task in ("best", "rank"):
        plan.items[record.id] = Item(record.id, record, tuple(range(len(record.candidates))))
        return
    segments = _segments(record, root, plan.segment_seconds) if plan.task == "segments" else None
    for pair in islice(spread_pairs(len(record.candidates), f"{plan.seed}|pairs|{record.id}"), pairs):
        name = f"{record.id}#{pair[0]}-{pair[1]}"
        plan.items[name] = Item(name, record, pair, segments)


def spread_pairs(k: int, seed: str) -> Iterator[tuple[int, int]]:
    """All pairs of ``k`` candidates; the first of them meet every candidate about equally often."""
    circle = list(range(k))
    random.Random(seed).shuffle(circle)
    seen = set()
    for step in range(1, k // 2 + 1):
        for start in [*range(0, k, 2), *range(1, k, 2)]:
            first, second = sorted((circle[start], circle[(start + step) % k]))
            if (first, second) not in seen:
                seen.add((first, second))
                yield first, second


def _segments(record: Record, root: Path, seconds: float) -> int:
    """Segments that all clips of a record have; the last may be short."""
    from diffalign import media  # torch, which no other task needs

    names = [c.sample for c in record.candidates if c.sample is not None]
    return min(segment_count(media.frame_count(root, n), media.frame_rate(root, n), seconds) for n in names)


def segment_count(frames: int, rate: float, seconds: float) -> int:
    """ceil(T / s) of the frames after the first, which belongs to the first segment: 81 at 16 per second are 5 of 1 s.

    That is how `train` spreads segments over latent frames. A hundredth of a segment is rounding.
    """
    return max(math.ceil((frames - 1) / rate / seconds - 0.01), 1)


# --- answers ------------------------------------------------------------------------------------------------------


def check_answer(task: Task, item: Item, answer: Any) -> str | None:
    """What is wrong with an answer given in places from left to right; None if nothing is.

    ``pair`` and ``best``: a place or "tie"; ``rank``: groups of places, best first; ``segments``: a place or "tie" for
    each; all: "skip".
    """
    k = len(item.candidates)
    if answer == SKIP:
        return None
    if task in ("pair", "best"):
        return None if _is_choice(answer, k) else f"expected a number from 0 to {k - 1}, 'tie' or 'skip'"
    if task == "rank":
        groups = answer if isinstance(answer, list) and all(isinstance(g, list) and g for g in answer) else []
        places = [place for group in groups for place in group]
        sound = all(type(place) is int for place in places) and sorted(places) == list(range(k))
        return None if sound else f"expected groups of the numbers from 0 to {k - 1}, each of them once, or 'skip'"
    sound = isinstance(answer, list) and len(answer) == item.segments and all(_is_choice(v, k) for v in answer)
    return None if sound else f"expected {item.segments} verdicts, each 0, 1 or 'tie', or 'skip'"


def _is_choice(value: Any, k: int) -> bool:
    return value == TIE or (type(value) is int and 0 <= value < k)


def _renamed(answer: Any, name: Callable[[int], int]) -> Any:
    if isinstance(answer, list):
        return [_renamed(part, name) for part in answer]
    return name(answer) if type(answer) is int else answer


def as_candidates(answer: Any, shown: Sequence[int]) -> Any:
    """Places from left to right -> indices of candidates; those that tie in a ranking in ascending order."""
    named = _renamed(answer, shown.__getitem__)
    return [sorted(part) if isinstance(part, list) else part for part in named] if isinstance(named, list) else named


def as_places(answer: Any, shown: Sequence[int]) -> Any:
    """Indices of candidates -> places from left to right; -1 for one that was not shown."""
    places = {candidate: place for place, candidate in enumerate(shown)}
    return _renamed(answer, lambda candidate: places.get(candidate, -1))
