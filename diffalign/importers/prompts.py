"""Prompts without answers: those of GenEval, DPG-Bench and T2I-CompBench, a text file, a list with condition images."""

from __future__ import annotations

from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

from diffalign.errors import UserError
from diffalign.importers import tables
from diffalign.importers.fields import array, number, others, text
from diffalign.importers.shelf import Shelf
from diffalign.records import Record


def geneval(name: str, row: dict[str, Any], shelf: Shelf) -> Record:
    """A line of GenEval's ``evaluation_metadata.jsonl``, which stays whole in ``meta``."""
    text(row, "tag")
    array(row, "include")
    return Record(id=name, prompt=text(row, "prompt"), source="geneval", meta=row)


def dpg(name: str, row: dict[str, Any], shelf: Shelf) -> Record:
    """The questions of ``dpg_bench.csv`` about a prompt, one a row, each with the places of those it depends on.

    All prompts have one tag, since the benchmark's score is their plain mean; what a question is about is in
    ``category``.
    """
    rows = row["rows"]
    places = {int(number(item, "proposition_id")): place for place, item in enumerate(rows)}
    if len(places) < len(rows):
        raise UserError("proposition_id: one is there twice")
    dependency = [[places[parent] for parent in _parents(item, places)] for item in rows]
    meta = {
        "tag": "dpg",
        "questions": [text(item, "question_natural_language") for item in rows],
        "dependency": dependency,
        "category": [text(item, "category_broad") for item in rows],
    }
    return Record(id=name, prompt=text(row, "text"), source="dpg", meta=meta)


def _parents(row: dict[str, Any], places: Container[int]) -> list[int]:
    """The propositions that one depends on; 0 stands for none."""
    try:
        parents = [int(part) for part in text(row, "dependency").split(",")]
    except ValueError:
        raise UserError(f"dependency: expected numbers, found {row['dependency'][:40]!r}") from None
    found = [parent for parent in parents if parent]
    unknown = [parent for parent in found if parent not in places]
    if unknown:
        raise UserError(f"dependency: no proposition {unknown[0]}")
    return found


def compbench_rows(source: Path, split: str | None) -> Iterator[tables.Row]:
    """The lines of T2I-CompBench's ``<category>_<split>.txt``: one file, or all of a folder's split (``val``)."""
    split = split or "val"
    files = sorted(source.glob(f"*_{split}.txt")) if source.is_dir() else [source]
    if not files:
        raise UserError(f"source: {source} holds no <category>_{split}.txt")
    for path in files:
        tag = path.stem.removesuffix(f"_{split}")
        yield from ({"prompt": line, "tag": tag} for line in _lines(path))


def compbench(name: str, row: dict[str, Any], shelf: Shelf) -> Record:
    """A prompt of T2I-CompBench; its category is the tag."""
    return Record(id=name, prompt=row["prompt"], source="compbench", meta={"tag": row["tag"]})


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
    yield from ({"prompt": line} for line in _lines(source))


def _lines(source: Path) -> Iterator[str]:
    """The lines of a text file that are not empty."""
    try:
        with source.open(encoding="utf-8-sig") as handle:
            yield from filter(None, map(str.strip, handle))
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
