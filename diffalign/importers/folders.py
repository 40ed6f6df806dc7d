"""Folders of pictures and clips: twins of winners and losers, a list with captions, D3PO's annotations."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

from diffalign.errors import UserError
from diffalign.importers import tables
from diffalign.importers.fields import array, number, others, text
from diffalign.importers.shelf import OTHERS, PICTURE_SUFFIXES, Shelf
from diffalign.records import Candidate, Record, media_path

TWINS = (("w", "l"), ("winner", "loser"))
LISTS = ("metadata.jsonl", "metadata.csv")
FILE_KEYS = ("file_name", "image", "video")
TEXT_KEYS = ("text", "prompt", "caption")


# --- a list of files with captions ----------------------------------------------------------------------------------


def list_rows(source: Path, split: str | None) -> Iterator[tables.Row]:
    """The lines of a ``metadata.jsonl`` or ``metadata.csv``: the source, or in it, or in its folder of the split."""
    folder = source / split if split else source
    found = [folder] if source.is_file() else [folder / name for name in LISTS if (folder / name).is_file()]
    if len(found) != 1 or not found[0].is_file():
        raise UserError(f"source: {folder} holds {len(found)} of {' and '.join(LISTS)}, expected one")
    prefix = f"{split}/" if split else ""
    for row in tables.rows(found[0]):
        if prefix and isinstance(row, dict):
            row = {key: f"{prefix}{value}" if key in FILE_KEYS else value for key, value in row.items()}
        yield row


def listed(name: str, row: dict[str, Any], shelf: Shelf) -> Record:
    """A file with its caption (imagefolder: ``file_name``, ``text``; DiffSynth: ``image``, ``prompt``), unpaired."""
    file, caption = (next(key for key in keys if key in row) for keys in (FILE_KEYS, TEXT_KEYS))
    candidate = Candidate(sample=shelf.take(row[file]), origin={"file": row[file]})
    return Record(
        id=name,
        prompt=text(row, caption),
        source="jsonl",
        candidates=[candidate],
        meta=others(row, file, caption),
    )


# --- twin folders ---------------------------------------------------------------------------------------------------


def twin_rows(source: Path, split: str | None) -> Iterator[tables.Row]:
    """A row per file name of the winners' folder, then those that only the losers' has."""
    winners, losers = _twins(source)
    captions = _captions(source)
    names = _media(source / winners)
    for name in chain(names, sorted(set(_media(source / losers)) - set(names))):
        missing = next((folder for folder in (winners, losers) if not (source / folder / name).is_file()), None)
        if missing is not None:
            yield UserError(f"{name}: not in {missing}/; winners and losers have equal file names")
            continue
        try:
            caption = captions.get(name) or _caption(source, (winners, losers), name)
        except UserError as error:
            yield error
            continue
        yield {"winner": f"{winners}/{name}", "loser": f"{losers}/{name}", "prompt": caption}


def _twins(source: Path) -> tuple[str, str]:
    found = [pair for pair in TWINS if all((source / name).is_dir() for name in pair)]
    if len(found) != 1:
        raise UserError(f"source: {source} must hold the folders w/ and l/, or winner/ and loser/")
    return found[0]


def _media(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix.lower() in (*PICTURE_SUFFIXES, *OTHERS))


def _captions(source: Path) -> dict[str, str]:
    """File name -> caption of a list in the folder, if there is one."""
    if not any((source / name).is_file() for name in LISTS):
        return {}
    found = {}
    for row in list_rows(source, None):
        if isinstance(row, UserError):
            raise row
        file, caption = (next((key for key in keys if key in row), "") for keys in (FILE_KEYS, TEXT_KEYS))
        found[Path(text(row, file)).name] = text(row, caption)
    return found


def _caption(source: Path, folders: tuple[str, ...], name: str) -> str | None:
    """The text beside a file."""
    for folder in folders:
        path = media_path(source, f"{folder}/{Path(name).stem}.txt")
        if path.is_file():
            try:
                return path.read_text(encoding="utf-8").strip()
            except UnicodeDecodeError as error:
                raise UserError(f"{path}: not UTF-8 text: {error}") from None
    return None


def twins(name: str, row: dict[str, Any], shelf: Shelf) -> Record:
    """A winner with reward 1 and its loser with 0."""
    if row["prompt"] is None:
        raise UserError(f"{row['winner']}: no caption; write it into a .txt of the same name, or into {LISTS[0]}")
    sides = ((row["winner"], 1.0), (row["loser"], 0.0))
    candidates = [
        Candidate(sample=shelf.take(path), labels={"reward": reward}, origin={"file": path}) for path, reward in sides
    ]
    return Record(id=name, prompt=text(row, "prompt"), source="folders", candidates=candidates)


# --- D3PO -----------------------------------------------------------------------------------------------------------


def d3po_rows(source: Path, split: str | None) -> Iterator[tables.Row]:
    """D3PO's ``prompt.json`` with ``annotations/*.json``: a file per annotator, each a matrix of prompts x pictures.

    Files are cut to the shortest and averaged. The latents in ``sample.pkl`` are never read.
    """
    prompts = _list(source / "prompt.json")
    paths = sorted((source / "annotations").glob("*.json"))
    if not paths:
        raise UserError(f"source: {source} needs annotations/, a folder with a json file per annotator")
    votes = [_list(path) for path in paths]
    length = min(map(len, votes))
    if length > len(prompts):
        raise UserError(f"{source}: {length} annotated prompts, but prompt.json holds {len(prompts)}")
    for index in range(length):
        yield {"prompt": prompts[index], "votes": [vote[index] for vote in votes], "index": index}


def _list(path: Path) -> list[Any]:
    """The content of a small json file, which is a list.

    Raises:
        UserError: there is no such file, or it is something else.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(content, list):
        raise UserError(f"{path}: expected a list, found {type(content).__name__}")
    return content


def d3po(name: str, row: dict[str, Any], shelf: Shelf) -> Record:
    """The pictures of a prompt, seven in the release: ``reward`` is the mean of what the annotators gave.

    Pictures are ``images/00000.png`` ..., those of a prompt in a row.
    """
    k = len(array({"votes": row["votes"][0]}, "votes"))
    rows = [array({"votes": vote}, "votes", k) for vote in row["votes"]]
    rewards = [fmean(number({"votes": vote}, "votes") for vote in column) for column in zip(*rows, strict=True)]
    candidates = []
    for i, reward in enumerate(rewards):
        path = f"images/{row['index'] * k + i:05d}.png"
        candidates.append(Candidate(sample=shelf.take(path), labels={"reward": reward}, origin={"file": path}))
    meta = {"annotators": len(rows)}
    return Record(id=name, prompt=text(row, "prompt"), source="d3po", candidates=candidates, meta=meta)
