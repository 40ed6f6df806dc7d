"""Published preferences and scores of clips: VideoFeedback (VideoScore), VideoAlign's csv."""

from __future__ import annotations

from typing import Any

from diffalign.errors import UserError
from diffalign.importers.fields import known, number, text
from diffalign.importers.shelf import Shelf
from diffalign.records import Candidate, Record, media_path

DIMENSIONS = (
    "visual quality",
    "temporal consistency",
    "dynamic degree",
    "text-to-video alignment",
    "factual consistency",
)
SIDES = {"A": (1.0, 0.0), "B": (0.0, 1.0), "same": (0.5, 0.5)}


def videofeedback(name: str, row: dict[str, Any], shelf: Shelf) -> Record:
    """One scored clip, with a label per dimension (``visual_quality`` ...), 1 to 4.

    Clips are ``<id>.mp4`` in the root, or below the first character of the id as behind the data set's links.
    """
    labels: dict[str, Any] = {_label(key): number(row, key) for key in DIMENSIONS}
    clip = text(row, "id")
    flat = f"{clip}.mp4"
    path = flat if media_path(shelf.root, flat).is_file() else f"{clip[:1]}/{flat}"
    candidate = Candidate(sample=shelf.take(path), labels=labels, origin={"clip": clip} | known(row, "video link"))
    return Record(id=name, prompt=text(row, "text prompt"), source="videofeedback", candidates=[candidate])


def _label(dimension: str) -> str:
    return dimension.replace("-", "_").replace(" ", "_")


def videoalign(name: str, row: dict[str, Any], shelf: Shelf) -> Record:
    """A pair with labels ``VQ``, ``MQ`` and ``TA``: 1 and 0, or 0.5 for both; `build` weighs them into a reward."""
    labels: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for key in ("VQ", "MQ", "TA"):
        verdict = text(row, key)
        if verdict not in SIDES:
            raise UserError(f"{key}: {verdict[:40]!r} is none of {', '.join(SIDES)}")
        for side, value in zip(labels, SIDES[verdict], strict=True):
            side[key] = value
    candidates = [
        Candidate(
            sample=shelf.take(row[f"path_{side}"]),
            labels=given,
            origin={key: number(row, f"{key}_{side}") for key in ("fps", "num_frames") if row.get(f"{key}_{side}")},
        )
        for side, given in zip("AB", labels, strict=True)
    ]
    return Record(id=name, prompt=text(row, "prompt"), source="videoalign", candidates=candidates)
