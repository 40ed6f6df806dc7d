"""Bad input. Torch-free, so that the command line can show it at once."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input: one line that says what is wrong, where, and how to fix it. The CLI prints it and exits with 2."""


def nearest(word: str, valid: Iterable[str]) -> str:
    """What to append to an error about an unknown name: ``; did you mean ...`` or the list of all valid names."""
    names = sorted(valid)
    close = difflib.get_close_matches(word, names, n=3, cutoff=0.5)
    if close:
        return f"; did you mean {' or '.join(map(repr, close))}?"
    return f"; valid: {', '.join(names)}" if names else ""
