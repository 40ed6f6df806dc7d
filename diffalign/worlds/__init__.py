"""Embedded worlds, usable without any network: prompts, an exact judge and a small pretrained model each."""

from __future__ import annotations

import importlib
from typing import Any

from diffalign.errors import UserError, nearest

WORLDS = ("shapes", "puzzles")


def load_prompts(world: str, split: str) -> list[dict[str, Any]]:
    """Prompt metadata of a world's split, for example ``load_prompts("shapes", "heldout")``."""
    if world not in WORLDS:
        raise UserError(f"prompts.source: no world {world!r}{nearest(world, WORLDS)}; available: {', '.join(WORLDS)}")
    if split not in ("train", "heldout"):
        raise UserError(f"prompts.source: {world} has the splits train and heldout, not {split!r}")
    return importlib.import_module(f"diffalign.worlds.{world}.prompts").prompts(split)
