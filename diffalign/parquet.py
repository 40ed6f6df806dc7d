"""Records as parquet files with their media inside, which `datasets.load_dataset` and the Hub's viewer read, and back.

A row is a record. What has no fixed shape (labels, origin, meta, conversations) is JSON text; pictures are `Image`
features, other media plain bytes with a path. Torch-free.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from diffalign import __version__
from diffalign.errors import UserError
from diffalign.files import require_complete, sidecar_of
from diffalign.records import Candidate, Message, Record, media_path, plain, read

GROUP_ROWS, GROUP_BYTES = 100, 64_000_000  # of a row group, which readers hold in memory
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
FILE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
CANDIDATE = {
    "image": FILE,
    "media": FILE,
    "text": pa.string(),
    "conversation": pa.bool_(),
    "condition": FILE,
    "labels": pa.string(),
    "origin": pa.string(),
    "errors": pa.string(),
}
COLUMNS = {
    "id": pa.string(),
    "prompt": pa.string(),
    "conversation": pa.bool_(),
    "condition": FILE,
    "source": pa.string(),
    "source_file": FILE,
    "candidates": pa.list_(pa.struct(CANDIDATE)),
    "meta": pa.string(),
}


class Contents(NamedTuple):
    """What a records file holds."""

    count: int
    labels: tuple[str, ...]


def survey(source: Path) -> Contents:
    """Read all records once.

    Raises:
        UserError: they are unsound, or not all of them are there.
    """
    count, labels = 0, set()
    for record in read(source):
        count += 1
        labels.update(name for candidate in record.candidates for name in candidate.labels)
    require_complete(source, count)
    return Contents(count, tuple(sorted(labels)))


def write(source: Path, folder: Path, contents: Contents, shard_bytes: int) -> int:
    """Write the records of a file as ``data-00000-of-0000N.parquet``; the number of files.

    A file is closed by the row group that brings its media and text to ``shard_bytes``. Its metadata says where the
    records are from and which labels they have.

    Raises:
        UserError: a media file is missing, or a condition is no picture.
    """
    schema, shards = _schema(source, contents), 0
    groups = _groups(_row(record, source.parent) for record in read(source))
    group = next(groups, None)
    while group is not None:
        size = 0
        with pq.ParquetWriter(folder / f"{shards}.parquet", schema, compression="zstd", use_dictionary=False) as file:
            while group is not None and size < shard_bytes:
                file.write_table(pa.Table.from_pylist(group.rows, schema))
                size += group.size
                group = next(groups, None)
        shards += 1
    for index in range(shards):
        (folder / f"{index}.parquet").rename(folder / f"data-{index:05d}-of-{shards:05d}.parquet")
    return shards


class _Group(NamedTuple):
    rows: list[dict[str, Any]]
    size: int


def _groups(rows: Iterator[dict[str, Any]]) -> Iterator[_Group]:
    group, size = [], 0
    for row in rows:
        group.append(row)
        size += _size(row)
        if len(group) == GROUP_ROWS or size >= GROUP_BYTES:
            yield _Group(group, size)
            group, size = [], 0
    if group:
        yield _Group(group, size)


def _size(value: Any) -> int:
    """Bytes and characters in a row."""
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    if isinstance(value, list):
        return sum(map(_size, value))
    return len(value) if isinstance(value, bytes | str) else 1


def _schema(source: Path, contents: Contents) -> pa.Schema:
    """With what `datasets` reads features from, and where the records are from."""
    sidecar = sidecar_of(source)
    origin = {
        "version": __version__,
        "records": source.name,
        **contents._asdict(),
        "made_from": json.loads(sidecar.read_bytes()) if sidecar.is_file() else None,
    }
    features = {name: _feature(kind) for name, kind in COLUMNS.items()} | {"source_file": _any_file()}
    metadata = {"huggingface": json.dumps({"info": {"features": features}}), "diffalign": json.dumps(origin)}
    return pa.schema(COLUMNS, metadata=metadata)


def _feature(kind: pa.DataType) -> Any:
    """A column as `datasets` describes it. Lists are written as version 3 wrote them, which later ones read."""
    if pa.types.is_list(kind):
        inner = {name: _feature(column) for name, column in CANDIDATE.items()}
        inner["media"] = _any_file()
        return [inner]
    if kind == FILE:
        return {"_type": "Image"}
    return {"dtype": str(kind), "_type": "Value"}


def _any_file() -> dict[str, Any]:
    """A file that need not be a picture."""
    return {"bytes": _feature(pa.binary()), "path": _feature(pa.string())}


# --- a record and its row -------------------------------------------------------------------------------------------


def _row(record: Record, root: Path) -> dict[str, Any]:
    return {
        "id": record.id,
        **_content("prompt", record.prompt),
        "condition": _picture(record.condition, root),
        "source": record.source,
        "source_file": _source(record.source, root),
        "candidates": [_candidate(candidate, root) for candidate in record.candidates],
        "meta": json.dumps(record.meta, ensure_ascii=False),
    }


def _candidate(candidate: Candidate, root: Path) -> dict[str, Any]:
    sample = candidate.sample
    is_picture = sample is not None and sample.lower().endswith(PICTURES)
    return {
        "image": _file(sample, root) if sample and is_picture else None,
        "media": _file(sample, root) if sample and not is_picture else None,
        **_content("text", candidate.text),
        "condition": _picture(candidate.condition, root),
        "labels": json.dumps(candidate.labels, ensure_ascii=False),
        "origin": json.dumps(candidate.origin, ensure_ascii=False),
        "errors": json.dumps(candidate.errors, ensure_ascii=False),
    }


def _source(relative: str | None, root: Path) -> dict[str, Any] | None:
    """What a record is made from, where its source names a file of the folder; it may be any text."""
    try:
        return _file(relative, root) if relative is not None else None
    except UserError:
        return None


def _content(key: str, value: str | list[Message] | None) -> dict[str, Any]:
    """Text as it is, a conversation as JSON with a flag."""
    if value is None or isinstance(value, str):
        return {key: value, "conversation": False}
    return {key: json.dumps(plain(value), ensure_ascii=False), "conversation": True}


def _file(relative: str, root: Path) -> dict[str, Any]:
    path = media_path(root, relative)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    return {"bytes": path.read_bytes(), "path": relative}


def _picture(relative: str | None, root: Path) -> dict[str, Any] | None:
    if relative is None:
        return None
    if not relative.lower().endswith(PICTURES):
        raise UserError(f"condition {relative!r}: is none of {', '.join(PICTURES)}")
    return _file(relative, root)


def record_of(row: dict[str, Any], restore: Callable[[str, bytes], str]) -> Record:
    """The record of a row.

    Args:
        restore: stores the bytes of a media file under its path and returns this path.

    Raises:
        UserError: the row is not one that :func:`write` makes.
    """
    try:
        candidates = [
            Candidate(
                sample=_restored(item["image"], restore) or _restored(item["media"], restore),
                text=_turns(item, "text"),
                condition=_restored(item["condition"], restore),
                labels=json.loads(item["labels"]),
                origin=json.loads(item["origin"]),
                errors=json.loads(item["errors"]),
            )
            for item in row["candidates"]
        ]
        return Record(
            id=row["id"],
            prompt=_turns(row, "prompt"),  # type: ignore[arg-type]
            condition=_restored(row["condition"], restore),
            source=_restored(row["source_file"], restore) or row["source"],
            candidates=candidates,
            meta=json.loads(row["meta"]),
        )
    except (KeyError, TypeError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"not a row of `diffalign export`: {type(error).__name__}: {error}") from None


def _turns(row: dict[str, Any], key: str) -> str | list[Message] | None:
    return json.loads(row[key]) if row["conversation"] else row[key]


def _restored(file: dict[str, Any] | None, restore: Callable[[str, bytes], str]) -> str | None:
    if file is None:
        return None
    path, content = file["path"], file["bytes"]
    if not isinstance(path, str) or not isinstance(content, bytes):
        raise TypeError("media are bytes with a path")
    return restore(path, content)
