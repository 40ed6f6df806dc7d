"""Values of a row as they should be, or one line about what they are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from diffalign.errors import UserError
from diffalign.records import Message


def text(row: Mapping[str, Any], key: str) -> str:
    """A string.

    Raises:
        UserError: there is none.
    """
    value = row.get(key)
    if not isinstance(value, str):
        raise UserError(f"{key}: expected text, found {type(value).__name__}")
    return value


def number(row: Mapping[str, Any], key: str) -> float:
    """A finite number; in a CSV file all values are text, so that text of a number is one.

    Raises:
        UserError: it is none.
    """
    value = row.get(key)
    try:
        if isinstance(value, bool) or not isinstance(value, int | float | str) or not math.isfinite(float(value)):
            raise ValueError
        return float(value)
    except (ValueError, OverflowError):
        raise UserError(f"{key}: expected a number, found {str(value)[:40]!r}") from None


def array(row: Mapping[str, Any], key: str, length: int | None = None) -> list[Any]:
    """A list, of some length.

    Raises:
        UserError: it is none, or another length.
    """
    value = row.get(key)
    if not isinstance(value, list):
        raise UserError(f"{key}: expected a list, found {type(value).__name__}")
    if length is not None and len(value) != length:
        raise UserError(f"{key}: has {len(value)} entries, expected {length}")
    return value


def turns(row: Mapping[str, Any], key: str) -> str | list[Message]:
    """Text, or the messages of a conversation.

    Raises:
        UserError: it is neither, or a message has more than a role and text.
    """
    value = row.get(key)
    if isinstance(value, str):
        return value
    found = []
    for message in array(row, key):
        given = {k: v for k, v in message.items() if v is not None} if isinstance(message, dict) else {}
        if given.keys() != {"role", "content"} or not all(isinstance(v, str) for v in given.values()):
            names = ", ".join(map(str, given)) or type(message).__name__
            raise UserError(f"{key}: a message has `role` and `content`, both text, and nothing else; found {names}")
        found.append(Message(**given))
    if not found:
        raise UserError(f"{key}: a conversation without messages")
    return found


def known(row: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """Those of the keys that the row has a value for."""
    return {key: row[key] for key in keys if row.get(key) is not None}


def others(row: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """What the row has beside the keys."""
    return {key: value for key, value in row.items() if key not in keys and value is not None}
