"""What a reward server has answered, by the keys of its clients: in memory and, against kills, in a file."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from diffalign.errors import UserError
from diffalign.files import claim, refuse_folder, replacing, sync_folder, writing

Unit = tuple[str, tuple[str, ...]]
"""A scorer's label and the keys of the items that it saw as one: one item, or all of a request if it compares."""


class Stored(NamedTuple):
    """The outcomes of a unit: one line of the file."""

    unit: Unit
    digest: str
    """Of the items, so that a key cannot name two of them."""
    at: float
    answers: list[dict[str, Any]]
    """As :func:`diffalign.wire.to_json` makes them, in the order of the keys."""

    def line(self) -> bytes:
        """The line that :func:`_parse` reads back."""
        return json.dumps(self._asdict(), allow_nan=False).encode() + b"\n"


class Outcomes:
    """Outcomes of the last ``retention`` seconds.

    With a path, what :meth:`write` returned from is on disk; opening reads it back, cuts a torn last line, and drops
    what is older than the retention. The file belongs to one server and to one set of scorers at a time.

    Raises:
        UserError: another server has the file, it belongs to other scorers, or it is broken.
    """

    def __init__(
        self,
        path: Path | None,
        retention: float,
        identity: dict[str, Any],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.path, self.retention, self.clock = path, retention, clock
        self._known: dict[Unit, Stored] = {}
        self._lock = self._file = None
        if path is None:
            return
        refuse_folder(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(path.with_name(f"{path.name}.lock"))
        try:
            claim(path, identity)
            self._load(path)
            self._file = path.open("ab", buffering=0)
            sync_folder(path.parent)
        except BaseException:
            self.close()
            raise

    def _load(self, path: Path) -> None:
        if not path.is_file():
            return
        stored, torn = [], False
        with path.open("rb") as handle:
            for number, line in enumerate(handle, 1):
                torn = not line.endswith(b"\n")
                if not torn:
                    stored.append(_parse(line, f"{path}:{number}"))
        self.remember(stored)
        if torn or len(self._known) < len(stored):
            with replacing(path) as out:
                out.writelines(kept.line() for kept in self._known.values())

    def __len__(self) -> int:
        return len(self._known)

    def get(self, unit: Unit) -> Stored | None:
        """What is known of a unit."""
        return self._known.get(unit)

    def write(self, stored: Sequence[Stored]) -> None:
        """Wait until these are on disk. After a failure none of them is.

        Raises:
            OSError: of the disk.
        """
        if self._file is None or self.path is None:
            return
        content = b"".join(map(Stored.line, stored))
        end = os.fstat(self._file.fileno()).st_size
        try:
            with writing(self.path):
                if self._file.write(content) != len(content):
                    raise OSError("the disk took a part of a line only")
                os.fsync(self._file.fileno())
        except BaseException:
            os.ftruncate(self._file.fileno(), end)
            raise

    def remember(self, stored: Iterable[Stored]) -> None:
        """Take up what :meth:`write` has written and forget what is too old."""
        self._known.update((one.unit, one) for one in stored)
        oldest = self.clock() - self.retention
        while self._known:
            unit, first = next(iter(self._known.items()))
            if first.at >= oldest:
                break
            del self._known[unit]

    def close(self) -> None:
        """Let another server have the file."""
        for handle in (self._file, self._lock):
            if handle is not None:
                handle.close()


def _parse(line: bytes, where: str) -> Stored:
    try:
        content = json.loads(line)
        scorer, keys = content["unit"]
        answers = content["answers"]
        if len(answers) != len(keys):
            raise ValueError(f"{len(answers)} answers for {len(keys)} keys")
        return Stored((scorer, tuple(keys)), content["digest"], float(content["at"]), answers)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where}: not an outcome: {error}; choose another `journal`, or delete it") from None


def _locked(path: Path) -> Any:
    """An open file that no other process holds, where the system can lock (not on Windows)."""
    handle = path.open("ab")
    if os.name == "posix":
        import fcntl

        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            handle.close()
            raise UserError(f"{path}: another server uses this journal; choose another `journal`") from None
    return handle
