"""`diffalign import`: a published data set or a folder -> records and media. Resumable; a crash loses a few rows."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import BinaryIO, NoReturn

from rich.progress import Progress, SpinnerColumn, TextColumn

from diffalign import importers
from diffalign.config import ImportConfig
from diffalign.errors import UserError
from diffalign.files import claim, replacing, sidecar_of, write_json
from diffalign.importers import Broken
from diffalign.importers.shelf import Shelf
from diffalign.records import Appender, Record

RECORDS = "records.jsonl"
BATCH = 500  # records per write that waits for the disk
PREVIEW = 100  # rows that a dry run reads


def run(config: ImportConfig, dry_run: bool = False) -> Path:
    """Import what is not there yet and print what came of it; returns the records file.

    ``dry_run`` reads the first rows and writes nothing.

    Raises:
        UserError: the source is not of this format, or a row is broken and ``on_error`` is ``stop``.
    """
    source, out = Path(config.source), Path(config.out)
    if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
        raise UserError(f"out: {out} lies in the source {source}; choose a folder beside it")
    root = Path(config.root) if config.root else source if source.is_dir() else source.parent
    shelf = Shelf(out, root, link=config.link, write=not dry_run)
    path = out / RECORDS
    identity = {**config.model_dump(mode="json", include={"format", "split", "limit"}), "files": _files(source)}
    claim(path, identity, out / "media", write=not dry_run)
    if dry_run:
        _preview(config, source, shelf)
        return path
    write_json(sidecar_of(path), {**identity, "count": None})
    counts, total = _import(config, source, shelf, path)
    if not total:
        raise UserError(f"{source}: all {counts['skipped']} rows are broken; see {_skipped(path)}")
    write_json(sidecar_of(path), {**identity, "count": total})
    was = f"; {total - counts['records']} records were there" if total > counts["records"] else ""
    listed = f", listed in {_skipped(path).name}" if counts["skipped"] else ""
    print(f"wrote {_summary(counts)}{listed} to {path}{was}")
    return path


def _preview(config: ImportConfig, source: Path, shelf: Shelf) -> None:
    counts: Counter[str] = Counter()
    rows = min(config.limit or PREVIEW, PREVIEW)
    for item in importers.read(config.format, source, shelf, split=config.split, limit=rows):
        _count(counts, item)
        if isinstance(item, Broken) and config.on_error == "stop":
            _stop(item)
    print(f"would import {source} as {config.format} into {shelf.out / RECORDS}; the first rows: {_summary(counts)}")


def _import(config: ImportConfig, source: Path, shelf: Shelf, path: Path) -> tuple[Counter[str], int]:
    """What was imported now, and how many records there are."""
    counts: Counter[str] = Counter()
    columns = SpinnerColumn(), TextColumn("import: {task.completed:,} records")
    with Appender(path) as output, Progress(*columns) as progress, _skips(path, config.on_error) as skip:
        task = progress.add_task("import", total=None, completed=len(output.done))
        items = importers.read(config.format, source, shelf, split=config.split, limit=config.limit, done=output.done)
        batch: list[Record] = []
        for item in items:
            _count(counts, item)
            if isinstance(item, Broken):
                skip(item)
                continue
            batch.append(item)
            if len(batch) == BATCH:
                output.append(batch)
                progress.update(task, completed=len(output.done))
                batch = []
        output.append(batch)
        progress.update(task, completed=len(output.done))
        return counts, len(output.done)


def _skipped(path: Path) -> Path:
    return path.with_name(f"{path.name}.skipped.jsonl")


@contextmanager
def _skips(path: Path, on_error: str) -> Iterator[Callable[[Broken], None]]:
    """What to do with a broken row: stop, or list it."""
    if on_error == "stop":
        yield _stop
        return
    with replacing(_skipped(path)) as handle:
        yield lambda broken: _list(handle, broken)


def _stop(broken: Broken) -> NoReturn:
    raise UserError(f"row {broken.row}: {broken.reason}; `on_error: skip` leaves such rows out and lists them")


def _list(handle: BinaryIO, broken: Broken) -> None:
    handle.write(json.dumps(broken._asdict()).encode() + b"\n")


def _count(counts: Counter[str], item: Record | Broken) -> None:
    if isinstance(item, Broken):
        counts["skipped"] += 1
        return
    rewards = [candidate.labels["reward"] for candidate in item.candidates if "reward" in candidate.labels]
    tied = any(a == b for a, b in combinations(rewards, 2))
    counts.update({"records": 1, "candidates": len(item.candidates), "ties": int(tied)})


def _summary(counts: Counter[str]) -> str:
    return ", ".join(f"{counts[name]} {name}" for name in ("records", "candidates", "ties", "skipped"))


def _files(source: Path) -> str:
    """A digest of the names and sizes of the source's files; their content may be a hundred gigabytes."""
    paths = sorted(path for path in source.rglob("*") if path.is_file()) if source.is_dir() else [source]
    digest = hashlib.sha256()
    for path in paths:
        if not path.is_file():
            raise UserError(f"source: no file or folder {path}")
        digest.update(f"{path.relative_to(source.parent)}|{path.stat().st_size}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()
