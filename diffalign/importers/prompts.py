"""Prompts without answers: GenEval's metadata, a text file, a list with condition images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffalign.errors import UserError
from diffalign.importers import tables
from diffalign.importers.fields import array, others, text
from diffalign.importers.shelf import Shelf
from diffalign.records import Record


def geneval(name: str, row: dict[str, Any], shelf: Shelf) -> Record:
    """A line of GenEval's ``evaluation_metadata.jsonl``, which stays whole in ``meta``."""
    text(row, "tag")
    array(row, "include")
    return Record(id=name, prompt=text(row, "prompt"), source="geneval", meta=row)


def prompt_rows(source: Path, split: str | None) -> Iterator[tables.Row]:
    """The lines of a text file, or of a table; in a folder the file that is called like the split."""
    if source.is_dir() and split is not None:
        named = (source / f"{split}{suffix}" for suffix in (".jsonl", ".txt"))
        found = next((path for path in named if path.is_file()), None)
        if found is None:
            raise UserError(f"source: {source} holds neither {split}.jsonl nor {split}.txt")
        source = found
    if source.suffix != ".txt":
        yield from tables.rows(source, split)
        return
    try:
        with source.open(encoding="utf-8-sig") as handle:
            for line in handle:
                if line.strip():
                    yield {"prompt": line.strip()}
    except FileNotFoundError:
        raise UserError(f"source: no file {source}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{source}: not UTF-8 text: {error}") from None


def prompts(name: str, row: dict[str, Any], shelf: Shelf) -> Record:
    """A prompt, with its only ``image`` or ``images`` entry as the condition; all else goes to ``meta``."""
    images = row.get("images") or ([row["image"]] if row.get("image") else [])
    if not isinstance(images, list) or len(images) > 1:
        raise UserError("images: a record is conditioned on one picture at most")
    condition = shelf.take(images[0]) if images else None
    meta = others(row, "prompt", "image", "images")
    return Record(id=name, prompt=text(row, "prompt"), condition=condition, source="prompts", meta=meta)
