"""Rows of a data set, whatever file they are in: parquet, arrow, jsonl, json, csv. A few rows are held at a time.

A row that cannot be read is a ``UserError`` in the place of its content, so that the one who imports can go on after
it; a file that cannot be read raises one.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from diffalign.errors import UserError

Row = dict[str, Any] | UserError
ROWS = 64  # per batch of a columnar file; with two pictures each some ten megabytes
CHUNK = 1 << 20  # characters of a json file that are read at first
LONGEST = 1 << 28  # characters of one row of a json file
SUFFIXES = (".parquet", ".arrow", ".jsonl", ".json", ".csv")
BETWEEN = re.compile(r"[\s,]*")
SHARD = re.compile(r"(?P<split>.+?)-\d{5}-of-\d{5}")
"""How the Hub names the parts of a split, with or without a digest at the end."""


def rows(source: Path, split: str | None = None) -> Iterator[Row]:
    """The rows of a file, or of all files of a folder in the order of their names.

    Raises:
        UserError: there are none, several splits and none chosen, or a file is broken.
    """
    for path in files(source, split):
        yield from READERS[path.suffix](path)


def groups(source: Path, split: str | None = None, *, column: str) -> Iterator[Row]:
    """The rows that stand together and have the same value in a column as one row: the first one, with ``rows``."""

    def key(row: Row) -> Any:
        return row if isinstance(row, UserError) else row.get(column)

    for _, group in groupby(rows(source, split), key):
        first, *rest = group
        yield first if isinstance(first, UserError) else {**first, "rows": [first, *rest]}


def files(source: Path, split: str | None = None) -> list[Path]:
    """The table files of a source: itself, the shards of a folder, or what ``Dataset.save_to_disk`` wrote."""
    if source.is_file():
        if source.suffix not in SUFFIXES:
            raise UserError(f"source: {source} is none of {', '.join(SUFFIXES)}")
        return [source]
    if not source.is_dir():
        raise UserError(f"source: no file or folder {source}")
    if (source / "state.json").is_file():
        return _saved(source)
    if (source / "dataset_dict.json").is_file():
        found = {path.parent.name: path.parent for path in sorted(source.glob("*/state.json"))}
        return _saved(found[_one_split(source, found, split)])
    for suffix in SUFFIXES:
        shards: dict[str, list[Path]] = {}
        for path in sorted(source.rglob(f"*{suffix}")):
            shards.setdefault(_split_of(path), []).append(path)
        if shards:
            return shards[_one_split(source, shards, split)]
    raise UserError(f"source: {source} holds no file of {', '.join(SUFFIXES)}")


def _split_of(path: Path) -> str:
    named = SHARD.match(path.stem)
    return named["split"] if named else ""


def _one_split(source: Path, found: dict[str, Any], split: str | None) -> str:
    """The split that is meant: the chosen one, or the only one."""
    if split in found:
        return split
    if split is None and len(found) == 1:
        return next(iter(found))
    names = ", ".join(name or "(no name)" for name in sorted(found))
    raise UserError(f"split: {source} holds the splits {names}; choose one of them")


def _saved(folder: Path) -> list[Path]:
    """The arrow files that a saved data set names in its state."""
    try:
        names = [entry["filename"] for entry in json.loads((folder / "state.json").read_bytes())["_data_files"]]
        found = [folder / Path(name).name for name in names]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{folder / 'state.json'}: is not what Dataset.save_to_disk writes") from None
    missing = next((path for path in found if not path.is_file()), None)
    if missing is not None:
        raise UserError(f"{missing}: no such file, but state.json names it")
    return found


# --- columnar files -------------------------------------------------------------------------------------------------


def _parquet(path: Path) -> Iterator[Row]:
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(ROWS):
                yield from _plain(batch)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path}: truncated or not a parquet file: {_first_line(error)}") from None


def _arrow(path: Path) -> Iterator[Row]:
    try:
        with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
            for batch in stream:
                for start in range(0, batch.num_rows, ROWS):
                    yield from _plain(batch.slice(start, ROWS))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path}: truncated or not an arrow file: {_first_line(error)}") from None


def _plain(batch: pa.RecordBatch) -> list[Row]:
    """Rows as plain values; times as text, because Python has no nanoseconds."""
    for index, field in enumerate(batch.schema):
        if pa.types.is_temporal(field.type):
            batch = batch.set_column(index, field.name, batch.column(index).cast(pa.string()))
    return batch.to_pylist()


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


# --- text files -----------------------------------------------------------------------------------------------------


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as handle:
        for number, line in enumerate(handle, 1):
            if line.strip():
                try:
                    yield _object(json.loads(line), line.decode())
                except (ValueError, RecursionError) as error:
                    yield UserError(f"{path.name}:{number}: not a JSON object: {error}")


def _object(value: Any, text: str) -> dict[str, Any]:
    """A row of JSON; ``ValueError`` when it is none, or holds half a character, which no file can."""
    if not isinstance(value, dict):
        raise ValueError(f"found {type(value).__name__}")
    if "\\ud" in text.lower():
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _json(path: Path) -> Iterator[Row]:
    """The objects of a list, decoded one by one; a file that begins with an object has one per line."""
    with path.open("rb") as handle:
        if handle.read(CHUNK).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
            yield from _jsonl(path)
            return
    decoder = json.JSONDecoder()
    try:
        with path.open(encoding="utf-8-sig") as handle:
            text, more = handle.read(CHUNK).lstrip(), CHUNK
            if not text.startswith("["):
                raise ValueError("expected a list of objects")
            place = 1
            while True:
                place = BETWEEN.match(text, place).end()  # type: ignore[union-attr]
                if text.startswith("]", place):
                    return
                if place < len(text) and text[place] != "{":
                    raise ValueError(f"expected a list of objects, found {text[place : place + 20]!r}")
                try:
                    value, end = decoder.raw_decode(text, place)
                except json.JSONDecodeError as error:
                    added = handle.read(more) if len(text) - place < LONGEST else ""
                    if not added:
                        raise ValueError(f"cut off or not valid: {error.msg}") from None
                    text, place, more = text[place:] + added, 0, more * 2
                    continue
                content, place, more = text[place:end], end, CHUNK
                try:
                    yield _object(value, content)
                except ValueError as error:
                    yield UserError(f"{path.name}: not a sound JSON object: {error}")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a JSON list: {error}") from None


def _csv(path: Path) -> Iterator[Row]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as handle:
            for row in csv.DictReader(handle, strict=True):
                if None in row or None in row.values():
                    yield UserError(f"{path.name}: more or fewer fields than the header")
                else:
                    yield row
    except (csv.Error, ValueError) as error:
        raise UserError(f"{path}: not a CSV file: {error}") from None


READERS = {".parquet": _parquet, ".arrow": _arrow, ".jsonl": _jsonl, ".json": _json, ".csv": _csv}
