"""The 840 prompts of the shapes world, in GenEval's metadata schema, split by prompt into train and held-out.

Six GenEval tasks over 5 shapes and 6 colours. The held-out prompts are never seen by pre-training or
alignment. ``single_object`` has only five prompts; they cannot be held out without removing a shape from the world,
so the held-out split repeats them and every evaluation says so. The fifteen uncoloured counting prompts are for
training only.
"""

from __future__ import annotations

import hashlib
from itertools import permutations
from typing import Any, Literal

SHAPES = ("circle", "square", "triangle", "cross", "ring")
COLORS = {"red": 0.0, "yellow": 52.0, "green": 120.0, "cyan": 180.0, "blue": 230.0, "purple": 285.0}  # hue, degrees
RELATIONS = ("left of", "right of", "above", "below")
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COUNTS = {2: "two", 3: "three", 4: "four"}
Split = Literal["train", "heldout"]
Metadata = dict[str, Any]


def _item(shape: str, count: int = 1, color: str | None = None, position: list | None = None) -> Metadata:
    item: Metadata = {"class": shape, "count": count}
    if color is not None:
        item["color"] = color
    if position is not None:
        item["position"] = position
    return item


def _plural(shape: str) -> str:
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def _prompt(tag: str, text: str, include: list[Metadata], exclude: list[Metadata] | None = None) -> Metadata:
    metadata: Metadata = {"tag": tag, "include": include, "prompt": f"a photo of {text}"}
    if exclude:
        metadata["exclude"] = exclude
    return metadata


def all_prompts() -> list[Metadata]:
    """Every prompt of the world as GenEval metadata: ``{tag, include, exclude?, prompt}``."""
    out = [_prompt("single_object", f"a {s}", [_item(s)]) for s in SHAPES]
    out += [_prompt("two_object", f"a {a} and a {b}", [_item(a), _item(b)]) for a, b in permutations(SHAPES, 2)]
    for n, word in COUNTS.items():
        for s in SHAPES:
            for color in (None, *COLORS):
                text = f"{word} {_plural(s)}" if color is None else f"{word} {color} {_plural(s)}"
                more = [_item(s, n + 1, color)]
                out.append(_prompt("counting", text, [_item(s, n, color)], more))
    out += [_prompt("colors", f"a {c} {s}", [_item(s, color=c)]) for s in SHAPES for c in COLORS]
    for relation in RELATIONS:
        for a, b in permutations(SHAPES, 2):
            include = [_item(b), _item(a, position=[relation, 0])]
            out.append(_prompt("position", f"a {a} {relation} a {b}", include))
    for a, b in permutations(SHAPES, 2):
        for c, d in permutations(COLORS, 2):
            out.append(_prompt("color_attr", f"a {c} {a} and a {d} {b}", [_item(a, color=c), _item(b, color=d)]))
    return out


def can_be_held_out(metadata: Metadata) -> bool:
    """Single objects and uncoloured counting have too few prompts to lose any."""
    if metadata["tag"] == "single_object":
        return False
    return metadata["tag"] != "counting" or "color" in metadata["include"][0]


def is_held_out(metadata: Metadata) -> bool:
    """Split by prompt text alone, so that it can never drift: md5(prompt) mod 5 == 0."""
    digest = hashlib.md5(metadata["prompt"].encode(), usedforsecurity=False).hexdigest()
    return can_be_held_out(metadata) and int(digest, 16) % 5 == 0


def prompts(split: Split, task: str | None = None) -> list[Metadata]:
    """Prompts of a split; the held-out split of a task whose prompts cannot be held out is all of its prompts."""
    everything = [m for m in all_prompts() if task is None or m["tag"] == task]
    if split == "train":
        return [m for m in everything if not is_held_out(m)]
    if split != "heldout":
        raise ValueError(f"unknown split {split!r}: choose 'train' or 'heldout'")
    return [m for m in everything if is_held_out(m) or m["tag"] == "single_object"]
