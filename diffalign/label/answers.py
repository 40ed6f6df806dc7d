"""The file of answers: a JSON line per answer, only ever appended to. An undone answer is a line that takes it back."""

from __future__ import annotations

import errno
import json
import os
from collections import defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from diffalign.errors import UserError
from diffalign.files import refuse_folder, sync_folder, writing
from diffalign.records import explain


class Line(BaseModel):
    """One line: an answer, or its retraction, of one annotator to one item. Numbers are indices of candidates."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    annotator: str = Field(min_length=1)
    item: str
    record: str
    shown: list[int] = Field(default_factory=list, description="candidates from left to right")
    answer: Any = Field(default=None, description="see plan.check_answer, with candidates in place of places")
    seconds: float | None = Field(default=None, description="from seeing the item to answering it")
    retracted: bool = False
    time: str = Field(description="UTC")


class Conflict(Exception):
    """Another answer of the same annotator to the same item is there already."""


class Answers:
    """The answers that count: the last one of every annotator to every item, unless taken back."""

    def __init__(self) -> None:
        self.by_item: defaultdict[str, dict[str, Line]] = defaultdict(dict)
        self._given: defaultdict[str, list[str]] = defaultdict(list)

    def take(self, line: Line) -> None:
        """Follow one line of the file."""
        given = self._given[line.annotator]
        if line.retracted:
            self.by_item[line.item].pop(line.annotator, None)
            if line.item in given:
                given.remove(line.item)
        else:
            self.by_item[line.item][line.annotator] = line
            given.append(line.item)

    def of(self, annotator: str, item: str) -> Line | None:
        """The answer of an annotator to an item."""
        return self.by_item[item].get(annotator) if item in self.by_item else None

    def last(self, annotator: str) -> Line | None:
        """The latest answer of an annotator that counts."""
        given = self._given.get(annotator)
        return self.by_item[given[-1]][annotator] if given else None

    def annotators(self) -> list[str]:
        """Who has given answers that count, by name."""
        return sorted(name for name, given in self._given.items() if given)

    def __len__(self) -> int:
        return sum(map(len, self.by_item.values()))


def _lines(handle: BinaryIO, path: Path) -> Iterator[Line]:
    for number, text in enumerate(handle, 1):
        if not text.endswith(b"\n"):
            return  # the trace of a crash, or a line that is being written
        try:
            yield Line.model_validate(json.loads(text))
        except ValidationError as error:
            raise UserError(f"{path}:{number}: not an answer: {explain(error)}") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{number}: not valid JSON: {error}") from None


def read(path: Path) -> Answers:
    """The answers of a file; a torn last line is left out.

    Raises:
        UserError: there is no such file, or a line of it is no answer.
    """
    refuse_folder(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file of answers")
    found = Answers()
    with path.open("rb") as handle:
        for line in _lines(handle, path):
            found.take(line)
    return found


class Journal:
    """The open file of answers, as a context manager. A torn last line is cut when it is opened.

    Raises:
        UserError: a line is no answer, or another server has the file open.
    """

    answers: Answers
    _handle: FileIO

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Journal:
        refuse_folder(self.path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._handle = self.path.open("ab", buffering=0)  # what a full disk refuses must not wait in a buffer
        try:
            self._lock()
            sync_folder(self.path.parent)
            self.answers = read(self.path)
            with self.path.open("rb") as whole:
                self._handle.truncate(sum(len(line) for line in whole if line.endswith(b"\n")))
        except BaseException:
            self._handle.close()
            raise
        return self

    def _lock(self) -> None:
        if os.name != "posix":
            return
        import fcntl

        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{self.path}: another `diffalign label` has it open; stop that one first") from None

    def __exit__(self, *_: object) -> None:
        with writing(self.path):
            self._handle.close()

    def put(self, line: Line) -> None:
        """Append a line and wait until it is on disk.

        Raises:
            Conflict: another answer to the item is there. The same answer again changes nothing.
        """
        known = self.answers.of(line.annotator, line.item)
        if line.retracted and known is None:
            return
        if not line.retracted and known is not None:
            if known.answer == line.answer:
                return
            raise Conflict(f"{line.item!r} is answered already; undo that answer to change it")
        with writing(self.path):
            self._append(json.dumps(_content(line), ensure_ascii=False, allow_nan=False).encode() + b"\n")
        self.answers.take(line)

    def _append(self, text: bytes) -> None:
        end = self.path.stat().st_size
        try:
            if self._handle.write(text) != len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            os.fsync(self._handle.fileno())
        except OSError:  # no half line may stay, to which the next one would be glued
            self._handle.truncate(end)
            raise


def _content(line: Line) -> dict[str, Any]:
    left_out = {"shown", "answer", "seconds"} if line.retracted else {"retracted"}
    return line.model_dump(exclude=left_out)


def now() -> str:
    """The time of an answer."""
    return datetime.now(UTC).isoformat(timespec="seconds")


LONGEST_NAME = 40


def clean_name(name: str) -> str | None:
    """An annotator's name without spaces around it; None if it is none."""
    name = name.strip()
    return name if 0 < len(name) <= LONGEST_NAME and name.isprintable() else None
