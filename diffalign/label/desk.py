"""Who gets which item next, and what becomes of an answer: the server without the web."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from diffalign.label import agreement
from diffalign.label.answers import LONGEST_NAME, Journal, Line, clean_name, now
from diffalign.label.plan import SKIP, Item, Plan, as_candidates, as_places, check_answer
from diffalign.records import media_kind, plain

HELD = 600.0
"""Seconds that an item stays with whom it was last shown to, where `overlap` limits who sees it."""
MOST_DISPUTES = 200
LONGEST = 86_400.0
"""Seconds on one item; a page left open over night says nothing."""


class Refusal(Exception):
    """A request that is not carried out: an HTTP status and one line."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status, self.text = status, text


class Desk:
    """Hands out items and takes answers."""

    def __init__(
        self, plan: Plan, journal: Journal, names: list[str], overlap: int | None, clock: Callable[[], float]
    ) -> None:
        self.plan, self.journal, self.names, self.overlap, self.clock = plan, journal, names, overlap, clock
        self._held: dict[str, tuple[str, float]] = {}

    def job(self) -> dict[str, Any]:
        """What the page needs to know before anybody has a name."""
        known = self.names or self.journal.answers.annotators()
        return {"task": self.plan.task, "names": known, "fixed": bool(self.names), "longest_name": LONGEST_NAME}

    def following(self, annotator: str) -> dict[str, Any]:
        """The next item of an annotator, if there is one, and how far the work is."""
        name = self._name(annotator)
        # the one on the screen first: a reload, or a second tab, is no way to choose
        own = self._held.get(name, ("", 0.0))[0]
        answered, left = self._split(name)
        if own in left:
            left.remove(own)
            left.insert(0, own)
        if left:
            self._held[name] = (left[0], self.clock())
        else:
            self._held.pop(name, None)
        shown = [self.present(name, self.plan.items[item]) for item in left[:2]]
        return {
            "item": shown[0] if shown else None,
            "upcoming": [c["url"] for c in shown[1]["shown"] if c["kind"] == "image"] if len(shown) > 1 else [],
            "done": answered,
            "total": answered + len(left),
        }

    def answer(self, annotator: str, item_id: str, answer: Any, seconds: float | None) -> dict[str, Any]:
        """Keep an answer and go on.

        Raises:
            Refusal: it is not an answer to an item.
            Conflict: the item has another answer of this annotator.
        """
        name, item = self._name(annotator), self.plan.items.get(item_id)
        if item is None:
            raise Refusal(404, f"no item {item_id[:200]!r}")
        wrong = check_answer(self.plan.task, item, answer)
        if wrong:
            raise Refusal(400, f"answer: {wrong}")
        shown = self.plan.shown(name, item)
        self.journal.put(
            Line(
                annotator=name,
                item=item.id,
                record=item.record.id,
                shown=shown,
                answer=as_candidates(answer, shown),
                seconds=None if seconds is None else round(min(seconds, LONGEST), 1),
                time=now(),
            )
        )
        return self.following(name)

    def undo(self, annotator: str) -> dict[str, Any]:
        """Take the latest answer back and show its item again, with what was answered.

        Raises:
            Refusal: there is nothing to undo.
        """
        name = self._name(annotator)
        line = self.journal.answers.last(name)
        if line is None or line.item not in self.plan.items:
            raise Refusal(404, "nothing to undo")
        self.journal.put(Line(annotator=name, item=line.item, record=line.record, retracted=True, time=now()))
        self._held[name] = (line.item, self.clock())
        state = self.following(name)
        if state["item"] and state["item"]["id"] == line.item:  # with `overlap` somebody else may have taken it
            state["item"]["previous"] = as_places(line.answer, line.shown)
        return state

    def present(self, annotator: str, item: Item) -> dict[str, Any]:
        """An item as the page gets it: nothing in it says which candidate is which."""
        record = item.record
        return {
            "id": item.id,
            "prompt": plain(record.prompt),
            "condition": self._url(record.condition) if record.condition else None,
            "condition_kind": media_kind(record.condition) if record.condition else None,
            "shown": self._candidates(item, self.plan.shown(annotator, item)),
            "segments": item.segments,
            "segment_seconds": self.plan.segment_seconds,
        }

    def agreement(self) -> dict[str, Any]:
        """The page of agreement. Ratios that are not defined are null."""
        task, items, answers = self.plan.task, self.plan.items, self.journal.answers
        found = agreement.all_units(task, items, answers)
        share, pairs = agreement.raw(found)
        differing = agreement.disputes(task, items, answers)
        return {
            "items": len(items),
            "answered": sum(1 for item in items if self._tellers(item)),
            "compared": sum(1 for unit in found if len(unit) > 1),
            "share": share,
            "pairs": pairs,
            "alpha": agreement.alpha(found),
            "between": [row._asdict() for row in agreement.pairwise(found)],
            "annotators": [row._asdict() for row in agreement.habits(task, items, answers)],
            "disputes": len(differing),
            "disputed": [
                {
                    "id": dispute.item.id,
                    "prompt": plain(dispute.item.record.prompt),
                    "share": dispute.share,
                    "shown": self._candidates(dispute.item, dispute.item.candidates),
                    "given": [
                        {"annotator": name, "answer": as_places(line.answer, dispute.item.candidates)}
                        for name, line in sorted(dispute.given.items())
                    ],
                }
                for dispute in differing[:MOST_DISPUTES]
            ],
        }

    def _name(self, given: str) -> str:
        name = clean_name(given)
        if name is None:
            raise Refusal(400, f"annotator: expected a name of 1 to {LONGEST_NAME} printable characters")
        if self.names and name not in self.names:
            raise Refusal(403, "annotator: not one of those named in the config")
        return name

    def _tellers(self, item: str) -> set[str]:
        """Who has answered an item, skips not counted."""
        return {who for who, line in self.journal.answers.by_item.get(item, {}).items() if line.answer != SKIP}

    def _split(self, name: str) -> tuple[int, list[str]]:
        """How many items an annotator has answered, and the ones that are still open to them, in their order."""
        answered = 0
        left: list[str] = []
        now = self.clock()
        held: dict[str, set[str]] = {}
        for other, (item, since) in self._held.items():
            if other != name and now - since < HELD:
                held.setdefault(item, set()).add(other)
        for item in self.plan.order(name):
            given = self.journal.answers.by_item.get(item)
            if given and name in given:
                answered += 1
            elif self._has_place(item, held.get(item)):
                left.append(item)
        return answered, left

    def _has_place(self, item: str, held: set[str] | None) -> bool:
        return self.overlap is None or len(self._tellers(item) | (held or set())) < self.overlap

    def _candidates(self, item: Item, order: Iterable[int]) -> list[dict[str, Any]]:
        return [self._candidate(item, index) for index in order]

    def _candidate(self, item: Item, index: int) -> dict[str, Any]:
        candidate = item.record.candidates[index]
        if candidate.sample is not None:
            return {"kind": media_kind(candidate.sample), "url": self._url(candidate.sample)}
        assert candidate.text is not None
        return {"kind": "text", "text": plain(candidate.text)}

    def _url(self, relative: str) -> str:
        return f"/media/{self.plan.name(relative)}"
