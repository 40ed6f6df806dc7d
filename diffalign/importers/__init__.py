"""Published data sets as records: one row of :data:`FORMATS` each, which reads rows and turns one into a record.

A record's id is the number of its row, from 0, unless the data set has one record per id of its own. Rows that cannot
be used are handed on as :class:`Broken`, never dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from diffalign.errors import UserError
from diffalign.importers import chats, clips, folders, pictures, prompts, tables
from diffalign.importers.fields import text
from diffalign.importers.shelf import Shelf
from diffalign.parquet import COLUMNS, record_of
from diffalign.records import Record, explain


class Format(NamedTuple):
    """How a data set is read."""

    record: Callable[[str, dict[str, Any], Shelf], Record]
    """Id, row and where its media go -> record; raises ``UserError`` or ``ValidationError`` for a broken row."""
    columns: tuple[tuple[str, ...], ...]
    """What a row must have: all of one of these."""
    rows: Callable[[Path, str | None], Iterator[tables.Row]] = tables.rows
    """Source and split -> rows; raises ``UserError`` for a broken file."""
    id: str | None = None
    """The column that names the records."""


class Broken(NamedTuple):
    """A row that is no record."""

    row: int
    reason: str


def _own(name: str, row: dict[str, Any], shelf: Shelf) -> Record:
    return record_of(row, shelf.restore)


FORMATS: dict[str, Format] = {
    "pickapic": Format(pictures.pickapic, (("caption", "jpg_0", "jpg_1", "label_0", "label_1"),)),
    "hpdv2": Format(pictures.hpdv2, (("prompt", "file_path", "human_preference"), ("prompt", "image_path", "rank"))),
    "hpdv3": Format(pictures.hpdv3, (("prompt", "path1", "path2"),)),
    "imagereward": Format(
        pictures.imagereward,
        (("prompt_id", "prompt", "rank", "image_path"), ("prompt_id", "prompt", "rank", "image")),
        partial(tables.groups, column="prompt_id"),
        id="prompt_id",
    ),
    "videofeedback": Format(clips.videofeedback, (("id", "text prompt", *clips.DIMENSIONS),)),
    "videoalign": Format(clips.videoalign, (("path_A", "path_B", "prompt", "VQ", "MQ", "TA"),)),
    "ultrafeedback": Format(chats.ultrafeedback, (("chosen", "rejected"),)),
    "trl": Format(chats.trl, (("chosen", "rejected"), ("prompt",))),
    "d3po": Format(folders.d3po, (("prompt", "votes"),), folders.d3po_rows),
    "folders": Format(folders.twins, (("winner", "loser", "prompt"),), folders.twin_rows),
    "jsonl": Format(
        folders.listed,
        tuple((file, caption) for file in folders.FILE_KEYS for caption in folders.TEXT_KEYS),
        folders.list_rows,
    ),
    "geneval": Format(prompts.geneval, (("tag", "include", "prompt"),)),
    "dpg": Format(
        prompts.dpg,
        (
            (
                *("item_id", "text", "proposition_id", "dependency"),
                *("category_broad", "question_natural_language"),
            ),
        ),
        partial(tables.groups, column="item_id"),
        id="item_id",
    ),
    "compbench": Format(prompts.compbench, (("prompt", "tag"),), prompts.compbench_rows),
    "prompts": Format(prompts.prompts, (("prompt",),), prompts.prompt_rows),
    "parquet": Format(_own, (tuple(COLUMNS),), id="id"),
}


def read(
    name: str,
    source: Path,
    shelf: Shelf,
    *,
    split: str | None = None,
    limit: int | None = None,
    done: Collection[str] = (),
) -> Iterator[Record | Broken]:
    """Stream a data set, with its media put on the shelf.

    Args:
        limit: of rows.
        done: ids that are passed over.

    Raises:
        UserError: there is nothing, a file is broken, or the first row lacks columns.
    """
    found = FORMATS[name]
    seen: set[str] = set()
    number = -1
    for number, row in enumerate(islice(found.rows(source, split), limit)):
        if number == 0 and isinstance(row, dict) and (lack := _lack(found, row)):
            raise UserError(f"{source}: not {name}: {lack}")
        try:
            named = _id(found, row, number, seen)
            if named not in done:
                yield found.record(named, row, shelf)  # type: ignore[arg-type]
        except UserError as error:
            yield Broken(number, str(error))
        except ValidationError as error:
            yield Broken(number, explain(error))
    if number < 0:
        raise UserError(f"{source}: holds no rows")


def _id(found: Format, row: tables.Row, number: int, seen: set[str]) -> str:
    """The id of a readable row that has its columns."""
    if isinstance(row, UserError):
        raise row
    if lack := _lack(found, row):
        raise UserError(lack)
    if found.id is None:
        return f"{number:07d}"
    named = text(row, found.id)
    if named in seen:
        raise UserError(f"{found.id} {named!r} was there before; the rows of one record stand together")
    seen.add(named)
    return named


def _lack(found: Format, row: dict[str, Any]) -> str | None:
    """The columns that a row does not have, next to those it has."""
    missing = min(([key for key in columns if key not in row] for columns in found.columns), key=len)
    return f"lacks {', '.join(missing)}; has {', '.join(map(str, row))}" if missing else None
