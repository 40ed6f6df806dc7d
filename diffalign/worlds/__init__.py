"""Embedded worlds, usable without any network: renderer, prompts, exact judge and a small pretrained model each."""

from __future__ import annotations

from typing import Any

from diffalign.errors import UserError


def load_prompts(world: str, split: str) -> list[dict[str, Any]]:
    """Prompt metadata of a world's split, for example ``load_prompts("shapes", "heldout")``."""
    from diffalign.worlds.shapes.prompts import prompts

    if world != "shapes":
        raise UserError(f"prompts.source: no world {world!r}; available: shapes")
    if split not in ("train", "heldout"):
        raise UserError(f"prompts.source: {world} has the splits train and heldout, not {split!r}")
    return prompts(split)
