"""The puzzles world: six kinds of short character puzzles whose one right answer a parser computes.

===========  ========================  ================
tag          prompt                    answer
===========  ========================  ================
add          ``47+38``                 ``85``
subtract     ``90-27``                 ``63``
maximum      ``max 17 42 35``          ``42``
sort         ``sort 4173``             ``1347``
reverse      ``reverse kbxw``          ``wxbk``
close        ``close ([{``             ``}])``
===========  ========================  ================

Prompts are enumerated and then picked by the hash of their text, so that neither the set nor the split can drift.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
from typing import Any, Literal

TASKS = ("add", "subtract", "maximum", "sort", "reverse", "close")
PAIRS = {"(": ")", "[": "]", "{": "}"}
PER_TASK = 6000
"""At most so many prompts of a task."""
Split = Literal["train", "heldout"]
Metadata = dict[str, Any]

_SOLVERS: tuple[tuple[str, str, Callable[..., str]], ...] = (
    ("add", r"(\d+)\+(\d+)", lambda a, b: str(int(a) + int(b))),
    ("subtract", r"(\d+)-(\d+)", lambda a, b: str(int(a) - int(b))),
    ("maximum", r"max (\d+(?: \d+)*)", lambda numbers: max(numbers.split(), key=int)),
    ("sort", r"sort (\d+)", lambda digits: "".join(sorted(digits))),
    ("reverse", r"reverse ([a-z]+)", lambda word: word[::-1]),
    ("close", r"close ([(\[{]+)", lambda opened: "".join(PAIRS[c] for c in reversed(opened))),
)


def solve(prompt: str) -> tuple[str, str]:
    """The task of a prompt and its right answer, by parsing the prompt.

    Raises:
        ValueError: it is none of the six puzzles.
    """
    for tag, pattern, answer in _SOLVERS:
        match = re.fullmatch(pattern, prompt, re.ASCII)
        if match:
            return tag, answer(*match.groups())
    raise ValueError(f"{prompt!r} is no puzzle: expected one of {', '.join(TASKS)}")


def _hash(text: str) -> int:
    return int(hashlib.md5(text.encode(), usedforsecurity=False).hexdigest(), 16)


def _some(count: int, alphabet: str, length: int, salt: str) -> Iterator[str]:
    """``count`` distinct words chosen by hash, without enumerating all of them."""
    seen: set[str] = set()
    number = 0
    while len(seen) < count:
        value, word = _hash(f"{salt}|{number}"), ""
        for _ in range(length):
            value, index = divmod(value, len(alphabet))
            word += alphabet[index]
        number += 1
        if word not in seen:
            seen.add(word)
            yield word


def _candidates(tag: str) -> Iterator[str]:
    two = range(10, 100)
    if tag == "add":
        yield from (f"{a}+{b}" for a, b in product(two, two))
    elif tag == "subtract":
        yield from (f"{a}-{b}" for a, b in product(two, two) if a > b)
    elif tag == "maximum":
        yield from (f"max {w[:2]} {w[2:4]} {w[4:]}" for w in _some(PER_TASK, "123456789", 6, tag))
    elif tag == "sort":
        yield from (f"sort {w}" for n in (4, 5) for w in _some(PER_TASK // 2, "0123456789", n, tag))
    elif tag == "reverse":
        yield from (f"reverse {w}" for n in (4, 5) for w in _some(PER_TASK // 2, "abcdefghijklmnopqrstuvwxyz", n, tag))
    else:
        yield from (f"close {''.join(w)}" for n in range(4, 9) for w in product(PAIRS, repeat=n))


@cache
def _task(tag: str) -> tuple[str, ...]:
    return tuple(sorted(_candidates(tag), key=_hash)[:PER_TASK])


def is_held_out(prompt: str) -> bool:
    """Split by prompt text alone: md5(prompt) mod 5 == 0. Neither pre-training nor alignment sees these."""
    return _hash(prompt) % 5 == 0


def prompts(split: Split, task: str | None = None) -> list[Metadata]:
    """Metadata ``{tag, prompt}`` of a split; the judge needs no answer, it parses."""
    if split not in ("train", "heldout"):
        raise ValueError(f"unknown split {split!r}: choose 'train' or 'heldout'")
    tags = TASKS if task is None else (task,)
    return [
        {"tag": tag, "prompt": prompt}
        for tag in tags
        for prompt in _task(tag)
        if is_held_out(prompt) == (split == "heldout")
    ]
