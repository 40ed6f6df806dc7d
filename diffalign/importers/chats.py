"""Text preferences: UltraFeedback binarised, and the shapes that TRL's trainers read."""

from __future__ import annotations

from collections.abc import Sequence
from os.path import commonprefix
from typing import Any

from diffalign.errors import UserError
from diffalign.importers.fields import known, number, turns
from diffalign.importers.shelf import Shelf
from diffalign.records import Candidate, Message, Record

Turns = str | list[Message]


def ultrafeedback(name: str, row: dict[str, Any], shelf: Shelf) -> Record:
    """``chosen`` has reward 1 and ``rejected`` 0, also where their scores are equal; the scores are labels ``score``.

    The prompt is what both conversations begin with.
    """
    prompt, *answers = _split(turns(row, "chosen"), turns(row, "rejected"))
    candidates = []
    for side, answer, reward in zip(("chosen", "rejected"), answers, (1.0, 0.0), strict=True):
        labels: dict[str, Any] = {"reward": reward}
        if row.get(f"score_{side}") is not None:
            labels["score"] = number(row, f"score_{side}")
        candidates.append(Candidate(text=answer, labels=labels))
    meta = known(row, "prompt_id")
    return Record(id=name, prompt=prompt, source="ultrafeedback", candidates=candidates, meta=meta)


def trl(name: str, row: dict[str, Any], shelf: Shelf) -> Record:
    """Preference, unpaired preference, prompt-completion or prompt-only rows, of text or of conversations.

    A preference gets rewards 1 and 0, an unpaired one the label ``desirable``; without a prompt, or with a text prompt
    and conversations, the prompt is what both answers begin with.
    """
    if "chosen" in row and "rejected" in row:
        chosen, rejected = turns(row, "chosen"), turns(row, "rejected")
        if row.get("prompt") is None or (isinstance(row["prompt"], str) and not isinstance(chosen, str)):
            prompt, chosen, rejected = _split(chosen, rejected)
        else:
            prompt = turns(row, "prompt")
        pair: tuple[tuple[Turns, dict[str, Any]], ...] = ((chosen, {"reward": 1.0}), (rejected, {"reward": 0.0}))
        candidates = [Candidate(text=answer, labels=labels) for answer, labels in pair]
        return Record(id=name, prompt=prompt, source="trl", candidates=candidates)
    prompt = turns(row, "prompt")
    if row.get("completion") is None:
        return Record(id=name, prompt=prompt, source="trl")
    labels: dict[str, Any] = {}
    if row.get("label") is not None:
        if not isinstance(row["label"], bool):
            raise UserError(f"label: expected true or false, found {str(row['label'])[:40]!r}")
        labels["desirable"] = float(row["label"])
    candidate = Candidate(text=turns(row, "completion"), labels=labels)
    return Record(id=name, prompt=prompt, source="trl", candidates=[candidate])


def _split(chosen: Turns, rejected: Turns) -> tuple[Turns, Turns, Turns]:
    """Prompt and answers of two texts that begin with the prompt.

    Each keeps an answer, be it the same. A space between prompt and answers goes to these, as in TRL.
    """
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise UserError("chosen, rejected: one is text and the other a conversation")
    shortest = min(len(chosen), len(rejected)) - 1
    if isinstance(chosen, str) and isinstance(rejected, str):
        length = max(min(len(commonprefix([chosen, rejected])), shortest), 0)  # noqa: RUF071
        length -= chosen[:length].endswith(" ")
    else:
        length = min(_common(chosen, rejected), shortest)
        if length == 0:
            raise UserError("chosen, rejected: do not begin with the same message, so there is no prompt")
    return chosen[:length], chosen[length:], rejected[length:]


def _common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many messages two conversations begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
